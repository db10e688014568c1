// Group norm (Wu & He 2018, arXiv:1803.08494) and batch norm (Ioffe & Szegedy 2015, arXiv:1502.03167): the statistics are of a set
// of m elements, which are those of a sample's group of channels, or those of a channel in all samples. With w and b of the
// channel, r a residual or 0, and f an activation:
//
//   mean = sum(x) / m     var = sum((x - mean)^2) / m     rstd = 1 / sqrt(var + eps)     h = ((x - mean) - lost) rstd
//   z = h w + b + r       y = f(z)
//
//   dz = dy f'(z)     dr = dz     dw = sum over the channel of dz h     db = sum over the channel of dz
//   dx = rstd (w dz - sum over the set of (w dz) / m - h sum over the set of (w dz h) / m)
//
// without the two sums where the statistics are constants; lost is what the mean lost when it was rounded. A set and a channel need
// not be what a driver can walk as a row, so sums are taken in two steps: of cells, parts of one channel in one sample or in many,
// and of the cells. Where groups are short rows, one walk does it all.
#pragma once

#include "activation.h"
#include "moments.h"

namespace fusegrad {

// The sweeps for the mean of the first input, and for its spread, which the op finishes.
struct Moments : RowOp {
  template <class A>
  struct Total {
    A x{0};
    FUSEGRAD_FN void merge(const Total& o) { x = x + o.x; }
  };
  template <class A>
  using Sweeps = List<Total<A>, Spread<A>>;

  template <class A, class R, class In>
  FUSEGRAD_FN void add(Total<A>& sum, const R&, const In& in) const {
    sum.x = sum.x + in.x[0];
  }
  template <class A, class R, class In>
  FUSEGRAD_FN void add(Spread<A>& sum, const R& row, const In& in) const {
    sum.add(in.x[0], A(row.mean));
  }
  template <class R, class S, class At>
  FUSEGRAD_FN void finish(R& row, const Total<S>& sum, const At& at) const {
    row.mean = sum.x / S(at.args.extent.cols);
  }
};

// A row is a cell, which may be all of a set.
struct ChannelMoments : Moments {
  static constexpr int in = 1, scalar_out = 4;
  enum { kX, kMean = 0, kSpread, kLost, kCount };
  bool variance;  // that is the spread, else the sum of the squares

  template <class S>
  struct Row {
    S mean;
  };

  using Moments::finish;
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Spread<S>& sum, const At& at) const {
    const S n = S(at.args.extent.cols);
    S lost;
    const S squares = sum.about(row.mean, lost, n);
    at.put(kSpread, variance ? squares / n : squares);
    at.put(kMean, row.mean);
    at.put(kLost, lost);
    at.put(kCount, n);
  }
};

// A row is a set, a column one of its cells.
struct ChannelStatistics : RowOp {
  static constexpr int in = 4, scalar_out = 3;
  enum { kMean, kSquares, kLost, kCount, kToMean = 0, kToVar, kToLost };

  template <class S>
  struct Row {
    S n, mean;
  };
  template <class A>
  using Sweeps = List<Mean<A>, Spread<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(Mean<A>& sum, const R&, const In<ChannelStatistics, A>& in) const {
    sum.n = sum.n + in.x[kCount];
    sum.nx = fma(in.x[kCount], in.x[kMean], sum.nx);
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Spread<A>& sum, const R& row, const In<ChannelStatistics, A>& in) const {
    const A delta = (in.x[kMean] - A(row.mean)) + in.x[kLost], moved = in.x[kCount] * delta;
    sum.d = sum.d + moved;
    sum.dd = sum.dd + fma(moved, delta, in.x[kSquares]);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Mean<S>& sum, const At&) const {
    row.n = sum.n;
    row.mean = sum.nx / sum.n;
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Spread<S>& sum, const At& at) const {
    S lost;
    at.put(kToVar, sum.about(row.mean, lost, row.n) / row.n);
    at.put(kToMean, row.mean);
    at.put(kToLost, lost);
  }
};

// What the walks over the elements share: a row is part of one channel.
struct ChannelRow {
  enum { kMean, kVar, kLost, kW, kB };
  double eps;
  Activation activation;
  bool residual;  // else what stands in its place is not looked at

  template <class S>
  struct Row {
    S mean, lost, rstd, w, b, g, gh;  // the last two: of the backward
  };
  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.mean = at.scalar(kMean);
    row.lost = at.scalar(kLost);
    row.rstd = rsqrt(at.scalar(kVar) + S(eps));
    row.w = at.scalar(kW, S(1));
    row.b = at.scalar(kB);
  }
  template <class A, class R>
  FUSEGRAD_FN A h(const R& row, A x) const {
    return ((x - A(row.mean)) - A(row.lost)) * A(row.rstd);
  }
  template <class A>
  FUSEGRAD_FN A z(A h, A w, A b, A r) const {
    const A z = fma(h, w, b);
    return residual ? z + r : z;
  }
  template <class A>
  FUSEGRAD_FN A dz(A h, A w, A b, A r, A dy) const {
    return activation.kind == Act::identity ? dy : activation.gradient(dy, z(h, w, b, r));
  }
  template <class A, class R>
  FUSEGRAD_FN A dx(const R& row, A h, A wdz) const {
    return A(row.rstd) * (wdz - A(row.g) - h * A(row.gh));
  }
};

struct ChannelNormFwd : RowOp {
  static constexpr int in = 2, out = 1, scalar_in = 5;
  enum { kX, kR, kY = 0 };
  ChannelRow channel;

  template <class S>
  using Row = ChannelRow::Row<S>;
  template <class A>
  using Sweeps = List<>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    channel.begin(row, at);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<ChannelNormFwd, A>& in, Out<ChannelNormFwd, A>& out) const {
    out.y[kY] = channel.activation.value(channel.z(channel.h(row, in.x[kX]), A(row.w), A(row.b), in.x[kR]));
  }
};

// A row is a cell.
struct ChannelSums : RowOp {
  static constexpr int in = 3, scalar_in = 5, scalar_out = 2;
  enum { kX, kDy, kR, kDz = 0, kDzH };
  ChannelRow channel;

  template <class S>
  using Row = ChannelRow::Row<S>;
  template <class A>
  struct Dots {
    A dz{0}, dzh{0};
    FUSEGRAD_FN void merge(const Dots& o) { dz = dz + o.dz, dzh = dzh + o.dzh; }
  };
  template <class A>
  using Sweeps = List<Dots<A>>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    channel.begin(row, at);
  }
  template <class A, class R>
  FUSEGRAD_FN void add(Dots<A>& sum, const R& row, const In<ChannelSums, A>& in) const {
    const A h = channel.h(row, in.x[kX]), dz = channel.dz(h, A(row.w), A(row.b), in.x[kR], in.x[kDy]);
    sum.dz = sum.dz + dz;
    sum.dzh = fma(dz, h, sum.dzh);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>&, const Dots<S>& sum, const At& at) const {
    at.put(kDz, sum.dz);
    at.put(kDzH, sum.dzh);
  }
};

// The two sums of cells, times the weights of their channels, added up along a row.
struct ChannelTotals : RowOp {
  static constexpr int in = 3, scalar_out = 2;
  enum { kDz, kDzH, kW };
  bool weighted;  // else what stands in the weights' place is not looked at

  template <class S>
  struct Row {};
  template <class A>
  using Sweeps = List<ChannelSums::Dots<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(ChannelSums::Dots<A>& sum, const R&, const In<ChannelTotals, A>& in) const {
    const A w = weighted ? in.x[kW] : A(1);
    sum.dz = fma(w, in.x[kDz], sum.dz);
    sum.dzh = fma(w, in.x[kDzH], sum.dzh);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>&, const ChannelSums::Dots<S>& sum, const At& at) const {
    at.put(kDz, sum.dz);
    at.put(kDzH, sum.dzh);
  }
};

struct ChannelNormBwd : RowOp {
  static constexpr int in = 3, out = 2, scalar_in = 7, packs = 2;
  enum { kX, kDy, kR, kDx = 0, kDr, kG = 5, kGH };
  ChannelRow channel;
  double m;       // elements of a set
  bool weighted;  // whether the set's sums have the weights in them, or are of one channel

  template <class S>
  using Row = ChannelRow::Row<S>;
  template <class A>
  using Sweeps = List<>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    channel.begin(row, at);
    if (m == 1 && at.given(kG)) row.rstd = S(0);  // an element that is its own mean has no gradient, not even a rounding error
    const S w = weighted ? S(1) : row.w;
    row.g = at.scalar(kG) / S(m) * w;
    row.gh = at.scalar(kGH) / S(m) * w;
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<ChannelNormBwd, A>& in, Out<ChannelNormBwd, A>& out) const {
    const A h = channel.h(row, in.x[kX]), dz = channel.dz(h, A(row.w), A(row.b), in.x[kR], in.x[kDy]);
    out.y[kDx] = channel.dx(row, h, dz * A(row.w));
    out.y[kDr] = dz;
  }
};

// A row is a group, a column one of its elements, with w and b of its channel: those of each group are a set.
struct GroupNormFwd : Moments {
  static constexpr int in = 1, params = 2, out = 1, scalar_out = 3;
  static constexpr bool in_sets = true;
  enum { kX, kW = 0, kB, kY = 0, kMean = 0, kVar, kLost };
  ChannelRow channel;
  bool shift;  // there is a b

  template <class S>
  struct Row {
    S mean, lost, rstd;
  };

  using Moments::finish;
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Spread<S>& sum, const At& at) const {
    const S n = S(at.args.extent.cols), var = sum.about(row.mean, row.lost, n) / n;
    row.rstd = rsqrt(var + S(channel.eps));
    at.put(kMean, row.mean);
    at.put(kVar, var);
    at.put(kLost, row.lost);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<GroupNormFwd, A>& in, Out<GroupNormFwd, A>& out) const {
    const A b = shift ? in.p[kB] : A(0);
    out.y[kY] = channel.activation.value(channel.z(channel.h(row, in.x[kX]), in.p[kW], b, A(0)));
  }
};

struct GroupNormBwd : RowOp {
  static constexpr int in = 2, params = 2, out = 1, col_out = 2, wide_cols = 2, scalar_in = 3, kept = 1, packs = 1;
  static constexpr bool in_sets = true;
  enum { kX, kDy, kW = 0, kB, kDx = 0, kDw = 0, kDb, kMean = 0, kVar, kLost };
  ChannelRow channel;
  bool shift;  // there is a b

  template <class S>
  struct Row {
    S mean, lost, rstd;
    S g, gh;  // the means of w dz and of w dz h
  };
  template <class A>
  using Sweeps = List<ChannelSums::Dots<A>>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.mean = at.scalar(kMean);
    row.lost = at.scalar(kLost);
    row.rstd = at.args.extent.cols == 1 ? S(0) : rsqrt(at.scalar(kVar) + S(channel.eps));
  }
  template <class A, class R>
  FUSEGRAD_FN void add(ChannelSums::Dots<A>& sum, const R& row, In<GroupNormBwd, A>& in) const {
    const A h = channel.h(row, in.x[kX]);
    in.k[0] = channel.dz(h, in.p[kW], shift ? in.p[kB] : A(0), A(0), in.x[kDy]);
    const A wdz = in.k[0] * in.p[kW];
    sum.dz = sum.dz + wdz;
    sum.dzh = fma(wdz, h, sum.dzh);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const ChannelSums::Dots<S>& sum, const At& at) const {
    row.g = sum.dz / S(at.args.extent.cols);
    row.gh = sum.dzh / S(at.args.extent.cols);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<GroupNormBwd, A>& in, Out<GroupNormBwd, A>& out) const {
    const A h = channel.h(row, in.x[kX]), of_z = in.k[0];
    out.y[kDx] = channel.dx(row, h, of_z * in.p[kW]);
    out.col[kDw] = of_z * h;
    out.col[kDb] = of_z;
  }
};

}  // namespace fusegrad
