// What a fused op is made of, and what it is handed to a driver with. No torch tensors here: pointers, sizes and strides.
//
// A row op is a struct of scalars that derives from RowOp, says how many operands of each kind it has, and holds its formulas:
//
//   template <class A> using Sweeps = List<Sum1<A>, ...>;   the reductions over a row, one sweep each, in order (may be List<>)
//   struct Sum1 { A field{identity}; merge(other) }         what a sweep gathers; all fields are A
//   template <class S> struct Row { ... };                  what is known of a row between sweeps; S is a scalar (a vector in
//   across_cpu.h)
//
//   begin(row, at)          before the first sweep: fetch per-row values                               (optional)
//   skip(row)               true: leave the row unread, its outputs are 0                              (optional)
//   add(sum, row, in)       one column (A is a scalar) or one vector of columns into the sum; the last sweep of an op that has
//                           `kept` also sets in.k[i] for map(): stored in between or, where that costs more, made again
//   needs<Sum>(row)         false: leave that sweep out                                                (optional)
//   finish(row, sum, at)    after a sweep: turn the sum into row values, store per-row outputs
//   map<T>(row, in, out)    out.y[i]: the outputs of a column;  out.col[i]: its contribution to a sum over all rows
//
// A map op derives from MapOp, has inputs, outputs and sums over all elements, and map(in, out) instead of all the above. It may
// have begin(), which each thread calls on a copy of it before the first element; with `numbered`, map() finds the elements'
// numbers in `in`. T is the stored type of the rows, P that of the parameters, A the accumulate type, S = Scalar<A>.
#pragma once

#include "numeric.h"

namespace fusegrad {

enum class DType : int8_t { f64, f32, f16, bf16, boolean /* of mixed inputs only */ };
constexpr int size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : type == DType::boolean ? 1 : 2; }
constexpr int kMaxDims = 8;  // of the rows, after dimensions that can be walked as one have been joined

template <class...>
struct List {};
template <class>
struct Last;
template <class First, class... Rest>
struct Last<List<First, Rest...>> : Last<List<Rest...>> {};
template <class X>
struct Last<List<X>> {
  using type = X;
};

constexpr int at_least_one(int n) { return n > 0 ? n : 1; }  // an array of 0 is not C++

struct MapOp {
  static constexpr int in = 0;       // row inputs x[i], of type T
  static constexpr int params = 0;   // one value per column p[i], of type P, shared by all rows
  static constexpr int mixed = 0;    // row inputs m[i], each of a type of its own, bool too; elements may be apart, or one for all
  static constexpr int out = 0;      // row outputs y[i]
  static constexpr int sums = 0;     // map ops only: sums over all elements sum[i], as S, one for each slice of them
  static constexpr int col_out = 0;  // sums over the rows, of type P, one value per column
  static constexpr int wide_cols = 0;  // the last so many of them are of type S: they are added up further
  static constexpr int index = 0;      // int64 per row
  static constexpr int scalar_in = 0;  // T or S per row
  static constexpr int scalar_out = 0;
  static constexpr bool in_sets = false;   // row ops: parameters and sums over the rows may come in sets: those of row r are number
                                           // r % sets. Where rows are walked along only
  static constexpr int kept = 0;           // row ops: values of a column k[i] that the last sweep leaves for map(), of type A
  static constexpr double absent = 1;      // what a parameter or a mixed input that is not given stands for
  static constexpr bool numbered = false;  // map ops without sums only
  static constexpr int packs = 4;          // row ops: of an input, held by a CUDA thread at most; fewer where registers would spill

  FUSEGRAD_FN void begin() {}
};

struct RowOp : MapOp {
  template <class R, class At>
  FUSEGRAD_FN void begin(R&, const At&) const {}
  template <class R>
  FUSEGRAD_FN bool skip(const R&) const {
    return false;
  }
  template <class Sum, class R>
  FUSEGRAD_FN bool needs(const R&) const {
    return true;
  }
};

// What a formula reads of one column, or of as many neighbouring ones as A has lanes.
template <class Op, class A>
struct In {
  A x[at_least_one(Op::in)];
  A p[at_least_one(Op::params)];
  A m[at_least_one(Op::mixed)];
  A k[at_least_one(Op::kept)];
  int64_t col;            // number of the first one
  int64_t number, apart;  // numbered map ops: of the first element, in the tensor as its owner indexes it; from one to the next

  __attribute__((always_inline)) In() = default;  // or it would be a symbol that the variants share
  FUSEGRAD_FN auto is(int64_t c) const { return lane<A>(c - col); }
  FUSEGRAD_FN auto before(int64_t c) const { return Lanes<A>::first(c - col); }
};
// The same of rows that are stored as T.
template <class Op, class A, class T>
struct InRows : In<Op, A> {
  FUSEGRAD_FN static A stored(A a) { return rounded<T>(a); }
};
template <class Op, class A>
struct Out {
  A y[at_least_one(Op::out)];
  A col[at_least_one(Op::col_out)];
  A sum[at_least_one(Op::sums)];
};

// The sweep that leaves k[i] for map(), and those of a column again where they were not stored.
template <class Op, class A>
using Keeper = typename Last<typename Op::template Sweeps<A>>::type;
template <class A, class Op, class R, class Column>
FUSEGRAD_FN void keep_again([[maybe_unused]] const Op& op, [[maybe_unused]] const R& row, [[maybe_unused]] Column& in) {
  if constexpr (Op::kept > 0) {
    Keeper<Op, A> unused;
    op.add(unused, row, in);
  }
}

// A tensor seen as rows: element (r, c) is at data + offset(r) + c * col.
struct View {
  void* data = nullptr;  // null: not given, or not asked for
  int64_t stride[kMaxDims] = {};
  int64_t col = 1;
  bool wide = false;        // per-row values only: stored as Acc<T> and not as T
  DType type = DType::f32;  // mixed inputs only
};

struct Extent {
  int64_t rows = 0, cols = 0;
  int dims = 0;  // of the rows
  int64_t size[kMaxDims] = {};

  FUSEGRAD_FN int64_t offset(const View& v, int64_t r) const {
    int64_t o = 0;
    for (int d = dims - 1; d > 0; --d) {
      const int64_t q = r / size[d];
      o += (r - q * size[d]) * v.stride[d];
      r = q;
    }
    return o + r * v.stride[0];
  }
};

template <class Op>
struct RowArgs {
  Op op;
  Extent extent;
  DType rows, params;
  View in[at_least_one(Op::in)];
  View mixed[at_least_one(Op::mixed)];
  View out[at_least_one(Op::out)];
  View index[at_least_one(Op::index)];
  View scalar_in[at_least_one(Op::scalar_in)];
  View scalar_out[at_least_one(Op::scalar_out)];
  const void* param[at_least_one(Op::params)] = {};
  void* col_out[at_least_one(Op::col_out)] = {};
  int64_t sets = 1;         // with in_sets: of parameters and of sums over the rows, [sets, cols]
  void* partial = nullptr;  // [col_out, slices, sets, cols] of Acc<T>: each slice of rows sums its own columns
  int64_t slices = 0;

  FUSEGRAD_FN int64_t known_sets() const { return Op::in_sets ? sets : 1; }  // as a constant for all other ops
  FUSEGRAD_FN int64_t set(int64_t r) const { return r % known_sets(); }
  FUSEGRAD_FN bool sums_columns() const {
    for (int i = 0; i < Op::col_out; ++i)
      if (col_out[i]) return true;
    return false;
  }
};

// Whether the columns of a row are next to each other, in the results (one that is not asked for may say how it would lie) or,
// without any, in the first input. Where they are not, the rows usually are (channels of an image), and a driver that can works on
// several of those at a time.
template <class Op>
bool along(const RowArgs<Op>& a) {
  for (int i = 0; i < Op::out; ++i)
    if (a.out[i].data) return a.out[i].col == 1;
  return (Op::out > 0 ? a.out[0].col : a.in[0].col) == 1;
}

template <class Op>
struct MapArgs {
  Op op;
  Extent extent;
  DType rows;
  View in[at_least_one(Op::in)];
  View mixed[at_least_one(Op::mixed)];
  View out[at_least_one(Op::out)];
  View number;              // an offset in it is an element's number
  void* partial = nullptr;  // [sums, slices] of Acc<T>
  int64_t slices = 0;
};

// Single elements of the row at hand, for begin() and finish().
template <class Op, class T, class P>
struct At {
  using S = Acc<T>;
  const RowArgs<Op>& args;
  int64_t r;

  FUSEGRAD_FN static S stored(S a) { return rounded<T>(a); }

  FUSEGRAD_FN S x(int i, int64_t c) const {
    const View& v = args.in[i];
    return S(static_cast<const T*>(v.data)[args.extent.offset(v, r) + c * v.col]);
  }
  FUSEGRAD_FN S p(int i, int64_t c) const {
    return args.param[i] ? S(static_cast<const P*>(args.param[i])[args.set(r) * args.extent.cols + c]) : S(Op::absent);
  }
  FUSEGRAD_FN int64_t index(int i) const {
    const View& v = args.index[i];
    return static_cast<const int64_t*>(v.data)[args.extent.offset(v, r)];
  }
  FUSEGRAD_FN bool given(int i) const { return args.scalar_in[i].data != nullptr; }
  FUSEGRAD_FN S scalar(int i, S otherwise = S(0)) const {
    const View& v = args.scalar_in[i];
    if (!v.data) return otherwise;
    const int64_t o = args.extent.offset(v, r);
    return v.wide ? static_cast<const S*>(v.data)[o] : S(static_cast<const T*>(v.data)[o]);
  }
  FUSEGRAD_FN void put(int i, S value) const {
    const View& v = args.scalar_out[i];
    if (!v.data) return;
    const int64_t o = args.extent.offset(v, r);
    if (v.wide)
      static_cast<S*>(v.data)[o] = value;
    else
      static_cast<T*>(v.data)[o] = T(value);
  }
};

// Calls f(T{}, P{}) for the pair of types at hand. Parameters have the type of the rows, or are float with 16-bit rows.
template <bool has_params, class F>
void for_types(DType rows, DType params, const F& f) {
  const auto with = [&](auto t) {
    if constexpr (has_params && sizeof(t) == 2)
      if (params == DType::f32) return f(t, float{});
    f(t, t);
  };
  if (rows == DType::f64) return with(double{});
  if (rows == DType::f32) return with(float{});
  if (rows == DType::f16) return with(Half{});
  with(BFloat16{});
}

// The device table. Each file <op>_cpu.cpp, compiled once per capability, and each <op>.cu defines its Kernels<...>::entry; an
// instantiation that is missing does not link.
enum Variant { kDefault, kAvx2, kAvx512, kCuda, kVariants };

template <class Args>
struct Kernel {
  void (*launch)(const Args&, void* stream);
  int64_t (*slices)(const Args&);  // how many parts the rows (of a map op: the elements) are cut into for the sums over them;
                                   // never the number of threads
};
template <class Args, Variant variant>
struct Kernels {
  static const Kernel<Args> entry;
};

}  // namespace fusegrad
