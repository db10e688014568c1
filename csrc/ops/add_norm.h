// A norm of the sum of two rows, in one pass that stores the sum as well, with m the factors of a dropout, or 1:
//
//   s = input m + residual, rounded to the type of the rows      y = norm(s)
//
//   dresidual = ds + (the gradient of the norm at s for dy)      dinput = dresidual m
//
// The norm is that of the stored, rounded sum: all that the backward needs is saved with it, and nothing is lost on the way. Its
// formulas are those of the plain norms, whose backward kernels run as they are where nothing is dropped and the sum has no
// gradient of its own.
#pragma once

#include "dropout.h"
#include "layer_norm.h"
#include "rms_norm.h"

namespace fusegrad {

// What a plain norm makes of a column, or of a vector of columns.
template <class Norm, class Op, class A>
FUSEGRAD_FN In<Norm, A> plain(const In<Op, A>& in) {
  In<Norm, A> of;
  for (int i = 0; i < Norm::in; ++i) of.x[i] = in.x[i];
  for (int i = 0; i < Norm::params; ++i) of.p[i] = in.p[i];
  of.col = in.col;
  return of;
}

template <class Norm>
struct NormOfSum : Norm {
  enum { kInput, kResidual, kSum = Norm::out };
  bool drops;
  Dropout dropout;

  template <class S>
  struct Row : Norm::template Row<S> {
    DroppedRow dropped;
  };

  template <class R, class At>
  FUSEGRAD_FN void begin(R& row, const At& at) const {
    if (drops) row.dropped.begin(dropout, at);
    struct SumAt : At {
      const NormOfSum& op;
      const R& row;
      FUSEGRAD_FN auto x(int, int64_t c) const { return At::stored(op.sum(row, At::x(kInput, c), At::x(kResidual, c), c)); }
    };
    Norm::begin(row, SumAt{at, *this, row});
  }
  template <class Sum, class R, class Op, class A, class T>
  FUSEGRAD_FN void add(Sum& sum, const R& row, const InRows<Op, A, T>& in) const {
    Norm::add(sum, row, summed(row, in));
  }
  template <class T, class R, class Op, class A>
  FUSEGRAD_FN void map(const R& row, const InRows<Op, A, T>& in, Out<Op, A>& out) const {
    const In<Norm, A> of = summed(row, in);
    Out<Norm, A> normed;
    Norm::template map<T>(row, of, normed);
    out.y[Norm::kY] = normed.y[Norm::kY];
    out.y[kSum] = of.x[Norm::kX];
  }

 private:
  template <class R, class A>
  FUSEGRAD_FN A sum(const R& row, A x, A residual, int64_t col) const {
    return (drops ? x * row.dropped.template factor<A>(col) : x) + residual;
  }
  template <class R, class Op, class A, class T>
  FUSEGRAD_FN In<Norm, A> summed(const R& row, const InRows<Op, A, T>& in) const {
    In<Norm, A> of = plain<Norm>(in);
    of.x[Norm::kX] = in.stored(sum(row, in.x[kInput], in.x[kResidual], in.col));
    return of;
  }
};

template <class Norm>
struct NormOfSumBwd : Norm {
  enum { kDSum = Norm::in, kDResidual = Norm::kDx, kDInput = Norm::out };
  bool with_dsum, drops;
  Dropout dropout;

  template <class S>
  struct Row : Norm::template Row<S> {
    DroppedRow dropped;
  };

  template <class R, class At>
  FUSEGRAD_FN void begin(R& row, const At& at) const {
    if (drops) row.dropped.begin(dropout, at);
    Norm::begin(row, at);
  }
  template <class Sum, class R, class Op, class A>
  FUSEGRAD_FN void add(Sum& sum, const R& row, const In<Op, A>& in) const {
    Norm::add(sum, row, plain<Norm>(in));
  }
  template <class T, class R, class Op, class A>
  FUSEGRAD_FN void map(const R& row, const In<Op, A>& in, Out<Op, A>& out) const {
    Out<Norm, A> d;
    Norm::template map<T>(row, plain<Norm>(in), d);
    const A ds = d.y[Norm::kDx] + (with_dsum ? in.x[kDSum] : A(0));
    out.y[kDResidual] = ds;
    out.y[kDInput] = drops ? ds * row.dropped.template factor<A>(in.col) : ds;
    for (int i = 0; i < Norm::col_out; ++i) out.col[i] = d.col[i];
  }
};

struct AddRMSNormFwd : NormOfSum<RMSNormFwd> {
  static constexpr int in = 2, params = 1, out = 2, scalar_out = 1;
};
struct AddRMSNormBwd : NormOfSumBwd<RMSNormBwd> {
  static constexpr int in = 3, params = 1, out = 2, col_out = 1, scalar_in = 1, packs = 2;
};
struct AddLayerNormFwd : NormOfSum<LayerNormFwd> {
  static constexpr int in = 2, params = 2, out = 2, scalar_out = 2;
};
struct AddLayerNormBwd : NormOfSumBwd<LayerNormBwd> {
  static constexpr int in = 3, params = 1, out = 2, col_out = 2, scalar_in = 2, packs = 1;
};

}  // namespace fusegrad
