// Memory to vectors and back, for the CPU drivers. The unit is two vectors of the accumulate type: one vector of a 16-bit type.
#pragma once

#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstring>

#include "row_op.h"

namespace fusegrad {
namespace {

template <class A>
constexpr int kStep = 2 * Lanes<A>::count;

// Lane i of the result is lane i + by of v, round the end.
template <class A>
FUSEGRAD_FN A lanes_down(const A& v, int by) {
  constexpr int n = Lanes<A>::count;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (n == 16)
    return _mm512_permutexvar_ps(
        _mm512_add_epi32(_mm512_set1_epi32(by), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)), v);
  else
    return _mm512_permutexvar_pd(_mm512_add_epi64(_mm512_set1_epi64(by), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)), v);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (n == 8) {
    return _mm256_permutevar8x32_ps(v, _mm256_add_epi32(_mm256_set1_epi32(by), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  } else {
    return by == 2 ? _mm256_permute4x64_pd(v, 0b01001110) : _mm256_permute4x64_pd(v, 0b00111001);
  }
#else
  Scalar<A> lanes[2 * n];
  v.store(lanes);
  v.store(lanes + n);
  return A::loadu(lanes + by);
#endif
}

// Between bfloat16 and float, in fewer instructions than at::vec takes: bfloat16 is the upper half of a float. rms_norm of
// 2048 x 2048 took 0.42 instead of 0.48 ms forward and 0.76 instead of 0.91 backward.
#if defined(CPU_CAPABILITY_AVX512)
FUSEGRAD_FN Vec<float> widened(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
// To nearest, ties to even, in the upper half.
FUSEGRAD_FN __m512i rounded_in_place(Vec<float> v) {
  const __m512i bits = _mm512_castps_si512(v), sum = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __m512i even =
      _mm512_mask_add_epi32(sum, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), sum, _mm512_set1_epi32(1));
  return _mm512_mask_mov_epi32(even, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
FUSEGRAD_FN Vec<BFloat16> narrowed(Vec<float> a, Vec<float> b) {
  alignas(64) static constexpr uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(rounded_in_place(a), _mm512_load_si512(upper), rounded_in_place(b));
}
constexpr bool kOwnBFloat16 = true;
#else
Vec<float> widened(const BFloat16*) = delete;
Vec<BFloat16> narrowed(Vec<float>, Vec<float>) = delete;
constexpr bool kOwnBFloat16 = false;
#endif

// False and true as 0 and 1. One by one they took softmax of 4096 x 1024 with such a mask from 2.5 to 8.8 ms.
#if defined(CPU_CAPABILITY_AVX512)
FUSEGRAD_FN Vec<float> widened(const bool* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
constexpr bool kOwnBool = true;
#elif defined(CPU_CAPABILITY_AVX2)
FUSEGRAD_FN Vec<float> widened(const bool* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
constexpr bool kOwnBool = true;
#else
Vec<float> widened(const bool*) = delete;
constexpr bool kOwnBool = false;
#endif

// Elements that are made vectors without a loop over them.
template <class T, class S>
constexpr bool kWidens = std::is_same_v<T, S> || (sizeof(S) == 4 && (sizeof(T) == 2 || (std::is_same_v<T, bool> && kOwnBool)));

template <class T, class A>
FUSEGRAD_FN void load(const T* p, A (&v)[2]) {
  static_assert(kWidens<T, Scalar<A>>);
  if constexpr (std::is_same_v<T, Scalar<A>>) {
    v[0] = A::loadu(p);
    v[1] = A::loadu(p + Lanes<A>::count);
  } else if constexpr (std::is_same_v<T, bool> || (std::is_same_v<T, BFloat16> && kOwnBFloat16)) {
    v[0] = widened(p);
    v[1] = widened(p + Lanes<A>::count);
  } else {
    const auto [lo, hi] = at::vec::convert_to_float<T>(Vec<T>::loadu(p));
    v[0] = lo, v[1] = hi;
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// The first n lanes. With loops over the ends of rows, rms_norm of 65536 x 65 took 2.6 times as long as one of 65536 x 64.
FUSEGRAD_FN __mmask32 first_lanes(int64_t n) { return n >= 32 ? ~__mmask32(0) : n > 0 ? (__mmask32(1) << n) - 1 : 0; }
template <class T, class A>
constexpr bool kMasked = sizeof(Scalar<A>) == 4 && (sizeof(T) == 2 || std::is_same_v<T, float>);
#endif

// Lanes from n on are 0, and not read.
template <class T, class A>
FUSEGRAD_FN void load(const T* p, A (&v)[2], int64_t n) {
  if (n >= kStep<A>) return load(p, v);
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kMasked<T, A>) {
    const __mmask32 mask = first_lanes(n);
    if constexpr (sizeof(T) == 4) {
      v[0] = _mm512_maskz_loadu_ps(__mmask16(mask), p);
      v[1] = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), p + 16);
    } else {
      alignas(64) T buffer[32];
      _mm512_store_si512(buffer, _mm512_maskz_loadu_epi16(mask, p));
      load(static_cast<const T*>(buffer), v);
    }
    return;
  }
#endif
  T buffer[kStep<A>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  load(static_cast<const T*>(buffer), v);
}

// Elements of a mixed input: of any type, one after the other or one for all.
struct Mixed {
  const char* data;  // null: not given
  DType type;
  int step;  // bytes, or 0

  explicit Mixed(const View& v, int64_t offset = 0)
      : data(v.data ? static_cast<const char*>(v.data) + offset * size_of(v.type) : nullptr),
        type(v.type),
        step(v.col == 0 ? 0 : size_of(v.type)) {}
  Mixed() = default;
};

template <class T, class A>
FUSEGRAD_FN void load_as(const Mixed& m, int64_t c, A (&v)[2], int64_t n) {
  using S = Scalar<A>;
  const T* const p = reinterpret_cast<const T*>(m.data + c * m.step);
  if (m.step == 0) {
    v[0] = v[1] = A(S(*p));
  } else if constexpr (kWidens<T, S>) {
    load(p, v, n);
  } else {
    S buffer[kStep<A>] = {};
    if (n >= kStep<A>) {
      for (int i = 0; i < kStep<A>; ++i) buffer[i] = S(p[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) buffer[i] = S(p[i]);
    }
    load(static_cast<const S*>(buffer), v);
  }
}
template <class A>
FUSEGRAD_FN void load(const Mixed& m, double absent, int64_t c, A (&v)[2], int64_t n) {
  if (!m.data) {
    v[0] = v[1] = A(Scalar<A>(absent));
    return;
  }
  switch (m.type) {
    case DType::f64: return load_as<double>(m, c, v, n);
    case DType::f32: return load_as<float>(m, c, v, n);
    case DType::f16: return load_as<Half>(m, c, v, n);
    case DType::bf16: return load_as<BFloat16>(m, c, v, n);
    case DType::boolean: return load_as<bool>(m, c, v, n);
  }
}

// n elements of so many bytes that are `step` elements apart.
inline void gather(char* to, const char* from, int64_t n, int64_t step, int size) {
  const auto copy = [&](auto word) {
    using W = decltype(word);
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * sizeof(W), from + i * step * sizeof(W), sizeof(W));
  };
  switch (size) {
    case 1: return copy(uint8_t{});
    case 2: return copy(uint16_t{});
    case 4: return copy(uint32_t{});
    default: return copy(uint64_t{});
  }
}

// Lane by lane to one, in a fixed order.
template <class A>
FUSEGRAD_FN Scalar<A> sum_of_lanes(A v) {
  for (int half = Lanes<A>::count / 2; half > 0; half /= 2) v = v + lanes_down(v, half);
  Scalar<A> first;
  std::memcpy(&first, &v, sizeof(first));
  return first;
}

// A store past the caches, to an aligned address: an ordinary one would first read the line that it overwrites.
template <class T>
FUSEGRAD_FN void store_past(T* p, const Vec<T>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512i bits;
  std::memcpy(&bits, &v, sizeof(bits));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
#elif defined(CPU_CAPABILITY_AVX2)
  __m256i bits;
  std::memcpy(&bits, &v, sizeof(bits));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
#else
  v.store(p);
#endif
}
// Stores past the caches are visible to other threads behind this.
inline void end_of_stores_past() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}
// Whether a call that moves so many bytes should store past the caches: its first results would be gone from them by its end. At
// the limit of 32 MB it takes 0.82 of the time, at half of it 0.94, where whoever reads the results would lose more.
inline bool beyond_caches(int64_t bytes) {
#if defined(__linux__)
  static const int64_t last_level = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), 8 << 20);
#else
  static const int64_t last_level = 32 << 20;
#endif
  return bytes >= last_level;
}
template <int n, class T>
FUSEGRAD_FN bool on_lines(T* const* y) {
  bool yes = true;
  for (int i = 0; i < n; ++i) yes &= reinterpret_cast<uintptr_t>(y[i]) % 64 == 0;
  return yes;
}

template <bool past = false, class T, class A>
FUSEGRAD_FN void store(T* p, const A (&v)[2]) {
  const auto put = [](auto* p, const auto& v) { past ? store_past(p, v) : v.store(p); };
  if constexpr (std::is_same_v<T, Scalar<A>>) {
    put(p, v[0]);
    put(p + Lanes<A>::count, v[1]);
  } else if constexpr (std::is_same_v<T, BFloat16> && kOwnBFloat16) {
    put(p, narrowed(v[0], v[1]));
  } else {
    put(p, at::vec::convert_from_float<T>(v[0], v[1]));
  }
}

template <class T, class A>
FUSEGRAD_FN void store(T* p, const A (&v)[2], int64_t n) {
  if (n >= kStep<A>) return store(p, v);
  alignas(64) T buffer[kStep<A>];
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kMasked<T, A>) {
    const __mmask32 mask = first_lanes(n);
    if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_ps(p, __mmask16(mask), v[0]);
      _mm512_mask_storeu_ps(p + 16, __mmask16(mask >> 16), v[1]);
    } else {
      store(static_cast<T*>(buffer), v);
      _mm512_mask_storeu_epi16(p, mask, _mm512_load_si512(buffer));
    }
    return;
  }
#endif
  store(static_cast<T*>(buffer), v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

}  // namespace
}  // namespace fusegrad
