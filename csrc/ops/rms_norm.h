// RMS norm over a row of n columns (Zhang & Sennrich 2019, arXiv:1910.07467), with v = w + offset, or v = 1 without a weight:
//
//   rstd = 1 / sqrt(sum(x^2) / n + eps)      y = x rstd v
//
//   dx = rstd (dy v) - x rstd^3 sum(x dy v) / n      dw = sum over rows of dy x rstd
//
// cast_first: x rstd is rounded to the type of the rows before it meets v, as Llama's own code does. The derivatives take the
// rounding for the identity.
#pragma once

#include "../core/row_op.h"

namespace fusegrad {

struct RMSNormFwd : RowOp {
  static constexpr int in = 1, params = 1, out = 1, scalar_out = 1;
  enum { kX, kW = 0, kY = 0, kRstd = 0 };
  double eps, offset;
  bool cast_first;

  template <class S>
  struct Row {
    S rstd;
  };
  template <class A>
  struct Power {
    A xx{0};
    FUSEGRAD_FN void merge(const Power& o) { xx = xx + o.xx; }
  };
  template <class A>
  using Sweeps = List<Power<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(Power<A>& sum, const R&, const In<RMSNormFwd, A>& in) const {
    sum.xx = fma(in.x[kX], in.x[kX], sum.xx);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Power<S>& sum, const At& at) const {
    row.rstd = rsqrt(sum.xx / S(at.args.extent.cols) + S(eps));
    at.put(kRstd, row.rstd);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<RMSNormFwd, A>& in, Out<RMSNormFwd, A>& out) const {
    const A normed = in.x[kX] * A(row.rstd);
    out.y[kY] = (cast_first ? rounded<T>(normed) : normed) * (in.p[kW] + A(Scalar<A>(offset)));
  }
};

struct RMSNormBwd : RowOp {
  static constexpr int in = 2, params = 1, out = 1, col_out = 1, scalar_in = 1;
  enum { kX, kDy, kW = 0, kDx = 0, kDw = 0, kRstd = 0 };
  double offset;

  template <class S>
  struct Row {
    S rstd, projection;  // sum(x dy v) rstd^3 / n
  };
  template <class A>
  struct Dot {
    A x_dyv{0};
    FUSEGRAD_FN void merge(const Dot& o) { x_dyv = x_dyv + o.x_dyv; }
  };
  template <class A>
  using Sweeps = List<Dot<A>>;

  template <class A>
  FUSEGRAD_FN A dyv(const In<RMSNormBwd, A>& in) const {
    return in.x[kDy] * (in.p[kW] + A(Scalar<A>(offset)));
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Dot<A>& sum, const R&, const In<RMSNormBwd, A>& in) const {
    sum.x_dyv = fma(in.x[kX], dyv(in), sum.x_dyv);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Dot<S>& sum, const At& at) const {
    row.rstd = at.scalar(kRstd);
    // In this order, so that no power of rstd over- or underflows on the way.
    row.projection = sum.x_dyv * row.rstd / S(at.args.extent.cols) * row.rstd * row.rstd;
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<RMSNormBwd, A>& in, Out<RMSNormBwd, A>& out) const {
    out.y[kDx] = dyv(in) * A(row.rstd) - in.x[kX] * A(row.projection);
    out.col[kDw] = in.x[kDy] * (in.x[kX] * A(row.rstd));
  }
};

}  // namespace fusegrad
