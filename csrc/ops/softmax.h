// Softmax over a row of logits x, its logarithm, and softmax with a mask and a scale:
//
//   z = x                                     or      z = scale x + m,  -inf where masked out
//   top = max(z)     log_sum = log sum(exp(z - top))
//   p = exp(z - top) / sum(exp(z - top))      or      y = log p = (z - top) - log_sum
//
//   dx = scale p (dy - sum(p dy))             or      dx = dy - exp(y) sum(dy)
//
// The backward starts from the output. Only log_softmax of a 16-bit row keeps x, top and log_sum instead: of a logarithm that has
// been rounded to 8 bits little is left in exp(y). With a mask, a row without a z above -inf gives 0, and where p is 0 nothing is
// read from dy and nothing flows back; a NaN that is not masked out is kept.
#pragma once

#include "../core/row_op.h"

namespace fusegrad {

enum class SoftmaxKind : int8_t { plain, log, masked };
enum class Mask : int8_t { none, boolean /* true: masked out */, additive };

struct SoftmaxFwd : RowOp {
  static constexpr int in = 1, mixed = 1, out = 1, scalar_out = 2, kept = 1;
  static constexpr double absent = 0;
  enum { kX, kMask = 0, kY = 0, kTop = 0, kLogSum };
  SoftmaxKind kind;
  Mask mask;
  bool causal;
  int64_t queries;  // rows of a matrix of logits, if it is causal: the last one sees all columns
  double scale;

  template <class S>
  struct Row {
    int64_t end;  // of the columns that are seen
    S top, log_sum, inverse;
  };
  template <class A>
  struct Peak {
    A top{-std::numeric_limits<Scalar<A>>::infinity()};  // of the numbers: the sum of the row finds its NaN
    FUSEGRAD_FN void merge(const Peak& o) { top = larger_number(top, o.top); }
  };
  template <class A>
  struct Mass {
    A e{0};
    FUSEGRAD_FN void merge(const Mass& o) { e = e + o.e; }
  };
  template <class A>
  using Sweeps = List<Peak<A>, Mass<A>>;

  template <class A>
  FUSEGRAD_FN static A lowest() {
    return A(-std::numeric_limits<Scalar<A>>::infinity());
  }
  template <class A, class R>
  FUSEGRAD_FN A z(const R& row, const In<SoftmaxFwd, A>& in) const {
    if (kind != SoftmaxKind::masked) return in.x[kX];
    A z = in.x[kX] * A(Scalar<A>(scale));
    if (mask == Mask::boolean) z = select(in.m[kMask] != A(0), lowest<A>(), z);
    if (mask == Mask::additive) z = select(in.m[kMask] == lowest<A>(), lowest<A>(), z + in.m[kMask]);
    return causal ? select(in.before(row.end), z, lowest<A>()) : z;
  }

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.end = causal ? at.r % queries + at.args.extent.cols - queries + 1 : at.args.extent.cols;
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Peak<A>& sum, const R& row, const In<SoftmaxFwd, A>& in) const {
    sum.top = larger_number(sum.top, z(row, in));
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Peak<S>& sum, const At& at) const {
    row.top = kind == SoftmaxKind::masked && sum.top == lowest<S>() ? S(0) : sum.top;
    at.put(kTop, row.top);
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Mass<A>& sum, const R& row, In<SoftmaxFwd, A>& in) const {
    const A below = z(row, in) - A(row.top), e = exp(below);
    in.k[0] = kind == SoftmaxKind::log ? below : e;
    sum.e = sum.e + e;
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Mass<S>& sum, const At& at) const {
    row.inverse = S(1) / sum.e;
    if (kind != SoftmaxKind::log) return;  // a logarithm for each row was a tenth of the time with 64 columns
    row.log_sum = log(sum.e);
    at.put(kLogSum, row.log_sum);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<SoftmaxFwd, A>& in, Out<SoftmaxFwd, A>& out) const {
    if (kind == SoftmaxKind::log)
      out.y[kY] = in.k[0] - A(row.log_sum);
    else
      out.y[kY] = in.k[0] * A(row.inverse);
    if (kind == SoftmaxKind::masked) out.y[kY] = select(z(row, in) == lowest<A>(), A(0), out.y[kY]);
  }
};

struct SoftmaxBwd : RowOp {
  static constexpr int in = 2, out = 1, scalar_in = 2;
  enum { kSaved, kDy, kDx = 0, kTop = 0, kLogSum };
  SoftmaxKind kind;
  double scale;

  template <class S>
  struct Row {
    S top, log_sum;  // 0 if the output is what was saved
    S dot;
  };
  template <class A>
  struct Dot {
    A p_dy{0};  // for the logarithm, of dy alone
    FUSEGRAD_FN void merge(const Dot& o) { p_dy = p_dy + o.p_dy; }
  };
  template <class A>
  using Sweeps = List<Dot<A>>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.top = at.scalar(kTop), row.log_sum = at.scalar(kLogSum);
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Dot<A>& sum, const R&, const In<SoftmaxBwd, A>& in) const {
    const A p = in.x[kSaved], dy = in.x[kDy];
    if (kind == SoftmaxKind::log)
      sum.p_dy = sum.p_dy + dy;
    else
      sum.p_dy = fma(p, kind == SoftmaxKind::masked ? select(p == A(0), A(0), dy) : dy, sum.p_dy);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Dot<S>& sum, const At&) const {
    row.dot = sum.p_dy;
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<SoftmaxBwd, A>& in, Out<SoftmaxBwd, A>& out) const {
    const A saved = in.x[kSaved], dy = in.x[kDy];
    if (kind == SoftmaxKind::log) {
      out.y[kDx] = dy - exp((saved - A(row.top)) - A(row.log_sum)) * A(row.dot);
    } else {
      out.y[kDx] = A(Scalar<A>(scale)) * saved * (dy - A(row.dot));
      if (kind == SoftmaxKind::masked) out.y[kDx] = select(saved == A(0), A(0), out.y[kDx]);
    }
  }
};

}  // namespace fusegrad
