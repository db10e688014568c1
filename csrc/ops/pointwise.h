// The smallest ops: one formula each way, and what it needs to be kept.
//
//   scale     y = a x           dx = a dy           nothing
//   exp       y = exp(x)        dx = dy y           the output
//   cube      y = x^3           dx = 3 x^2 dy       the input
//
// Gradient reversal (Ganin & Lempitsky 2014, arXiv:1409.7495) is the backward of scale under an identity.
#pragma once

#include "../core/row_op.h"
#include "activation.h"

namespace fusegrad {

struct ScaleFwd : MapOp {  // of x, and of dy
  static constexpr int in = 1, out = 1;
  double factor;

  template <class A>
  FUSEGRAD_FN void map(const In<ScaleFwd, A>& in, Out<ScaleFwd, A>& out) const {
    out.y[0] = in.x[0] * A(Scalar<A>(factor));
  }
};

template <Act act>
struct ValueOf : MapOp {
  static constexpr int in = 1, out = 1;

  template <class A>
  FUSEGRAD_FN void map(const In<ValueOf, A>& in, Out<ValueOf, A>& out) const {
    out.y[0] = Activation{act}.value(in.x[0]);
  }
};

template <Act act>
struct GradientAt : MapOp {
  static constexpr int in = 2, out = 1;
  enum { kDy, kSaved };

  template <class A>
  FUSEGRAD_FN void map(const In<GradientAt, A>& in, Out<GradientAt, A>& out) const {
    out.y[0] = Activation{act}.gradient(in.x[kDy], in.x[kSaved]);
  }
};

struct ExpBwd : MapOp {
  static constexpr int in = 2, out = 1;
  enum { kDy, kSaved };

  template <class A>
  FUSEGRAD_FN void map(const In<ExpBwd, A>& in, Out<ExpBwd, A>& out) const {
    out.y[0] = in.x[kDy] * in.x[kSaved];
  }
};

}  // namespace fusegrad
