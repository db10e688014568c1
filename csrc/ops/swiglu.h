// SwiGLU (Shazeer 2020, arXiv:2002.05202), element by element, with s = 1 / (1 + exp(-g)):
//
//   y = g s u      dg = dy u s (1 + g (1 - s))      du = dy g s
#pragma once

#include "../core/row_op.h"

namespace fusegrad {

struct SwiGLUFwd : MapOp {
  static constexpr int in = 2, out = 1;
  enum { kG, kU, kY = 0 };

  template <class A>
  FUSEGRAD_FN void map(const In<SwiGLUFwd, A>& in, Out<SwiGLUFwd, A>& out) const {
    out.y[kY] = in.x[kG] * sigmoid(in.x[kG]) * in.x[kU];
  }
};

struct SwiGLUBwd : MapOp {
  static constexpr int in = 3, out = 2;
  enum { kG, kU, kDy, kDg = 0, kDu = 1 };

  template <class A>
  FUSEGRAD_FN void map(const In<SwiGLUBwd, A>& in, Out<SwiGLUBwd, A>& out) const {
    const A g = in.x[kG], s = sigmoid(g), dys = in.x[kDy] * s;
    out.y[kDg] = dys * in.x[kU] * fma(g, A(1) - s, A(1));
    out.y[kDu] = dys * g;
  }
};

}  // namespace fusegrad
