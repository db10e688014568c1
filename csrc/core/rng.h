// Random bits by number, and dropout made of them. Draw i of a seed is a function of (seed, i) and of nothing else, so that it is
// the same in any layout, on any device, for any number of threads, and again in the backward: nothing has to be stored.
//
// The generator takes three rounds of multiply and fold (Appleby's multipliers of MurmurHash3), each under a key of its own, of the
// lower 32 bits of i; the keys are hashed from the seed and the upper 32 bits of i by SplitMix64 (Steele, Lea & Flood 2014,
// "Fast splittable pseudorandom number generators"). It is one value per lane from three 32-bit multiplications, where a
// Philox-4x32 round (Salmon et al. 2011) takes two widening ones, ten times, for four values that lie across the lanes. For one key
// it is a permutation of the 32-bit numbers. tests/core/test_functors.cpp holds its avalanche against chance, tests/test_dropout.py
// the masks.
#pragma once

#include "numeric.h"

namespace fusegrad {

#ifdef FUSEGRAD_SIMD
// n lanes of integers, with the operators of C.
template <class T, int n>
struct Ints {
  typedef T Type __attribute__((vector_size(n * sizeof(T))));
};
#endif

class Random {
 public:
  Random() = default;
  FUSEGRAD_FN explicit Random(uint64_t seed, uint32_t block = 0) : seed_(seed) {
    const uint64_t state = mix(seed + kGolden) ^ block, a = mix(state + kGolden), b = mix(state + 2 * kGolden);
    key_[0] = uint32_t(a), key_[1] = uint32_t(a >> 32), key_[2] = uint32_t(b);
  }

  // Draw number i, of 31 bits.
  FUSEGRAD_FN int32_t draw(int64_t i) const {
    const uint32_t block = uint32_t(uint64_t(i) >> 32);
    return int32_t((block == 0 ? *this : Random(seed_, block)).hashed(uint32_t(i)) >> 1);
  }

#ifdef FUSEGRAD_SIMD
  // Draws number i, i + step, ..., i + (n - 1) step.
  template <int n>
  FUSEGRAD_FN typename Ints<int32_t, n>::Type draws(int64_t i, int64_t step) const {
    typename Ints<int32_t, n>::Type each{};
    if (__builtin_expect((i | (i + (n - 1) * step)) >> 32, 0)) {
      for (int lane = 0; lane < n; ++lane) each[lane] = draw(i + lane * step);
      return each;
    }
    typename Ints<uint32_t, n>::Type number{};
    for (int lane = 0; lane < n; ++lane) number[lane] = lane;
    number = hashed(number * uint32_t(step) + uint32_t(i)) >> 1;
    __builtin_memcpy(&each, &number, sizeof(each));
    return each;
  }
#endif

 private:
  static constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio, odd
  uint64_t seed_ = 0;
  uint32_t key_[3] = {};

  FUSEGRAD_FN static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  template <class U>
  FUSEGRAD_FN U hashed(U x) const {
    x = x ^ key_[0];
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 15) ^ key_[1]) * 0xc2b2ae35u;
    x = (x ^ (x >> 15) ^ key_[2]) * 0x9e3779b1u;
    return x ^ (x >> 16);
  }
};

// Dropout of probability p: what element i is multiplied by. The seed is read by the kernel, which says begin() and then factor();
// i is the element's number in the tensor as its owner indexes it, wherever it lies in memory.
class Dropout {
 public:
  Dropout() = default;  // drops nothing
  // A draw is one of 2^31 numbers; the first p 2^31 of them drop, which is none for p = 0 and all for p = 1.
  Dropout(const int64_t* seed, double p)
      : seed_(seed), last_(int32_t(int64_t(p * 2147483648.0 + 0.5) - 1)), scale_(p < 1 ? 1 / (1 - p) : 0) {}

  FUSEGRAD_FN void begin() {
    if (seed_) random_ = Random(uint64_t(*seed_));
  }
  // For element i, or for i, i + step, ... if A is a vector.
  template <class A>
  FUSEGRAD_FN A factor(int64_t i, [[maybe_unused]] int64_t step = 1) const {
    const A scale = A(Scalar<A>(scale_));
    if constexpr (is_scalar<A>) {
      return random_.draw(i) > last_ ? scale : A(0);
    } else {
#ifdef FUSEGRAD_SIMD
      return select(kept<A>(i, step), scale, A(0));
#endif
    }
  }

 private:
  const int64_t* seed_ = nullptr;
  int32_t last_ = -1;
  double scale_ = 1;
  Random random_;

#ifdef FUSEGRAD_SIMD
  template <class A>
  FUSEGRAD_FN A kept(int64_t i, int64_t step) const {
    constexpr int n = Lanes<A>::count;
    using Wide = typename Ints<std::conditional_t<sizeof(Scalar<A>) == 8, int64_t, int32_t>, n>::Type;
    const Wide mask = __builtin_convertvector(random_.draws<n>(i, step) > last_, Wide);
    A lanes;
    static_assert(sizeof(lanes) == sizeof(mask));
    __builtin_memcpy(static_cast<void*>(&lanes), &mask, sizeof(lanes));
    return lanes;
  }
#endif
};

}  // namespace fusegrad
