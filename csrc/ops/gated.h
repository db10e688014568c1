// Gated linear units (Dauphin et al. 2016, arXiv:1612.08083; Shazeer 2020, arXiv:2002.05202), element by element:
//
//   y = act(g) u      dg = dy u act'(g)      du = dy act(g)
//
// The activation is part of the type: chosen by number in the loop, it would cost more than the arithmetic of the cheap ones.
#pragma once

#include "../core/row_op.h"
#include "activation.h"

namespace fusegrad {

template <Act act>
struct GatedFwd : MapOp {
  static constexpr int in = 2, out = 1;
  enum { kG, kU, kY = 0 };

  template <class A>
  FUSEGRAD_FN void map(const In<GatedFwd, A>& in, Out<GatedFwd, A>& out) const {
    out.y[kY] = Activation{act}.value(in.x[kG]) * in.x[kU];
  }
};

template <Act act>
struct GatedBwd : MapOp {
  static constexpr int in = 3, out = 2;
  enum { kG, kU, kDy, kDg = 0, kDu = 1 };

  template <class A>
  FUSEGRAD_FN void map(const In<GatedBwd, A>& in, Out<GatedBwd, A>& out) const {
    constexpr Activation f{act};
    const A g = in.x[kG], dyu = in.x[kDy] * in.x[kU];
    A y, slope;
    f.both(g, y, slope);
    out.y[kDg] = act == Act::relu ? f.gradient(dyu, g) : dyu * slope;
    out.y[kDu] = in.x[kDy] * y;
  }
};

}  // namespace fusegrad
