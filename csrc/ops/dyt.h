// Dynamic tanh (Zhu et al. 2025, arXiv:2503.10622), element by element, with one alpha for all of them, and w = 1 and b = 0 where
// they are not given:
//
//   t = tanh(alpha x)      y = t w + b
//
//   s = dy w (1 - t^2)     dx = s alpha     dalpha = sum of s x     dw = sum over rows of dy t     db = sum over rows of dy
//
// The sum for alpha is taken over the rows first, like those for w and b, and then over the columns.
#pragma once

#include "../core/row_op.h"

namespace fusegrad {

struct DyTFwd : RowOp {
  static constexpr int in = 1, params = 2, out = 1, scalar_in = 1;
  enum { kX, kW = 0, kB, kY = 0, kAlpha = 0 };
  bool shift;  // there is a b

  template <class S>
  struct Row {
    S alpha;
  };
  template <class A>
  using Sweeps = List<>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.alpha = at.scalar(kAlpha);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<DyTFwd, A>& in, Out<DyTFwd, A>& out) const {
    out.y[kY] = fma(tanh(A(row.alpha) * in.x[kX]), in.p[kW], shift ? in.p[kB] : A(0));
  }
};

struct DyTBwd : RowOp {
  static constexpr int in = 2, params = 1, out = 1, col_out = 3, wide_cols = 1, scalar_in = 1, packs = 1;
  enum { kX, kDy, kW = 0, kDx = 0, kDw = 0, kDb, kDAlpha, kAlpha = 0 };

  template <class S>
  using Row = DyTFwd::Row<S>;
  template <class A>
  using Sweeps = List<>;

  template <class S, class At>
  FUSEGRAD_FN void begin(DyTFwd::Row<S>& row, const At& at) const {
    row.alpha = at.scalar(kAlpha);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<DyTBwd, A>& in, Out<DyTBwd, A>& out) const {
    const A t = tanh(A(row.alpha) * in.x[kX]), s = in.x[kDy] * in.p[kW] * (A(1) - t * t);
    out.y[kDx] = s * A(row.alpha);
    out.col[kDw] = in.x[kDy] * t;
    out.col[kDb] = in.x[kDy];
    out.col[kDAlpha] = s * in.x[kX];
  }
};

}  // namespace fusegrad
