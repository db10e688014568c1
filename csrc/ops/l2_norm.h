// The L2 norm of a row, and the row divided by it:
//
//   n = sqrt(sum(x^2))          dx = g x / n                                              0 where n = 0
//   y = x / max(n, eps)         dx = (dy - x sum(dy x) / n^2) / n   where n >= eps        dy / eps where it is less
//
// The backward takes n again from x, which it has to read anyway. Squares are summed at three scales at once (after Blue 1978, ACM
// TOMS 4), so that a row whose squares overflow or vanish has its norm all the same.
#pragma once

#include "../core/row_op.h"

namespace fusegrad {

template <class A>
struct Squares {
  A xx{0}, of_large{0}, of_small{0};

  FUSEGRAD_FN void add(A x) {
    const A large = x * A(1 / scale()), small = x * A(scale());
    xx = fma(x, x, xx);
    of_large = fma(large, large, of_large);
    of_small = fma(small, small, of_small);
  }
  FUSEGRAD_FN void merge(const Squares& o) { xx = xx + o.xx, of_large = of_large + o.of_large, of_small = of_small + o.of_small; }
  // Of a scalar sum. What does not hold for NaN is left to xx.
  FUSEGRAD_FN A root() const {
    if (xx < 1 / scale()) return sqrt(of_small) * (1 / scale());
    return xx > std::numeric_limits<A>::max() ? sqrt(of_large) * scale() : sqrt(xx);
  }

 private:
  using S = Scalar<A>;
  FUSEGRAD_FN static S scale() { return sizeof(S) == 4 ? S(0x1p96f) : S(0x1p768); }
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
  template <class A>
  FUSEGRAD_FN A of(A x) const {
    const A scaled = x * A(up), q = scaled * A(by), exact = fma(fma(A(minus), q, scaled), A(by), q);
    return select(exact == exact, exact, q);  // an infinite quotient lacks what is no number
  }
};

struct NormFwd : RowOp {
  static constexpr int in = 1, scalar_out = 1;
  enum { kX, kNorm = 0 };

  template <class S>
  struct Row {
    S norm;
  };
  template <class A>
  using Sweeps = List<Squares<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(Squares<A>& sum, const R&, const In<NormFwd, A>& in) const {
    sum.add(in.x[kX]);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Squares<S>& sum, const At& at) const {
    row.norm = sum.root();
    at.put(kNorm, row.norm);
  }
};

struct NormBwd : RowOp {
  static constexpr int in = 1, out = 1, scalar_in = 1;
  enum { kX, kDx = 0, kDNorm = 0 };

  template <class S>
  struct Row {
    Over<S> norm;
    S g;
  };
  template <class A>
  using Sweeps = List<Squares<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(Squares<A>& sum, const R&, const In<NormBwd, A>& in) const {
    sum.add(in.x[kX]);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Squares<S>& sum, const At& at) const {
    const S norm = sum.root();
    row.norm = Over<S>(norm == S(0) ? S(1) : norm);
    row.g = norm == S(0) ? S(0) : at.scalar(kDNorm);
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<NormBwd, A>& in, Out<NormBwd, A>& out) const {
    out.y[kDx] = row.norm.of(in.x[kX]) * A(row.g);
  }
};

struct NormalizeFwd : RowOp {
  static constexpr int in = 1, out = 1;
  enum { kX, kY = 0 };
  double eps;

  template <class S>
  struct Row {
    Over<S> norm;
  };
  template <class A>
  using Sweeps = List<Squares<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(Squares<A>& sum, const R&, const In<NormalizeFwd, A>& in) const {
    sum.add(in.x[kX]);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Squares<S>& sum, const At&) const {
    row.norm = Over<S>(larger(sum.root(), S(eps)));
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<NormalizeFwd, A>& in, Out<NormalizeFwd, A>& out) const {
    out.y[kY] = row.norm.of(in.x[kX]);
  }
};

struct NormalizeBwd : RowOp {
  static constexpr int in = 2, out = 1;
  enum { kX, kDy, kDx = 0 };
  double eps;

  template <class S>
  struct Row {
    Over<S> norm;
    S dy_y;  // sum(dy x) / n
  };
  template <class A>
  struct Sums {
    Squares<A> squares;
    A dy_x{0};
    FUSEGRAD_FN void merge(const Sums& o) { squares.merge(o.squares), dy_x = dy_x + o.dy_x; }
  };
  template <class A>
  using Sweeps = List<Sums<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(Sums<A>& sum, const R&, const In<NormalizeBwd, A>& in) const {
    sum.squares.add(in.x[kX]);
    sum.dy_x = fma(in.x[kDy], in.x[kX], sum.dy_x);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Sums<S>& sum, const At& at) const {
    const S norm = sum.squares.root();
    // A single element is its sign: exactly no derivative, where a division would raise a rounding to a number.
    row.norm = Over<S>(at.args.extent.cols == 1 && norm >= S(eps) ? std::numeric_limits<S>::infinity() : larger(norm, S(eps)));
    row.dy_y = norm < S(eps) ? S(0) : sum.dy_x / norm;
  }
  template <class T, class A, class R>
  FUSEGRAD_FN void map(const R& row, const In<NormalizeBwd, A>& in, Out<NormalizeBwd, A>& out) const {
    out.y[kDx] = row.norm.of(in.x[kDy] - row.norm.of(in.x[kX]) * A(row.dy_y));
  }
};

}  // namespace fusegrad
