// y = scale act(z) with z = x + b, where a bias belongs to a column or to a row:
//
//   dx = dy scale act'(z)      db = sum of dx over all that shares the bias
//
// z is computed again in the backward. Formulas of the activations: activation.h.
#pragma once

#include "../core/row_op.h"
#include "activation.h"

namespace fusegrad {
namespace {

// Sixteen activations inlined at each place of use are minutes of compilation, so that on the CPU there is one copy for each type
// of vector. A GPU has no cheap calls.
#if defined(__CUDACC__)
#define FUSEGRAD_OUTLINE FUSEGRAD_FN
#else
#define FUSEGRAD_OUTLINE __attribute__((noinline))
#endif
template <class A>
FUSEGRAD_OUTLINE A value_of(const Activation& act, A z) {
  return act.value(z);
}
template <class A>
FUSEGRAD_OUTLINE A gradient_of(const Activation& act, A dy, A z) {
  return act.gradient(dy, z);
}

}  // namespace

struct ScaledAct {
  Activation act;
  double scale;

  template <class A>
  FUSEGRAD_FN A value(A z) const {
    return value_of(act, z) * A(Scalar<A>(scale));
  }
  template <class A>
  FUSEGRAD_FN A gradient(A dy, A z) const {
    return gradient_of(act, dy * A(Scalar<A>(scale)), z);
  }
};

// Without a bias.
struct ActFwd : MapOp {
  static constexpr int in = 1, out = 1;
  enum { kX, kY = 0 };
  ScaledAct f;

  template <class A>
  FUSEGRAD_FN void map(const In<ActFwd, A>& in, Out<ActFwd, A>& out) const {
    out.y[kY] = f.value(in.x[kX]);
  }
};

struct ActBwd : MapOp {
  static constexpr int in = 2, out = 1;
  enum { kX, kDy, kDx = 0 };
  ScaledAct f;

  template <class A>
  FUSEGRAD_FN void map(const In<ActBwd, A>& in, Out<ActBwd, A>& out) const {
    out.y[kDx] = f.gradient(in.x[kDy], in.x[kX]);
  }
};

// The bias is a parameter (one value per column) or a scalar of the row; what is not given is 0.
struct Biased : RowOp {
  static constexpr int params = 1, scalar_in = 1;
  static constexpr double absent = 0;
  enum { kB, kRowB = 0 };
  ScaledAct f;

  template <class S>
  struct Row {
    S b;
  };
  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.b = at.scalar(kRowB);
  }
  template <class R, class In>
  FUSEGRAD_FN auto z(const R& row, const In& in) const {
    return in.x[0] + (in.p[kB] + std::decay_t<decltype(in.p[kB])>(row.b));
  }
};

struct BiasActFwd : Biased {
  static constexpr int in = 1, out = 1;
  enum { kX, kY = 0 };
  template <class A>
  using Sweeps = List<>;

  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<BiasActFwd, A>& in, Out<BiasActFwd, A>& out) const {
    out.y[kY] = f.value(z(row, in));
  }
};

struct BiasActBwd : Biased {
  static constexpr int in = 2, out = 1, col_out = 1;
  enum { kX, kDy, kDx = 0, kDb = 0 };
  template <class A>
  using Sweeps = List<>;

  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<BiasActBwd, A>& in, Out<BiasActBwd, A>& out) const {
    out.y[kDx] = out.col[kDb] = f.gradient(in.x[kDy], z(row, in));
  }
};

// The same with the sum over each row, for a bias that belongs to rows.
struct RowBiasActBwd : Biased {
  static constexpr int in = 2, out = 1, scalar_out = 1;
  enum { kX, kDy, kDx = 0, kDb = 0 };

  template <class A>
  struct Sum {
    A dx{0};
    FUSEGRAD_FN void merge(const Sum& o) { dx = dx + o.dx; }
  };
  template <class A>
  using Sweeps = List<Sum<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(Sum<A>& sum, const R& row, const In<RowBiasActBwd, A>& in) const {
    sum.dx = sum.dx + f.gradient(in.x[kDy], z(row, in));
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>&, const Sum<S>& sum, const At& at) const {
    at.put(kDb, sum.dx);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<RowBiasActBwd, A>& in, Out<RowBiasActBwd, A>& out) const {
    out.y[kDx] = f.gradient(in.x[kDy], z(row, in));
  }
};

}  // namespace fusegrad
