// Layer norm over a row of n columns (Ba et al. 2016, arXiv:1607.06450), or over the n channels of a pixel, with w = 1 and b = 0
// where they are not given:
//
//   mean = x_0 + sum(x - x_0) / n      d = x - mean      c = sum(d) / n      h = (d - c) rstd      y = h w + b
//   rstd = 1 / sqrt(sum(d^2) / n - c^2 + eps)
//
//   dx = rstd (dy w - sum(dy w) / n - h sum(dy w h) / n)      dw = sum over rows of dy h      db = sum over rows of dy
//
// c is what the mean lost when it was rounded (and so of the order of its last digit: c^2 takes nothing from the sum of squares).
// Where the mean is large beside the spread, d is exact and c matters: with it all digits that x has are kept. The backward finds
// c rstd, as the mean of d rstd, by the sweep that it has to make.
#pragma once

#include "moments.h"

namespace fusegrad {

struct LayerNormFwd : RowOp {
  static constexpr int in = 1, params = 2, out = 1, scalar_out = 2;
  enum { kX, kW = 0, kB, kY = 0, kMean = 0, kRstd };
  double eps;
  bool shift;  // there is a b

  template <class S>
  struct Row {
    S first, mean, lost, rstd;
  };
  template <class A>
  struct Total {
    A x{0};
    FUSEGRAD_FN void merge(const Total& o) { x = x + o.x; }
  };
  template <class A>
  using Sweeps = List<Total<A>, Spread<A>>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.first = at.args.extent.cols > 0 ? at.x(kX, 0) : S(0);
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Total<A>& sum, const R& row, const In<LayerNormFwd, A>& in) const {
    sum.x = sum.x + (in.x[kX] - A(row.first));
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Total<S>& sum, const At& at) const {
    row.mean = row.first + sum.x / S(at.args.extent.cols);
    at.put(kMean, row.mean);
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Spread<A>& sum, const R& row, const In<LayerNormFwd, A>& in) const {
    sum.add(in.x[kX], A(row.mean));
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Spread<S>& sum, const At& at) const {
    const S n = S(at.args.extent.cols), square = sum.dd / n;
    row.lost = sum.d / n;
    const S var = square - row.lost * row.lost;
    // The sum of squares may overflow to infinity, which c^2 must not turn to NaN.
    row.rstd = rsqrt((square > std::numeric_limits<S>::max() ? square : larger(var, S(0))) + S(eps));
    at.put(kRstd, row.rstd);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<LayerNormFwd, A>& in, Out<LayerNormFwd, A>& out) const {
    const A h = ((in.x[kX] - A(row.mean)) - A(row.lost)) * A(row.rstd);
    out.y[kY] = fma(h, in.p[kW], shift ? in.p[kB] : A(0));
  }
};

struct LayerNormBwd : RowOp {
  static constexpr int in = 2, params = 1, out = 1, col_out = 2, scalar_in = 2;
  enum { kX, kDy, kW = 0, kDx = 0, kDw = 0, kDb, kMean = 0, kRstd };

  template <class S>
  struct Row {
    S mean, rstd;
    S h, dyw, dyw_h;  // means, the first one of d rstd
    S of_dx;          // rstd, but 0 for a single column: exactly no derivative, where rstd would raise a rounding to a number

    template <class A>
    FUSEGRAD_FN A h_of(A x) const {
      return (x - A(mean)) * A(rstd);
    }
  };
  template <class A>
  struct Dots {
    A h{0}, dyw{0}, dyw_h{0};
    FUSEGRAD_FN void merge(const Dots& o) { h = h + o.h, dyw = dyw + o.dyw, dyw_h = dyw_h + o.dyw_h; }
  };
  template <class A>
  using Sweeps = List<Dots<A>>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.mean = at.scalar(kMean);
    row.rstd = at.scalar(kRstd);
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Dots<A>& sum, const R& row, const In<LayerNormBwd, A>& in) const {
    const A dyw = in.x[kDy] * in.p[kW], h = row.h_of(in.x[kX]);
    sum.h = sum.h + h;
    sum.dyw = sum.dyw + dyw;
    sum.dyw_h = fma(dyw, h, sum.dyw_h);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Dots<S>& sum, const At& at) const {
    const S n = S(at.args.extent.cols);
    row.h = sum.h / n;
    row.dyw = sum.dyw / n;
    row.dyw_h = sum.dyw_h / n - row.h * row.dyw;
    row.of_dx = at.args.extent.cols == 1 ? S(0) : row.rstd;
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<LayerNormBwd, A>& in, Out<LayerNormBwd, A>& out) const {
    const A h = row.h_of(in.x[kX]) - A(row.h);
    out.y[kDx] = (in.x[kDy] * in.p[kW] - A(row.dyw) - h * A(row.dyw_h)) * A(row.of_dx);
    out.col[kDw] = in.x[kDy] * h;
    out.col[kDb] = in.x[kDy];
  }
};

}  // namespace fusegrad
