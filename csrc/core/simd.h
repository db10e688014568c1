// Memory to vectors and back, for the CPU drivers. The unit is two vectors of the accumulate type: one vector of a 16-bit type.
#pragma once

#include "row_op.h"

namespace fusegrad {
namespace {

template <class A>
constexpr int kStep = 2 * Lanes<A>::count;

template <class T, class A>
FUSEGRAD_FN void load(const T* p, A (&v)[2]) {
  if constexpr (std::is_same_v<T, Scalar<A>>) {
    v[0] = A::loadu(p);
    v[1] = A::loadu(p + Lanes<A>::count);
  } else if constexpr (sizeof(T) == 2) {
    const auto [lo, hi] = at::vec::convert_to_float<T>(Vec<T>::loadu(p));
    v[0] = lo, v[1] = hi;
  }
}

// Lanes from n on are 0, and not read.
template <class T, class A>
FUSEGRAD_FN void load(const T* p, A (&v)[2], int64_t n) {
  if (n >= kStep<A>) return load(p, v);
  T buffer[kStep<A>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  load(static_cast<const T*>(buffer), v);
}

template <class T, class A>
FUSEGRAD_FN void store(T* p, const A (&v)[2]) {
  if constexpr (std::is_same_v<T, Scalar<A>>) {
    v[0].store(p);
    v[1].store(p + Lanes<A>::count);
  } else {
    at::vec::convert_from_float<T>(v[0], v[1]).store(p);
  }
}

template <class T, class A>
FUSEGRAD_FN void store(T* p, const A (&v)[2], int64_t n) {
  if (n >= kStep<A>) return store(p, v);
  T buffer[kStep<A>];
  store(static_cast<T*>(buffer), v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

}  // namespace
}  // namespace fusegrad
