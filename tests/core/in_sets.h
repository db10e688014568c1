// A row op for the drivers' tests alone: parameters and sums over the rows that come in sets, and values that the sweep leaves for
// the map. The product's op of that kind has every activation in it, which takes a sanitizing compiler half an hour.
#pragma once

#include "../../csrc/core/row_op.h"

namespace fusegrad {

struct InSets : RowOp {
  static constexpr int in = 2, params = 2, out = 1, col_out = 2, wide_cols = 2, scalar_in = 1, kept = 1, packs = 1;
  static constexpr bool in_sets = true;

  template <class S>
  struct Row {
    S scale, mean, product;
  };
  template <class A>
  struct Sums {
    A value{0}, product{0};
    FUSEGRAD_FN void merge(const Sums& o) { value = value + o.value, product = product + o.product; }
  };
  template <class A>
  using Sweeps = List<Sums<A>>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.scale = at.scalar(0);
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Sums<A>& sum, const R&, In<InSets, A>& in) const {
    in.k[0] = fma(in.x[0], in.p[0], in.p[1]);
    sum.value = sum.value + in.k[0];
    sum.product = fma(in.k[0], in.x[1], sum.product);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Sums<S>& sum, const At& at) const {
    row.mean = sum.value / S(at.args.extent.cols);
    row.product = sum.product / S(at.args.extent.cols);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<InSets, A>& in, Out<InSets, A>& out) const {
    out.y[0] = (in.k[0] - A(row.mean)) * A(row.scale) + in.x[1] * A(row.product);
    out.col[0] = in.k[0] * in.x[1];
    out.col[1] = in.k[0];
  }
};

}  // namespace fusegrad
