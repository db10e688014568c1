// Layer norm over the n channels of each pixel (Ba et al. 2016, arXiv:1607.06450; of images as in ConvNeXt, arXiv:2201.03545): a
// row is a pixel, a column a channel.
//
//   mean = sum(x) / n     rstd = 1 / sqrt(sum((x - mean)^2) / n + eps)     h = (x - mean) rstd     y = h w + b
//
//   dx = rstd (dy w - sum(dy w) / n - h sum(dy w h) / n)     dw = sum over pixels of dy h     db = sum over pixels of dy
#pragma once

#include "moments.h"

namespace fusegrad {

struct LayerNorm2dFwd : RowOp {
  static constexpr int in = 1, params = 2, out = 1, scalar_out = 2;
  enum { kX, kW = 0, kB, kY = 0, kMean = 0, kRstd };
  double eps;
  bool shifted;  // by b

  template <class S>
  struct Row {
    S mean, rstd;
  };
  template <class A>
  struct Total {
    A x{0};
    FUSEGRAD_FN void merge(const Total& o) { x = x + o.x; }
  };
  template <class A>
  using Sweeps = List<Total<A>, Spread<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(Total<A>& sum, const R&, const In<LayerNorm2dFwd, A>& in) const {
    sum.x = sum.x + in.x[kX];
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Spread<A>& sum, const R& row, const In<LayerNorm2dFwd, A>& in) const {
    sum.add(in.x[kX], A(row.mean));
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Total<S>& sum, const At& at) const {
    row.mean = sum.x / S(at.args.extent.cols);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Spread<S>& sum, const At& at) const {
    const S n = S(at.args.extent.cols);
    row.rstd = rsqrt(sum.about(row.mean, n) / n + S(eps));
    at.put(kMean, row.mean);
    at.put(kRstd, row.rstd);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<LayerNorm2dFwd, A>& in, Out<LayerNorm2dFwd, A>& out) const {
    const A scaled = (in.x[kX] - A(row.mean)) * A(row.rstd) * in.p[kW];
    out.y[kY] = shifted ? scaled + in.p[kB] : scaled;
  }
};

struct LayerNorm2dBwd : RowOp {
  static constexpr int in = 2, params = 1, out = 1, col_out = 2, scalar_in = 2;
  enum { kX, kDy, kW = 0, kDx = 0, kDw = 0, kDb, kMean = 0, kRstd };

  template <class S>
  struct Row {
    S mean, rstd, g, gh;  // the means of g = dy w and of g h
  };
  template <class A>
  struct Dots {
    A g{0}, gh{0};
    FUSEGRAD_FN void merge(const Dots& o) { g = g + o.g, gh = gh + o.gh; }
  };
  template <class A>
  using Sweeps = List<Dots<A>>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.mean = at.scalar(kMean);
    row.rstd = at.scalar(kRstd);
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Dots<A>& sum, const R& row, const In<LayerNorm2dBwd, A>& in) const {
    const A g = in.x[kDy] * in.p[kW];
    sum.g = sum.g + g;
    sum.gh = fma(g, (in.x[kX] - A(row.mean)) * A(row.rstd), sum.gh);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Dots<S>& sum, const At& at) const {
    if (at.args.extent.cols == 1) row.rstd = S(0);  // what is its own mean has no gradient, not even a rounding error
    row.g = sum.g / S(at.args.extent.cols);
    row.gh = sum.gh / S(at.args.extent.cols);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<LayerNorm2dBwd, A>& in, Out<LayerNorm2dBwd, A>& out) const {
    const A h = (in.x[kX] - A(row.mean)) * A(row.rstd);
    out.y[kDx] = A(row.rstd) * (in.x[kDy] * in.p[kW] - A(row.g) - h * A(row.gh));
    out.col[kDw] = in.x[kDy] * h;
    out.col[kDb] = in.x[kDy];
  }
};

}  // namespace fusegrad
