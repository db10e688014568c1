// RMS norm over a row of n columns, then a gate (as in Mamba 2), with r = 1 / sqrt(sum(x^2) / n + eps) and s = sigmoid(z):
//
//   y = x r w z s
//
//   g = dy w z s      dx = r g - x r^3 sum(x g) / n      dz = dy x r w s (1 + z (1 - s))      dw = sum over rows of dy x r z s
#pragma once

#include <fusegrad.h>

namespace fusegrad {

struct GatedRmsNormFwd : RowOp {
  static constexpr int in = 2, params = 1, out = 1, scalar_out = 1;
  enum { kX, kZ, kW = 0, kY = 0, kR = 0 };
  double eps;

  template <class S>
  struct Row {
    S r;
  };
  template <class A>
  struct Power {
    A xx{0};
    FUSEGRAD_FN void merge(const Power& o) { xx = xx + o.xx; }
  };
  template <class A>
  using Sweeps = List<Power<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(Power<A>& sum, const R&, const In<GatedRmsNormFwd, A>& in) const {
    sum.xx = fma(in.x[kX], in.x[kX], sum.xx);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Power<S>& sum, const At& at) const {
    row.r = rsqrt(sum.xx / S(at.args.extent.cols) + S(eps));
    at.put(kR, row.r);  // kept for the backward
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<GatedRmsNormFwd, A>& in, Out<GatedRmsNormFwd, A>& out) const {
    out.y[kY] = in.x[kX] * A(row.r) * in.p[kW] * (in.x[kZ] * sigmoid(in.x[kZ]));
  }
};

struct GatedRmsNormBwd : RowOp {
  static constexpr int in = 3, params = 1, out = 2, col_out = 1, scalar_in = 1;
  enum { kX, kZ, kDy, kW = 0, kDx = 0, kDz, kDw = 0, kR = 0 };
  double eps;

  template <class S>
  struct Row {
    S r, projection;  // r^3 sum(x g) / n
  };
  template <class A>
  struct Dot {
    A xg{0};
    FUSEGRAD_FN void merge(const Dot& o) { xg = xg + o.xg; }
  };
  template <class A>
  using Sweeps = List<Dot<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(Dot<A>& sum, const R&, const In<GatedRmsNormBwd, A>& in) const {
    sum.xg = fma(in.x[kX], in.x[kDy] * in.p[kW] * (in.x[kZ] * sigmoid(in.x[kZ])), sum.xg);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Dot<S>& sum, const At& at) const {
    row.r = at.scalar(kR);
    row.projection = sum.xg * row.r / S(at.args.extent.cols) * row.r * row.r;
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<GatedRmsNormBwd, A>& in, Out<GatedRmsNormBwd, A>& out) const {
    const A s = sigmoid(in.x[kZ]), gate = in.x[kZ] * s, normed = in.x[kX] * A(row.r), dyw = in.x[kDy] * in.p[kW];
    out.y[kDx] = dyw * gate * A(row.r) - in.x[kX] * A(row.projection);
    out.y[kDz] = dyw * normed * (s * (A(1) + in.x[kZ] * (A(1) - s)));
    out.col[kDw] = in.x[kDy] * normed * gate;
  }
};

}  // namespace fusegrad
