// Runs a row op on a GPU whose columns may be apart while its rows lie next to each other: neighbouring threads take neighbouring
// rows, a pack of them each, and the threads of a block that stand behind each other share out the columns. See across_cpu.h.
#pragma once

#include "rows_cuda.cuh"

namespace fusegrad {
namespace {

template <class Op, class T, class P, bool packed>
class AcrossCuda {
  using S = Acc<T>;
  using Row = typename Op::template Row<S>;
  using Here = AtTeam<Op, T, P>;
  static constexpr int V = packed ? kPack<T> : 1;  // rows of a thread
  static constexpr int kIn = at_least_one(Op::in), kOut = at_least_one(Op::out), kCols = at_least_one(Op::col_out);
  static constexpr bool kOneWalk = length(typename Op::template Sweeps<S>{}) == 0 && Op::col_out == 0;

 public:
  static_assert(Op::mixed == 0);
  static constexpr int kMaxThreads = 256;
  struct Args {
    RowArgs<Op> row;
    int side, depth;               // threads next to each other, a power of two within a warp, and behind each other
    int64_t lanes, tiles;          // neighbouring rows, and parts that they are dealt in
    int64_t items, pieces, piece;  // of work; parts of the columns, columns of one
  };

  static bool fits(const RowArgs<Op>& a) {
    const int last = a.extent.dims - 1;
    bool yes = a.extent.size[last] % V == 0;
    const auto check = [&](const View& v) {
      if (!v.data) return;
      yes &= v.stride[last] == 1 && aligned(v.data) && (a.extent.cols <= 1 || v.col % V == 0);
      for (int d = 0; d < last; ++d) yes &= a.extent.size[d] == 1 || v.stride[d] % V == 0;
    };
    for (int i = 0; i < Op::in; ++i) check(a.in[i]);
    for (int i = 0; i < Op::out; ++i) check(a.out[i]);
    return yes;
  }
  static Args args(const RowArgs<Op>& a) {
    Args s{a, 1, 1, a.extent.size[a.extent.dims - 1], 0, 0, 1, a.extent.cols};
    const int64_t packs = (s.lanes + V - 1) / V;
    while (s.side < 32 && s.side < packs) s.side *= 2;
    while (s.side * s.depth < kMaxThreads && (s.side * s.depth < 32 || s.depth < a.extent.cols)) s.depth *= 2;
    s.tiles = (packs + s.side - 1) / s.side;
    if (kOneWalk) {
      s.piece = 32 * s.depth;
      s.pieces = (a.extent.cols + s.piece - 1) / s.piece;
    }
    s.items = (s.lanes ? a.extent.rows / s.lanes : 0) * s.tiles * s.pieces;
    return s;
  }
  static int64_t slices(const Args& s) { return std::min<int64_t>(s.items, 4 * int64_t(multiprocessors())); }

  static void launch(const RowArgs<Op>& a, void* stream) {
    const Args s = args(a);
    const bool sums = a.sums_columns();
    const int64_t blocks = sums ? a.slices : std::min<int64_t>(s.items, int64_t(kBlocksPerSM) * multiprocessors());
    if (blocks > 0) fusegrad::launch<AcrossCuda>(blocks, s.side * s.depth, stream, s);
    add_slices<Op, S, P>(a, stream);
  }

  static __device__ __forceinline__ void run(const Args& args) { AcrossCuda(args).walk(); }

 private:
  const Args& s;
  const RowArgs<Op>& a;
  const int x, y;  // place in the block
  bool live = false;
  const T* in[kIn];
  T* out[kOut];
  Row row[V];

  __device__ __forceinline__ explicit AcrossCuda(const Args& args)
      : s(args), a(args.row), x(threadIdx.x & (args.side - 1)), y(threadIdx.x / args.side) {}

  // All threads of a block take the same turns: they meet in every sum.
  __device__ __forceinline__ void walk() {
    if constexpr (Op::col_out > 0) {
      for (int i = 0; i < Op::col_out; ++i)
        if (a.col_out[i] && x == 0)
          for (int64_t c = y; c < a.extent.cols; c += s.depth) partial(i)[c] = S(0);
    }
    for (int64_t i = blockIdx.x; i < s.items; i += gridDim.x) {
      const int64_t unit = i / s.pieces, piece = i - unit * s.pieces, outer = unit / s.tiles;
      const int64_t lane = ((unit - outer * s.tiles) * s.side + x) * V, r = outer * s.lanes + lane;
      live = lane < s.lanes;
      if (live) {
#pragma unroll
        for (int j = 0; j < Op::in; ++j) in[j] = static_cast<const T*>(a.in[j].data) + a.extent.offset(a.in[j], r);
#pragma unroll
        for (int j = 0; j < Op::out; ++j)
          out[j] = a.out[j].data ? static_cast<T*>(a.out[j].data) + a.extent.offset(a.out[j], r) : nullptr;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          row[e] = Row{};
          a.op.begin(row[e], here(r + e));
        }
      }
      sweeps(typename Op::template Sweeps<S>{}, r);
      if constexpr (Op::out > 0 || Op::col_out > 0) {
        const int64_t begin = piece * s.piece, end = std::min(a.extent.cols, begin + s.piece);
        for (int64_t c = begin; c < end; c += s.depth) map(c + y, live && c + y < end);
      }
    }
  }

  __device__ __forceinline__ Here here(int64_t r) const { return {{a, r}, y == 0}; }

  // The elements of a column in the thread's rows.
  struct Column {
    T x[kIn][V];
    S p[at_least_one(Op::params)];
    int64_t c;

    __device__ __forceinline__ In<Op, S> at(int e) const {
      In<Op, S> in;
      in.col = c;
#pragma unroll
      for (int i = 0; i < Op::in; ++i) in.x[i] = S(x[i][e]);
#pragma unroll
      for (int i = 0; i < Op::params; ++i) in.p[i] = p[i];
      return in;
    }
  };
  __device__ __forceinline__ Column column(int64_t c) const {
    Column column;
    column.c = c;
#pragma unroll
    for (int i = 0; i < Op::in; ++i) load<V>(in[i] + c * a.in[i].col, column.x[i]);
#pragma unroll
    for (int i = 0; i < Op::params; ++i) column.p[i] = a.param[i] ? S(__ldg(static_cast<const P*>(a.param[i]) + c)) : S(Op::absent);
    return column;
  }

  template <class... Sums>
  __device__ __forceinline__ void sweeps(List<Sums...>, int64_t r) {
    (sweep<Sums>(r), ...);
  }
  template <class Sum>
  __device__ __forceinline__ void sweep(int64_t r) {
    constexpr int kFields = sizeof(Sum) / sizeof(S);
    FUSEGRAD_SHARED(S, parts, kMaxThreads * V * kFields);
    Sum sum[V];
    bool wanted = false;
#pragma unroll
    for (int e = 0; e < V; ++e) wanted |= live && a.op.template needs<Sum>(row[e]);
    if (wanted) {
#pragma unroll 2
      for (int64_t c = y; c < a.extent.cols; c += s.depth) {
        const Column here = column(c);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          In<Op, S> of_row = here.at(e);
          a.op.add(sum[e], row[e], of_row);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < V; ++e) {
#pragma unroll
      for (int f = 0; f < kFields; ++f) parts[(e * kFields + f) * kMaxThreads + threadIdx.x] = reinterpret_cast<S*>(&sum[e])[f];
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < V; ++e) {
      Sum total;
      for (int d = 0; d < s.depth; ++d) {
        Sum part;
#pragma unroll
        for (int f = 0; f < kFields; ++f) reinterpret_cast<S*>(&part)[f] = parts[(e * kFields + f) * kMaxThreads + d * s.side + x];
        total.merge(part);
      }
      if (live && a.op.template needs<Sum>(row[e])) a.op.finish(row[e], total, here(r + e));
    }
    __syncthreads();
  }

  __device__ __forceinline__ void map(int64_t c, bool mine) {
    S of_column[kCols] = {};
    if (mine) {
      const Column here = column(c);
      T made[kOut][V];
#pragma unroll
      for (int e = 0; e < V; ++e) {
        In<Op, S> of_row = here.at(e);
        keep_again<S>(a.op, row[e], of_row);
        Out<Op, S> result;
        a.op.template map<T>(row[e], of_row, result);
#pragma unroll
        for (int i = 0; i < Op::out; ++i) made[i][e] = T(result.y[i]);
#pragma unroll
        for (int i = 0; i < Op::col_out; ++i) of_column[i] += result.col[i];
      }
#pragma unroll
      for (int i = 0; i < Op::out; ++i)
        if (out[i]) store<V>(out[i] + c * a.out[i].col, made[i]);
    }
#pragma unroll
    for (int i = 0; i < Op::col_out; ++i) {
      if (!a.col_out[i]) continue;
      for (int step = 1; step < s.side; step *= 2) of_column[i] += __shfl_xor_sync(~0u, of_column[i], step);
      if (x == 0 && c < a.extent.cols) partial(i)[c] += of_column[i];
    }
  }

  __device__ __forceinline__ S* partial(int i) const {
    return static_cast<S*>(a.partial) + (i * a.slices + blockIdx.x) * a.extent.cols;
  }
};

template <class Op>
class AnyRowsOnCuda {
  template <class F>
  static void with_program(const RowArgs<Op>& args, const F& f) {
    for_types<(Op::params > 0)>(args.rows, args.params, [&](auto t, auto p) {
      using Packed = AcrossCuda<Op, decltype(t), decltype(p), true>;
      using Single = AcrossCuda<Op, decltype(t), decltype(p), false>;
      Packed::fits(args) ? f(static_cast<Packed*>(nullptr)) : f(static_cast<Single*>(nullptr));
    });
  }

 public:
  static void launch(const RowArgs<Op>& args, void* stream) {
    if (along(args)) return RowsOnCuda<Op>::launch(args, stream);
    with_program(args, [&](auto* program) { std::remove_pointer_t<decltype(program)>::launch(args, stream); });
  }
  static int64_t slices(const RowArgs<Op>& args) {
    int64_t n = 0;
    if (along(args)) return RowsOnCuda<Op>::slices(args);
    with_program(args, [&](auto* program) {
      using Program = std::remove_pointer_t<decltype(program)>;
      n = Program::slices(Program::args(args));
    });
    return n;
  }
};

}  // namespace
}  // namespace fusegrad

#define FUSEGRAD_ANY_ROWS(Op)                                                                                                      \
  namespace fusegrad {                                                                                                             \
  template <>                                                                                                                      \
  const Kernel<RowArgs<Op>> Kernels<RowArgs<Op>, kCuda>::entry = {AnyRowsOnCuda<Op>::launch, AnyRowsOnCuda<Op>::slices};           \
  }
