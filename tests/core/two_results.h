// A map op for the drivers' tests alone: three inputs and two results. The product's ops of that kind have every activation in
// them, which takes a sanitizing compiler minutes.
#pragma once

#include "../../csrc/core/row_op.h"

namespace fusegrad {

struct TwoResults : MapOp {
  static constexpr int in = 3, out = 2;

  template <class A>
  FUSEGRAD_FN void map(const In<TwoResults, A>& in, Out<TwoResults, A>& out) const {
    out.y[0] = in.x[0] * in.x[1];
    out.y[1] = fma(in.x[1], in.x[2], in.x[0]);
  }
};

}  // namespace fusegrad
