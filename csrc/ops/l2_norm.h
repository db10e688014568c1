// The L2 norm of a row, and the row divided by it:
//
//   n = sqrt(sum(x^2))          dx = g x / n                                              0 where n = 0
//   y = x / max(n, eps)         dx = (dy - x sum(dy x) / n^2) / n   where n >= eps        dy / eps where it is less
//
// The backward takes n again from x, which it has to read anyway. Where the sum of the squares overflows or nearly vanishes, a
// sweep at two other scales follows (after Blue 1978, ACM TOMS 4).
#pragma once

#include "../core/row_op.h"

namespace fusegrad {

template <class A>
struct Squares {
  A xx{0};
  FUSEGRAD_FN void merge(const Squares& o) { xx = xx + o.xx; }
};
template <class A>
struct ScaledSquares {
  A of_large{0}, of_small{0};
  FUSEGRAD_FN void merge(const ScaledSquares& o) { of_large = of_large + o.of_large, of_small = of_small + o.of_small; }
};

// What the ops here share: the sweeps over the first input, which end in op.found(row, norm, at). Row has a field xx.
template <class Op>
struct OfNorm : RowOp {
  template <class A>
  using Sweeps = List<Squares<A>, ScaledSquares<A>>;

  template <class S>
  static constexpr S kScale = sizeof(S) == 4 ? S(0x1p96) : S(0x1p768);
  template <class S>
  FUSEGRAD_FN static bool small(S xx) {
    return xx < 1 / kScale<S>;
  }
  template <class S>
  FUSEGRAD_FN static bool large(S xx) {
    return xx > std::numeric_limits<S>::max();
  }

  template <class A, class R, class In>
  FUSEGRAD_FN void add(Squares<A>& sum, const R&, const In& in) const {
    sum.xx = fma(in.x[0], in.x[0], sum.xx);
  }
  template <class R, class S, class At>
  FUSEGRAD_FN void finish(R& row, const Squares<S>& sum, const At& at) const {
    row.xx = sum.xx;
    if (!needs<ScaledSquares<S>>(row)) op().found(row, sqrt(sum.xx), at);
  }
  template <class Sum, class R>
  FUSEGRAD_FN bool needs(const R& row) const {
    return !std::is_same_v<Sum, ScaledSquares<decltype(row.xx)>> || small(row.xx) || large(row.xx);
  }
  template <class A, class R, class In>
  FUSEGRAD_FN void add(ScaledSquares<A>& sum, const R&, const In& in) const {
    using S = Scalar<A>;
    const A large = in.x[0] * A(1 / kScale<S>), small = in.x[0] * A(kScale<S>);
    sum.of_large = fma(large, large, sum.of_large);
    sum.of_small = fma(small, small, sum.of_small);
  }
  template <class R, class S, class At>
  FUSEGRAD_FN void finish(R& row, const ScaledSquares<S>& sum, const At& at) const {
    op().found(row, small(row.xx) ? sqrt(sum.of_small) * (1 / kScale<S>) : sqrt(sum.of_large) * kScale<S>, at);
  }

 private:
  FUSEGRAD_FN const Op& op() const { return static_cast<const Op&>(*this); }
};

// Division by a norm as a product, and the product of what that lacks: as exact, where a division of vectors takes 16 cycles.
template <class S>
struct Over {
  S up, by, minus;

  Over() = default;
  FUSEGRAD_FN explicit Over(S norm) {
    using Limits = std::numeric_limits<S>;
    up = norm < Limits::min() ? S(sizeof(S) == 4 ? 0x1p96 : 0x1p768) : S(1);  // the reciprocal of a subnormal number is infinite
    const S n = norm * up;
    by = S(1) / n;
    minus = n > Limits::max() ? S(0) : S(0) - n;  // what infinity divides to 0 lacks nothing
  }
  // To be rounded to T.
  template <class T, class A>
  FUSEGRAD_FN A of(A x) const {
    const A scaled = x * A(up), q = scaled * A(by);
    if constexpr (sizeof(T) == 2) return q;
    const A exact = fma(fma(A(minus), q, scaled), A(by), q);
    return select(exact == exact, exact, q);  // an infinite quotient lacks what is no number
  }
};

struct NormFwd : OfNorm<NormFwd> {
  static constexpr int in = 1, scalar_out = 1;
  enum { kX, kNorm = 0 };

  template <class S>
  struct Row {
    S xx;
  };

  template <class S, class At>
  FUSEGRAD_FN void found(Row<S>&, S norm, const At& at) const {
    at.put(kNorm, norm);
  }
};

struct NormBwd : OfNorm<NormBwd> {
  static constexpr int in = 1, out = 1, scalar_in = 1;
  enum { kX, kDx = 0, kDNorm = 0 };

  template <class S>
  struct Row {
    S xx;
    Over<S> norm;
    S g;
  };

  template <class S, class At>
  FUSEGRAD_FN void found(Row<S>& row, S norm, const At& at) const {
    row.norm = Over<S>(norm == S(0) ? S(1) : norm);
    row.g = norm == S(0) ? S(0) : at.scalar(kDNorm);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<NormBwd, A>& in, Out<NormBwd, A>& out) const {
    out.y[kDx] = row.norm.template of<T>(in.x[kX]) * A(row.g);
  }
};

struct NormalizeFwd : OfNorm<NormalizeFwd> {
  static constexpr int in = 1, out = 1;
  enum { kX, kY = 0 };
  double eps;

  template <class S>
  struct Row {
    S xx;
    Over<S> norm;
  };

  template <class S, class At>
  FUSEGRAD_FN void found(Row<S>& row, S norm, const At&) const {
    row.norm = Over<S>(larger(norm, S(eps)));
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<NormalizeFwd, A>& in, Out<NormalizeFwd, A>& out) const {
    out.y[kY] = row.norm.template of<T>(in.x[kX]);
  }
};

struct NormalizeBwd : OfNorm<NormalizeBwd> {
  static constexpr int in = 2, out = 1;
  enum { kX, kDy, kDx = 0 };
  double eps;

  template <class S>
  struct Row {
    S xx;
    Over<S> norm;
    S dy_y;  // sum(dy x) / n
  };
  template <class A>
  struct Sums : Squares<A> {
    A dy_x{0};
    FUSEGRAD_FN void merge(const Sums& o) { Squares<A>::merge(o), dy_x = dy_x + o.dy_x; }
  };
  template <class A>
  using Sweeps = List<Sums<A>, ScaledSquares<A>>;

  using OfNorm::add;
  template <class A, class R, class In>
  FUSEGRAD_FN void add(Sums<A>& sum, const R& row, const In& in) const {
    add(static_cast<Squares<A>&>(sum), row, in);
    sum.dy_x = fma(in.x[kDy], in.x[kX], sum.dy_x);
  }
  using OfNorm::finish;
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Sums<S>& sum, const At& at) const {
    row.dy_y = sum.dy_x;
    finish(row, static_cast<const Squares<S>&>(sum), at);
  }
  template <class S, class At>
  FUSEGRAD_FN void found(Row<S>& row, S norm, const At& at) const {
    // A single element is its sign: exactly no derivative, where a division would raise a rounding to a number.
    row.norm = Over<S>(at.args.extent.cols == 1 && norm >= S(eps) ? std::numeric_limits<S>::infinity() : larger(norm, S(eps)));
    row.dy_y = norm < S(eps) ? S(0) : row.dy_y / norm;
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<NormalizeBwd, A>& in, Out<NormalizeBwd, A>& out) const {
    out.y[kDx] = row.norm.template of<T>(in.x[kDy] - row.norm.template of<Scalar<A>>(in.x[kX]) * A(row.dy_y));
  }
};

}  // namespace fusegrad
