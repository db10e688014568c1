// The activations that ops apply to an element on its way: values and first derivatives, by number in the order of
// python/fusegrad/_activations.py, which has their references. Where torch has the function, NaN and infinity, and the derivative
// at a corner, are torch's.
//
// gelu: Hendrycks & Gimpel 2016, arXiv:1606.08415. silu: Elfwing et al. 2017, arXiv:1702.03118. mish: Misra 2019,
// arXiv:1908.08681. elu: Clevert et al. 2015, arXiv:1511.07289. squared_relu: So et al. 2021, arXiv:2109.08668. hardswish:
// Howard et al. 2019, arXiv:1905.02244.
#pragma once

#include "../core/numeric.h"

namespace fusegrad {

enum class Act : int8_t {
  identity,
  relu,
  leaky_relu,
  sigmoid,
  tanh,
  exp,
  square,
  cube,
  squared_relu,
  gelu,
  gelu_tanh,
  silu,
  softplus,
  elu,
  mish,
  hardswish,
};

constexpr int64_t kActs = int64_t(Act::hardswish) + 1;

struct Activation {
  Act kind;
  double negative_slope = 0;  // of leaky_relu

  template <class A>
  FUSEGRAD_FN A value(A x) const {
    switch (kind) {
      case Act::relu: return larger(x, A(0));
      case Act::leaky_relu: return select(x > A(0), x, x * slope<A>());
      case Act::sigmoid: return sigmoid(x);
      case Act::tanh: return tanh(x);
      case Act::exp: return exp(x);
      case Act::square: return x * x;
      case Act::cube: return x * x * x;
      case Act::squared_relu: return square(larger(x, A(0)));
      case Act::gelu: return gelu_of(x, normal_above(x, bell(x)));
      case Act::gelu_tanh: return of<A>(0.5) * x * (A(1) + tanh(tanh_argument(x)));
      case Act::silu: return x * sigmoid(x);
      case Act::softplus: return select(x > A(20), x, softplus(x));
      case Act::elu: return select(x < A(0), expm1(x), x);
      case Act::mish: return x * tanh_of_softplus(x);
      case Act::hardswish: return x * clamped(x + A(3), A(0), A(6)) * of<A>(1.0 / 6);
      default: return x;
    }
  }

  template <class A>
  FUSEGRAD_FN A derivative(A x) const {
    switch (kind) {
      case Act::relu: return select(x <= A(0), A(0), A(1));
      case Act::leaky_relu: return select(x > A(0), A(1), slope<A>());
      case Act::sigmoid: {
        const A s = sigmoid(x);
        return s * (A(1) - s);
      }
      case Act::tanh: return A(1) - square(tanh(x));
      case Act::exp: return exp(x);
      case Act::square: return A(2) * x;
      case Act::cube: return A(3) * x * x;
      case Act::squared_relu: return A(2) * larger(x, A(0));
      case Act::gelu: {
        const A e = bell(x);
        return gelu_slope(x, normal_above(x, e), e);
      }
      case Act::gelu_tanh: return gelu_tanh_slope(x, tanh(tanh_argument(x)));
      case Act::silu: return silu_slope(x, sigmoid(x));
      case Act::softplus: return select(x > A(20), A(1), sigmoid(x));
      case Act::elu: return select(x <= A(0), exp(x), A(1));
      case Act::mish: {
        const A t = tanh_of_softplus(x);
        return t + x * (A(1) - t * t) * sigmoid(x);
      }
      case Act::hardswish: return select(x <= A(-3), A(0), select(x >= A(3), A(1), x * of<A>(1.0 / 3) + of<A>(0.5)));
      default: return A(1);
    }
  }

  // Both, where they share their most expensive part.
  template <class A>
  FUSEGRAD_FN void both(A x, A& y, A& slope) const {
    switch (kind) {
      case Act::gelu: {
        const A e = bell(x), tail = normal_above(x, e);
        y = gelu_of(x, tail), slope = gelu_slope(x, tail, e);
        return;
      }
      case Act::gelu_tanh: {
        const A t = tanh(tanh_argument(x));
        y = of<A>(0.5) * x * (A(1) + t), slope = gelu_tanh_slope(x, t);
        return;
      }
      case Act::silu: {
        const A s = sigmoid(x);
        y = x * s, slope = silu_slope(x, s);
        return;
      }
      case Act::sigmoid: y = sigmoid(x), slope = y * (A(1) - y); return;
      default: y = value(x), slope = derivative(x);
    }
  }

  // dy times the derivative; where torch's function is flat that is 0 for an infinite dy, too.
  template <class A>
  FUSEGRAD_FN A gradient(A dy, A x) const {
    switch (kind) {
      case Act::relu: return select(x <= A(0), A(0), dy);
      case Act::squared_relu: return select(x <= A(0), A(0), dy * derivative(x));
      case Act::hardswish: return select(x <= A(-3), A(0), dy * derivative(x));
      default: return dy * derivative(x);
    }
  }

 private:
  static constexpr double kTanhScale = 0.7978845608028654, kTanhCube = 0.044715;  // sqrt(2 / pi)

  template <class A>
  FUSEGRAD_FN static A of(double value) {
    return A(Scalar<A>(value));
  }
  template <class A>
  FUSEGRAD_FN A slope() const {
    return of<A>(negative_slope);
  }
  template <class A>
  FUSEGRAD_FN static A silu_slope(A x, A s) {
    return s * fma(x, A(1) - s, A(1));
  }
  // x P(X < x) of a standard normal X is max(x, 0) - |x| P(X > |x|), where no digit is lost on either side.
  template <class A>
  FUSEGRAD_FN static A gelu_of(A x, A tail) {
    return select(x > A(0), x, A(0)) - absolute(near(x)) * tail;
  }
  template <class A>
  FUSEGRAD_FN static A gelu_slope(A x, A tail, A e) {
    return select(x > A(0), A(1) - tail, tail) + x * of<A>(0.3989422804014327) * e;
  }
  template <class A>
  FUSEGRAD_FN static A bell(A x) {
    return exp(of<A>(-0.5) * x * x);
  }
  template <class A>
  FUSEGRAD_FN static A gelu_tanh_slope(A x, A t) {
    const A near = bounded(x), slope = of<A>(kTanhScale) * (A(1) + of<A>(3 * kTanhCube) * near * near);
    return of<A>(0.5) * (A(1) + t) + of<A>(0.5) * x * (A(1) - t * t) * slope;
  }
  // P(X > |x|) of a standard normal X.
  template <class A>
  FUSEGRAD_FN static A normal_above(A x, A e /* bell(x) */) {
    return normal_tail(absolute(near(x)), e);
  }
  // Beyond 30 the tail is 0, which times infinity is no number.
  template <class A>
  FUSEGRAD_FN static A near(A x) {
    return select(x > A(30), A(30), x);
  }
  // Beyond 30 tanh is 1, and a square might overflow where the result does not.
  template <class A>
  FUSEGRAD_FN static A bounded(A x) {
    return clamped(x, A(-30), A(30));
  }
  template <class A>
  FUSEGRAD_FN static A tanh_argument(A x) {
    const A near = bounded(x);
    return of<A>(kTanhScale) * near * (A(1) + of<A>(kTanhCube) * near * near);
  }
  // (e^2 + 2 e) / (e^2 + 2 e + 2) with e = exp(x): one exponential for two functions, and no digit lost for negative x.
  template <class A>
  FUSEGRAD_FN static A tanh_of_softplus(A x) {
    const A e = exp(smaller(x, A(20))), n = e * (e + A(2));
    return n / (n + A(2));
  }
};

}  // namespace fusegrad
