// Layer norm over a row of n columns (Ba et al. 2016, arXiv:1607.06450), with w = 1 and b = 0 where they are not given. It does not
// see a shift of the row, so the row is taken relative to its first element: where the mean is large beside the spread that
// subtraction is exact, and all digits of the spread are kept.
//
//   mean = sum(x - x_0) / n      d = (x - x_0) - mean      rstd = 1 / sqrt(sum(d^2) / n + eps)      h = d rstd      y = h w + b
//
//   dx = rstd (dy w - sum(dy w) / n - h sum(dy w h) / n)      dw = sum over rows of dy h      db = sum over rows of dy
#pragma once

#include "../core/row_op.h"

namespace fusegrad {

// What is known of a row: its first element, and the mean relative to it.
template <class S>
struct Center {
  S first, mean, rstd;

  template <class A>
  FUSEGRAD_FN A deviation(A x) const {
    return (x - A(first)) - A(mean);
  }
};

struct LayerNormFwd : RowOp {
  static constexpr int in = 1, params = 2, out = 1, scalar_out = 2;
  enum { kX, kW = 0, kB, kY = 0, kMean = 0, kRstd };
  double eps;
  bool shift;  // there is a b

  template <class S>
  using Row = Center<S>;
  template <class A>
  struct Total {
    A x{0};
    FUSEGRAD_FN void merge(const Total& o) { x = x + o.x; }
  };
  template <class A>
  struct Spread {
    A dd{0};
    FUSEGRAD_FN void merge(const Spread& o) { dd = dd + o.dd; }
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
    row.mean = sum.x / S(at.args.extent.cols);
    at.put(kMean, row.mean);
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Spread<A>& sum, const R& row, const In<LayerNormFwd, A>& in) const {
    const A d = row.deviation(in.x[kX]);
    sum.dd = fma(d, d, sum.dd);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Spread<S>& sum, const At& at) const {
    row.rstd = rsqrt(sum.dd / S(at.args.extent.cols) + S(eps));
    at.put(kRstd, row.rstd);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<LayerNormFwd, A>& in, Out<LayerNormFwd, A>& out) const {
    const A h = row.deviation(in.x[kX]) * A(row.rstd);
    out.y[kY] = fma(h, in.p[kW], shift ? in.p[kB] : A(0));
  }
};

struct LayerNormBwd : RowOp {
  static constexpr int in = 2, params = 1, out = 1, col_out = 2, scalar_in = 2;
  enum { kX, kDy, kW = 0, kDx = 0, kDw = 0, kDb, kMean = 0, kRstd };

  template <class S>
  struct Row : Center<S> {
    S dyw, dyw_h;  // means

    template <class A>
    FUSEGRAD_FN A h(A x) const {
      return this->deviation(x) * A(this->rstd);
    }
  };
  template <class A>
  struct Dots {
    A dyw{0}, dyw_h{0};
    FUSEGRAD_FN void merge(const Dots& o) { dyw = dyw + o.dyw, dyw_h = dyw_h + o.dyw_h; }
  };
  template <class A>
  using Sweeps = List<Dots<A>>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.first = at.args.extent.cols > 0 ? at.x(kX, 0) : S(0);
    row.mean = at.scalar(kMean);
    row.rstd = at.scalar(kRstd);
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Dots<A>& sum, const R& row, const In<LayerNormBwd, A>& in) const {
    const A dyw = in.x[kDy] * in.p[kW];
    sum.dyw = sum.dyw + dyw;
    sum.dyw_h = fma(dyw, row.h(in.x[kX]), sum.dyw_h);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Dots<S>& sum, const At& at) const {
    row.dyw = sum.dyw / S(at.args.extent.cols);
    row.dyw_h = sum.dyw_h / S(at.args.extent.cols);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<LayerNormBwd, A>& in, Out<LayerNormBwd, A>& out) const {
    const A h = row.h(in.x[kX]);
    out.y[kDx] = (in.x[kDy] * in.p[kW] - A(row.dyw) - h * A(row.dyw_h)) * A(row.rstd);
    out.col[kDw] = in.x[kDy] * h;
    out.col[kDb] = in.x[kDy];
  }
};

}  // namespace fusegrad
