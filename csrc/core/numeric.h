// Arithmetic that reads the same for a scalar (double or float, on host or device) and for a SIMD vector of them.
// An op's formulas are templates over the accumulate type A and use only what is declared here and the operators + - * /.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define FUSEGRAD_FN __host__ __device__ __forceinline__
#else
#define FUSEGRAD_FN inline __attribute__((always_inline))
#endif

namespace fusegrad {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

// Sums of 16-bit and 32-bit rows are taken in float, sums of double rows in double.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class S>
constexpr bool is_scalar = std::is_same_v<S, float> || std::is_same_v<S, double>;
template <class S>
using if_scalar = std::enable_if_t<is_scalar<S>, S>;

// The lanes of an A: a scalar has one. at(d), or lane<A>(d), is the mask that is true in lane number d (in none if there is no such
// lane), first(n) the one that is true in the first n.
template <class A>
struct Lanes {
  using Scalar = A;
  static constexpr int count = 1;
  FUSEGRAD_FN static bool at(int64_t d) { return d == 0; }
  FUSEGRAD_FN static bool first(int64_t n) { return n > 0; }
};
template <class A>
using Scalar = typename Lanes<A>::Scalar;

template <class S>
FUSEGRAD_FN if_scalar<S> fma(S a, S b, S c) {
  return ::fma(a, b, c);
}
FUSEGRAD_FN float exp(float a) { return ::expf(a); }
FUSEGRAD_FN double exp(double a) { return ::exp(a); }
FUSEGRAD_FN float log(float a) { return ::logf(a); }
FUSEGRAD_FN double log(double a) { return ::log(a); }
FUSEGRAD_FN float tanh(float a) { return ::tanhf(a); }
FUSEGRAD_FN double tanh(double a) { return ::tanh(a); }
// P(X > a) of a standard normal X, for a >= 0, where exp(-a^2 / 2) is needed anyway.
FUSEGRAD_FN float normal_tail(float a, float /*exp(-a^2 / 2)*/) { return 0.5f * ::erfcf(a * 0.70710678f); }
FUSEGRAD_FN double normal_tail(double a, double) { return 0.5 * ::erfc(a * 0.7071067811865476); }
FUSEGRAD_FN float expm1(float a) { return ::expm1f(a); }
FUSEGRAD_FN double expm1(double a) { return ::expm1(a); }
FUSEGRAD_FN float log1p(float a) { return ::log1pf(a); }
FUSEGRAD_FN double log1p(double a) { return ::log1p(a); }
// log(1 + a) for 0 <= a <= 1.
template <class S>
FUSEGRAD_FN if_scalar<S> log1p_of_fraction(S a) {
  return log1p(a);
}
FUSEGRAD_FN float sqrt(float a) { return ::sqrtf(a); }
FUSEGRAD_FN double sqrt(double a) { return ::sqrt(a); }
FUSEGRAD_FN float absolute(float a) { return ::fabsf(a); }
FUSEGRAD_FN double absolute(double a) { return ::fabs(a); }
FUSEGRAD_FN float pow(float a, float b) { return ::powf(a, b); }
FUSEGRAD_FN double pow(double a, double b) { return ::pow(a, b); }
// 1 / sqrt and not the approximate instruction: half an ulp matters to the gradient of a float32 norm.
FUSEGRAD_FN float rsqrt(float a) { return 1.0f / ::sqrtf(a); }
FUSEGRAD_FN double rsqrt(double a) { return 1.0 / ::sqrt(a); }
template <class S>
FUSEGRAD_FN if_scalar<S> reciprocal(S a) {
  return S(1) / a;
}
template <class S>
FUSEGRAD_FN if_scalar<S> select(bool mask, S yes, S no) {
  return mask ? yes : no;
}
// The larger one; NaN if either is NaN.
template <class S>
FUSEGRAD_FN if_scalar<S> larger(S a, S b) {
  return a != a || a > b ? a : b;
}
// The larger of two numbers; beside a NaN, either of the two. It takes half the time of `larger`.
template <class S>
FUSEGRAD_FN if_scalar<S> larger_number(S a, S b) {
  return a < b ? b : a;
}
// The smaller one; NaN if either is NaN.
template <class S>
FUSEGRAD_FN if_scalar<S> smaller(S a, S b) {
  return a != a || a < b ? a : b;
}
// Between low and high; NaN stays.
template <class S>
FUSEGRAD_FN if_scalar<S> clamped(S a, S low, S high) {
  return smaller(larger(a, low), high);
}
// Rounded to the stored type T and back.
template <class T, class S>
FUSEGRAD_FN if_scalar<S> rounded(S a) {
  return S(T(a));
}

}  // namespace fusegrad

#ifdef FUSEGRAD_SIMD
// The same vocabulary for at::vec. Only the files that are compiled once per CPU capability see this part; the anonymous namespace
// keeps the linker from replacing one capability's code by another's.
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

namespace fusegrad {
namespace {

template <class S>
using Vec = at::vec::Vectorized<S>;

}  // namespace

template <class S>
struct Lanes<at::vec::Vectorized<S>> {
  using Scalar = S;
  static constexpr int count = at::vec::Vectorized<S>::size();
  FUSEGRAD_FN static at::vec::Vectorized<S> at(int64_t d) {
    // Relative to the first lane, so that it is exact for any column number.
    return at::vec::Vectorized<S>::arange(S(0), S(1)) == at::vec::Vectorized<S>(S(d));
  }
  FUSEGRAD_FN static at::vec::Vectorized<S> first(int64_t n) {
    return at::vec::Vectorized<S>::arange(S(0), S(1)) < at::vec::Vectorized<S>(S(n));
  }
};

namespace {

template <class S>
FUSEGRAD_FN Vec<S> fma(Vec<S> a, Vec<S> b, Vec<S> c) {
  return at::vec::fmadd(a, b, c);
}
FUSEGRAD_FN Vec<double> exp(Vec<double> a) { return a.exp(); }
FUSEGRAD_FN Vec<double> expm1(Vec<double> a) { return a.expm1(); }
FUSEGRAD_FN Vec<double> tanh(Vec<double> a) { return a.tanh(); }
#if defined(CPU_CAPABILITY_DEFAULT)
// Without vector instructions of its own the library's are faster.
FUSEGRAD_FN Vec<float> exp(Vec<float> a) { return a.exp(); }
FUSEGRAD_FN Vec<float> expm1(Vec<float> a) { return a.expm1(); }
FUSEGRAD_FN Vec<float> tanh(Vec<float> a) { return a.tanh(); }
#else
// exp(a) = 2^n (1 + p), to 1 ulp: a = n ln 2 + r, and a polynomial for (e^r - 1 - r) / r^2 (a least-squares fit, error 3e-9).
// Inlined, exp takes 0.76 (AVX2) to 0.87 (AVX-512) of the time of the library function behind Vec::exp.
struct Exponential {
  using V = Vec<float>;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  V n, p;

  FUSEGRAD_FN explicit Exponential(V a) {
    a = at::vec::clamp(a, V(-105.0f), V(89.0f));  // beyond these the result is 0 or infinity; NaN stays
    n = at::vec::fmadd(a, V(1.44269502f), V(kMagic)) - V(kMagic);
    V r = at::vec::fmadd(n, V(-0.693359375f), a);  // exact: few bits in each factor
    r = at::vec::fmadd(n, V(2.12194442e-4f), r);
    p = at::vec::fmadd(V(1.381453825e-3f), r, V(8.368745446e-3f));
    p = at::vec::fmadd(p, r, V(4.166838899e-2f));
    p = at::vec::fmadd(p, r, V(1.666652113e-1f));
    p = at::vec::fmadd(p, r, V(4.999999404e-1f));
    p = at::vec::fmadd(p * r, r, r);
  }
  // a 2^n, and 0 from the lower end on. A multiplication that rounds to 0 there would take a processor some 150 cycles, as all do
  // that leave the normal numbers: softmax of 4096 x 1024 with half of the logits masked out took 28 instead of 2 ms.
  FUSEGRAD_FN V scaled(V a) const {
    constexpr float kNothing = -151.0f;
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, _mm512_set1_ps(kNothing), _CMP_NEQ_UQ), a, n);
#else
    const V some = n != V(kNothing), within = n & some;
    // In two steps, as 2^n alone may lie outside the normal numbers where the result does not.
    const V half = at::vec::fmadd(within, V(0.5f), V(kMagic)) - V(kMagic);
    const auto power = [&](V k) {
      return at::vec::cast<float>(at::vec::cast<int32_t>(k + V(kMagic + 127.0f)) << Vec<int32_t>(23));
    };
    return (a * power(half) * power(within - half)) & some;
#endif
  }
};
FUSEGRAD_FN Vec<float> exp(Vec<float> a) {
  const Exponential e(a);
  return e.scaled(e.p + Vec<float>(1.0f));
}
// To 2 ulp; where 2^n is so large that the 1 is lost, without it.
FUSEGRAD_FN Vec<float> expm1(Vec<float> a) {
  using V = Vec<float>;
  const Exponential e(a);
  const V power = e.scaled(V(1.0f));
  return V::blendv(at::vec::fmadd(e.p, power, power - V(1.0f)), e.scaled(e.p + V(1.0f)), e.n > V(30.0f));
}
#endif
template <class S>
FUSEGRAD_FN Vec<S> reciprocal(Vec<S> a) {
#if defined(CPU_CAPABILITY_AVX512)
  // A Newton step on 14 bits instead of a division. Of infinity it stays the 0 that it begins as, and of 0, and what is so near it,
  // the infinity: there the error, otherwise about 0, is -infinity or no number.
  if constexpr (std::is_same_v<S, float>) {
    const __m512 y = _mm512_rcp14_ps(a), error = _mm512_fnmadd_ps(a, y, _mm512_set1_ps(1.0f));
    return _mm512_mask_fmadd_ps(y, _mm512_cmp_ps_mask(error, _mm512_set1_ps(-1.0f), _CMP_GT_OQ), error, y);
  }
#endif
  return Vec<S>(S(1)) / a;
}
#if !defined(CPU_CAPABILITY_DEFAULT)
// To 3 ulp, with u = exp(2 |a|) - 1; beyond 10 it is 1.
FUSEGRAD_FN Vec<float> tanh(Vec<float> a) {
  using V = Vec<float>;
  const V sign = a & V(-0.0f), size = a.abs();
  const Exponential e(at::vec::clamp_max(size + size, V(20.0f)));
  const V power = e.scaled(V(1.0f)), u = at::vec::fmadd(e.p, power, power - V(1.0f));
  return (u * reciprocal(u + V(2.0f))) | sign;
}
#endif
FUSEGRAD_FN Vec<double> log(Vec<double> a) { return a.log(); }
FUSEGRAD_FN Vec<double> log1p(Vec<double> a) { return a.log1p(); }
#if defined(CPU_CAPABILITY_AVX512)
// To 1 ulp, with a = 2^n (1 + f), f about 0, and a polynomial for (log(1 + f) - f + f^2 / 2) / f^3 (a least-squares fit, error
// 7e-9).
FUSEGRAD_FN Vec<float> log(Vec<float> a) {
  using V = Vec<float>;
  const __m512 m = _mm512_getmant_ps(a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_nan), e = _mm512_getexp_ps(a);
  const __mmask16 upper = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
  const V n = _mm512_mask_add_ps(e, upper, e, _mm512_set1_ps(1.0f)),
          f = V(_mm512_mask_mul_ps(m, upper, m, _mm512_set1_ps(0.5f))) - V(1.0f);
  V p = at::vec::fmadd(V(-7.466193e-2f), f, V(1.2675767e-1f));
  p = at::vec::fmadd(p, f, V(-1.3186593e-1f));
  p = at::vec::fmadd(p, f, V(1.4217052e-1f));
  p = at::vec::fmadd(p, f, V(-1.6622053e-1f));
  p = at::vec::fmadd(p, f, V(2.0000394e-1f));
  p = at::vec::fmadd(p, f, V(-2.5000843e-1f));
  p = at::vec::fmadd(p, f, V(3.3333343e-1f));
  p = at::vec::fmadd(p, f, V(-0.5f));
  return at::vec::fmadd(n, V(6.9314718e-1f), at::vec::fmadd(p, f * f, f));
}
// By the logarithm of u = 1 + a as it is rounded, and what the rounding takes away.
FUSEGRAD_FN Vec<float> log1p(Vec<float> a) {
  using V = Vec<float>;
  const V u = V(1.0f) + a, y = log(u), rest = (a - (u - V(1.0f))) * reciprocal(u);
  return _mm512_mask_add_ps(y, _mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), y, rest);  // at the ends there is none
}
#else
FUSEGRAD_FN Vec<float> log(Vec<float> a) { return a.log(); }
FUSEGRAD_FN Vec<float> log1p(Vec<float> a) { return a.log1p(); }
#endif
FUSEGRAD_FN Vec<double> log1p_of_fraction(Vec<double> a) { return a.log1p(); }
FUSEGRAD_FN Vec<float> log1p_of_fraction(Vec<float> a) {
#if defined(CPU_CAPABILITY_DEFAULT)
  return a.log1p();
#else
  // To 1.3 ulp, as 2 atanh(z) with z = a / (2 + a), in the form a - z (a - R(z^2)), where a's digits stay (a fit of least relative
  // error for R(w) / w, 5e-9).
  using V = Vec<float>;
  const V z = a * reciprocal(a + V(2.0f)), w = z * z;
  V p = at::vec::fmadd(V(2.802446559e-1f), w, V(2.799913942e-1f));
  p = at::vec::fmadd(p, w, V(4.002169919e-1f));
  p = at::vec::fmadd(p, w, V(6.666641313e-1f));
  return at::vec::fmadd(z, at::vec::fmsub(p, w, a), a);
#endif
}
template <class S>
FUSEGRAD_FN Vec<S> pow(Vec<S> a, Vec<S> b) {
  return a.pow(b);
}
template <class S>
FUSEGRAD_FN Vec<S> absolute(Vec<S> a) {
  return a.abs();
}
template <class S>
FUSEGRAD_FN Vec<S> select(Vec<S> mask, Vec<S> yes, Vec<S> no) {
  return Vec<S>::blendv(no, yes, mask);
}
// To 3e-7: exp(-a^2 / 2) t q(t), t = 1 / (1 + 0.3 a) (a fit of least relative error, 4e-9). Vec::erf is off by 4e-7 of 1 with
// AVX-512, and Vec::erfc takes six times as long.
template <class S>
FUSEGRAD_FN Vec<S> normal_tail(Vec<S> a, [[maybe_unused]] Vec<S> exp_of_minus_half_square) {
#if !defined(CPU_CAPABILITY_DEFAULT)
  if constexpr (std::is_same_v<S, float>) {
    using V = Vec<float>;
    const V t = reciprocal(at::vec::fmadd(a, V(0.3f), V(1.0f)));
    V q = V(-2.062346414e-2f);
    for (const float c : {1.124355868e-1f, -2.282135338e-1f, 1.917844564e-1f, -7.942342013e-2f, 9.615679830e-2f, 7.838965952e-2f,
                          1.102354228e-1f, 1.195718125e-1f, 1.196866930e-1f})
      q = at::vec::fmadd(q, t, V(c));
    return q * t * exp_of_minus_half_square;
  }
#endif
  return Vec<S>(S(0.5)) * (a * Vec<S>(S(0.7071067811865476))).erfc();
}
template <class S>
FUSEGRAD_FN Vec<S> larger(Vec<S> a, Vec<S> b) {
  return at::vec::maximum(a, b);
}
template <class S>
FUSEGRAD_FN Vec<S> larger_number(Vec<S> a, Vec<S> b) {
  return at::vec::clamp_min(a, b);
}
template <class S>
FUSEGRAD_FN Vec<S> smaller(Vec<S> a, Vec<S> b) {
  return at::vec::minimum(a, b);
}
template <class S>
FUSEGRAD_FN Vec<S> clamped(Vec<S> a, Vec<S> low, Vec<S> high) {
  return at::vec::clamp(a, low, high);
}
template <class T, class S>
FUSEGRAD_FN Vec<S> rounded(Vec<S> a) {
  if constexpr (sizeof(T) == 2)
    return std::get<0>(at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(a, a)));
  else
    return a;
}

}  // namespace
}  // namespace fusegrad
#endif  // FUSEGRAD_SIMD

namespace fusegrad {

template <class A>
FUSEGRAD_FN auto lane(int64_t d) {
  return Lanes<A>::at(d);
}
template <class A>
FUSEGRAD_FN A sigmoid(A a) {
  return reciprocal(A(1) + exp(A(0) - a));
}
// log(1 + exp(a))
template <class A>
FUSEGRAD_FN A softplus(A a, A e /* exp(-|a|) */) {
  return larger(a, A(0)) + log1p_of_fraction(e);
}
template <class A>
FUSEGRAD_FN A softplus(A a) {
  return softplus(a, exp(A(0) - absolute(a)));
}
template <class A>
FUSEGRAD_FN A square(A a) {
  return a * a;
}

}  // namespace fusegrad
