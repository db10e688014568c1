// A norm of the sum of two rows, in one pass that stores the sum as well:
//
//   s = input + residual, rounded to the type of the rows      y = norm(s)
//
//   d input = d residual = ds + (the gradient of the norm at s for dy)
//
// The norm is that of the stored, rounded sum: all that the backward needs is saved with it, and nothing is lost on the way. Its
// formulas are those of the plain norms, whose backward kernels run as they are where the sum has no gradient of its own.
#pragma once

#include "layer_norm.h"
#include "rms_norm.h"

namespace fusegrad {

template <class Norm>
struct NormOfSum : Norm {
  enum { kInput, kResidual, kSum = Norm::out };

  template <class R, class At>
  FUSEGRAD_FN void begin(R& row, const At& at) const {
    struct SumAt : At {
      FUSEGRAD_FN auto x(int, int64_t c) const { return At::stored(At::x(kInput, c) + At::x(kResidual, c)); }
    };
    Norm::begin(row, SumAt{at});
  }
  template <class Sum, class R, class I>
  FUSEGRAD_FN void add(Sum& sum, const R& row, const I& in) const {
    Norm::add(sum, row, summed(in));
  }
  template <class T, class R, class I, class O>
  FUSEGRAD_FN void map(const R& row, const I& in, O& out) const {
    const auto sum = summed(in);
    auto y = one(out);
    Norm::template map<T>(row, sum, y);
    out.y[Norm::kY] = y.y[Norm::kY];
    out.y[kSum] = sum.x[Norm::kX];
  }

 private:
  template <class Op, class A, class T>
  FUSEGRAD_FN static In<Norm, A> summed(const InRows<Op, A, T>& in) {
    In<Norm, A> sum;
    sum.x[Norm::kX] = in.stored(in.x[kInput] + in.x[kResidual]);
    for (int i = 0; i < Norm::params; ++i) sum.p[i] = in.p[i];
    sum.col = in.col;
    return sum;
  }
  template <class Op, class A>
  FUSEGRAD_FN static Out<Norm, A> one(const Out<Op, A>&) {
    return {};
  }
};

// With the gradient that arrives at the sum itself.
template <class Norm>
struct NormOfSumBwd : Norm {
  enum { kDSum = Norm::in };

  template <class Sum, class R, class Op, class A>
  FUSEGRAD_FN void add(Sum& sum, const R& row, const In<Op, A>& in) const {
    Norm::add(sum, row, plain(in));
  }
  template <class T, class R, class Op, class A>
  FUSEGRAD_FN void map(const R& row, const In<Op, A>& in, Out<Op, A>& out) const {
    Out<Norm, A> d;
    Norm::template map<T>(row, plain(in), d);
    out.y[Norm::kDx] = d.y[Norm::kDx] + in.x[kDSum];
    for (int i = 0; i < Norm::col_out; ++i) out.col[i] = d.col[i];
  }

 private:
  template <class Op, class A>
  FUSEGRAD_FN static In<Norm, A> plain(const In<Op, A>& in) {
    In<Norm, A> of;
    for (int i = 0; i < Norm::in; ++i) of.x[i] = in.x[i];
    for (int i = 0; i < Norm::params; ++i) of.p[i] = in.p[i];
    of.col = in.col;
    return of;
  }
};

struct AddRMSNormFwd : NormOfSum<RMSNormFwd> {
  static constexpr int in = 2, params = 1, out = 2, scalar_out = 1;
};
struct AddRMSNormBwd : NormOfSumBwd<RMSNormBwd> {
  static constexpr int in = 3, params = 1, out = 1, col_out = 1, scalar_in = 1;
};
struct AddLayerNormFwd : NormOfSum<LayerNormFwd> {
  static constexpr int in = 2, params = 2, out = 2, scalar_out = 2;
};
struct AddLayerNormBwd : NormOfSumBwd<LayerNormBwd> {
  static constexpr int in = 3, params = 1, out = 1, col_out = 2, scalar_in = 2;
};

}  // namespace fusegrad
