// Losses of an element: input x, target t, weight w, with g the gradient of the loss times w.
//
//   mse        (x - t)^2                                              dx = 2 (x - t) g               dt = -dx
//   l1         |x - t|                                                dx = sign(x - t) g             dt = -dx
//   huber      (x - t)^2 / 2 up to |x - t| = delta, beyond it         dx = (x - t) g, at most        dt = -dx
//              delta (|x - t| - delta / 2)                            delta g in size
//   smooth_l1  huber / beta with delta = beta; l1 if beta is 0
//   bce        (1 - t) x + (v t + 1 - t) l, l = log(1 + exp(-x)),     dx = (v t (s - 1) + (1 - t) s) g
//              s = sigmoid(x), with a weight v of t = 1               dt = ((v - 1) l - x) g
//   focal      b u^gamma (bce with v = 1), u = s (1 - t) + (1 - s) t, b = alpha t + (1 - alpha) (1 - t), or 1 if alpha < 0
//              dx = b (u^gamma (s - t) + bce gamma u^(gamma - 1) s (1 - s) (1 - 2 t)) g
//              dt = (b (bce gamma u^(gamma - 1) (1 - 2 s) - x u^gamma) + (2 alpha - 1) bce u^gamma) g
//   kl         t (log t - x), 0 for t = 0                             dx = -t g                      dt = (1 + log t - x) g
//              or, of a logarithm t, e^t (t - x)                      dx = -e^t g                    dt = e^t (1 + t - x) g
//   js         beta p u - (1 - beta) q s, p = t or e^t, q = e^x, r = log p - x,
//              s = log m - x = log(1 + beta (e^r - 1)), u = log p - log m = r - s, m = beta p + (1 - beta) q
//              dx = -(1 - beta) q s g                                 dt = beta u g, or p times that; 0 for p = 0
//
// Huber 1964, doi:10.1214/aoms/1177703732; focal: Lin et al. 2017, arXiv:1708.02002; js: the generalised Jensen-Shannon divergence
// of Agarwal et al. 2023, arXiv:2306.13649.
#pragma once

#include "../core/row_op.h"

namespace fusegrad {

enum class LossKind : int8_t { mse, l1, huber, smooth_l1, bce, focal, kl, js };

// s = sigmoid(x), 1 - s and -log s, by one exponential.
template <class A>
struct Logistic {
  A s, rest, minus_log_s;

  FUSEGRAD_FN explicit Logistic(A x) {
    const A e = exp(A(0) - absolute(x)), upper = reciprocal(A(1) + e), lower = e * upper;
    s = select(x < A(0), lower, upper);
    rest = select(x < A(0), upper, lower);
    minus_log_s = softplus(A(0) - x, e);
  }
};

struct Loss {
  LossKind kind;
  bool log_target;
  double a, b;    // delta; beta; alpha and gamma
  double log_a;   // of js: within the loop a call would cost all vector registers
  bool weighted;  // there is a v, else it is 1

  template <class A>
  FUSEGRAD_FN static A of(double value) {
    return A(Scalar<A>(value));
  }
  template <class A>
  FUSEGRAD_FN A bce(A x, A t, A minus_log_s) const {  // with v = 1
    return fma(A(1) - t, x, minus_log_s);
  }
  template <class A>
  FUSEGRAD_FN A power(A u, double exponent) const {
    return exponent == 2 ? u * u : exponent == 1 ? u : exponent == 0 ? A(1) : pow(u, of<A>(exponent));
  }
  template <class A>
  FUSEGRAD_FN A balance(A t) const {
    return a < 0 ? A(1) : of<A>(a) * t + of<A>(1 - a) * (A(1) - t);
  }
  template <class A>
  FUSEGRAD_FN A p_of(A t) const {
    return log_target ? exp(t) : t;
  }
  // r and s of js. By the ratio of the probabilities and not by their logarithms, whose difference has few digits left where they
  // are alike.
  template <class A>
  FUSEGRAD_FN void ratios(A x, A t, A& r, A& s) const {
    r = (log_target ? t : log(t)) - x;
    s = log1p(of<A>(a) * expm1(smaller(r, A(80))));
  }
  // beta u, and (1 - beta) q s.
  template <class A>
  FUSEGRAD_FN A of_p(A p, A r, A s) const {
    return select(p == A(0), A(0), of<A>(a) * select(r > A(80), of<A>(-log_a), r - s));
  }
  template <class A>
  FUSEGRAD_FN A of_q(A q, A r, A s) const {
    return select(q == A(0), A(0), of<A>(1 - a) * q * select(r > A(80), r + of<A>(log_a), s));
  }

  template <class A>
  FUSEGRAD_FN A value(A x, A t, A v) const {
    const A d = x - t, far = absolute(d);
    switch (kind) {
      case LossKind::mse: return d * d;
      case LossKind::l1: return far;
      case LossKind::huber: return select(far <= of<A>(a), of<A>(0.5) * d * d, of<A>(a) * (far - of<A>(0.5 * a)));
      case LossKind::smooth_l1: return select(far < of<A>(a), of<A>(0.5 / a) * d * d, far - of<A>(0.5 * a));
      case LossKind::bce: {
        const A l = softplus(A(0) - x);
        return bce(x, t, weighted ? fma(v, t, A(1) - t) * l : l);
      }
      case LossKind::focal: {
        const Logistic<A> l(x);
        return balance(t) * power(l.s * (A(1) - t) + l.rest * t, b) * bce(x, t, l.minus_log_s);
      }
      case LossKind::kl: {
        const A p = p_of(t);
        return log_target ? p * (t - x) : select(p == A(0), A(0), p * log(p)) - p * x;
      }
      default: {
        const A p = p_of(t);
        A r, s;
        ratios(x, t, r, s);
        return p * of_p(p, r, s) - of_q(exp(x), r, s);
      }
    }
  }

  // That of t only if it is asked for, and its logarithm only if it counts.
  template <class A>
  FUSEGRAD_FN void derivatives(A x, A t, A v, A& dx, A& dt, bool of_t) const {
    const A d = x - t, sign = select(d > A(0), A(1), select(d < A(0), A(-1), A(0)));
    switch (kind) {
      case LossKind::mse: dx = A(2) * d; break;
      case LossKind::l1: dx = sign; break;
      case LossKind::huber: dx = select(absolute(d) >= of<A>(a), of<A>(a) * sign, d); break;
      case LossKind::smooth_l1: dx = select(absolute(d) >= of<A>(a), sign, d * of<A>(1 / a)); break;
      case LossKind::bce: {
        const A s = sigmoid(x);
        dx = weighted ? fma(v * t, s - A(1), (A(1) - t) * s) : s - t;  // not by v - 1, in which a small v is lost
        dt = A(0) - x;
        if (of_t && weighted) dt = select(v == A(1), A(0), (v - A(1)) * softplus(A(0) - x)) - x;
        return;
      }
      case LossKind::focal: {
        const Logistic<A> l(x);
        const A u = l.s * (A(1) - t) + l.rest * t, ce = bce(x, t, l.minus_log_s), scale = balance(t);
        const A weight = power(u, b), slope = b == 0 ? A(0) : ce * of<A>(b) * power(u, b - 1);
        dx = scale * (weight * (l.s - t) + slope * l.s * l.rest * (A(1) - t - t));
        if (!of_t) return;
        dt = scale * (slope * l.rest - slope * l.s - x * weight);
        if (a >= 0) dt = dt + of<A>(2 * a - 1) * ce * weight;
        return;
      }
      case LossKind::kl: {
        const A p = p_of(t);
        dx = A(0) - p;
        // t / t: at 0, where the derivative is infinite, it is NaN as torch's.
        if (of_t) dt = log_target ? p * (A(1) + t - x) : select(t == A(0), A(0), log(t)) + t / t - x;
        return;
      }
      default: {
        const A q = exp(x), beyond = q - q;  // NaN where q is infinite
        A r, s;
        ratios(x, t, r, s);
        dx = beyond - of_q(q, r, s);
        if (!of_t) return;
        const A p = p_of(t);
        dt = (log_target ? p : A(1)) * of_p(p, r, s) + beyond;
        return;
      }
    }
    dt = A(0) - dx;
  }
};

struct LossesFwd : MapOp {
  static constexpr int in = 1, mixed = 3, out = 1, sums = 2;
  enum { kX, kT = 0, kW, kV, kLoss = 0, kWeight };
  Loss loss;

  template <class A>
  FUSEGRAD_FN void map(const In<LossesFwd, A>& in, Out<LossesFwd, A>& out) const {
    out.y[kLoss] = out.sum[kLoss] = loss.value(in.x[kX], in.m[kT], in.m[kV]) * in.m[kW];
    out.sum[kWeight] = in.m[kW];
  }
};

struct LossesBwd : MapOp {
  static constexpr int in = 1, mixed = 4, out = 2;
  enum { kX, kT = 0, kW, kV, kG, kDx = 0, kDt };
  Loss loss;
  double factor;  // 1 / the number of elements that a mean is taken over
  bool of_t;      // the target's gradient is wanted

  template <class A>
  FUSEGRAD_FN void map(const In<LossesBwd, A>& in, Out<LossesBwd, A>& out) const {
    const A g = in.m[kG] * A(Scalar<A>(factor)) * in.m[kW];
    A dx, dt(0);
    loss.derivatives(in.x[kX], in.m[kT], in.m[kV], dx, dt, of_t);
    out.y[kDx] = dx * g;
    out.y[kDt] = dt * g;
  }
};

}  // namespace fusegrad
