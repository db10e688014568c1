// x, let through where z is about 0, element by element:
//
//   q = exp(-a z^2)      y = x q      dx = dy q      dz = -2 a z dy x q
#pragma once

#include <fusegrad.h>

namespace fusegrad {

struct GaussianGateFwd : MapOp {
  static constexpr int in = 2, out = 1;
  enum { kX, kZ, kY = 0 };
  double sharpness;

  template <class A>
  FUSEGRAD_FN void map(const In<GaussianGateFwd, A>& in, Out<GaussianGateFwd, A>& out) const {
    out.y[kY] = in.x[kX] * exp(A(Scalar<A>(-sharpness)) * square(in.x[kZ]));
  }
};

struct GaussianGateBwd : MapOp {
  static constexpr int in = 3, out = 2;
  enum { kX, kZ, kDy, kDx = 0, kDz };
  double sharpness;

  template <class A>
  FUSEGRAD_FN void map(const In<GaussianGateBwd, A>& in, Out<GaussianGateBwd, A>& out) const {
    const A a = A(Scalar<A>(sharpness)), q = exp(A(0) - a * square(in.x[kZ]));
    out.y[kDx] = in.x[kDy] * q;
    out.y[kDz] = in.x[kDy] * in.x[kX] * q * (A(-2) * a * in.x[kZ]);
  }
};

}  // namespace fusegrad
