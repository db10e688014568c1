// Memory to registers and back, and rows to threads, for the CUDA drivers.
#pragma once

#include <algorithm>
#include <cstring>

#include "launch.cuh"
#include "row_op.h"

namespace fusegrad {
namespace {

// What one access of a thread moves: 16 bytes, or a single element.
template <int bytes>
struct BitsOf;
template <>
struct BitsOf<1> {
  using Type = unsigned char;
};
template <>
struct BitsOf<2> {
  using Type = unsigned short;
};
template <>
struct BitsOf<4> {
  using Type = unsigned int;
};
template <>
struct BitsOf<8> {
  using Type = unsigned long long;
};
template <>
struct BitsOf<16> {
  using Type = uint4;
};
template <class T, int n>
using Bits = typename BitsOf<n * sizeof(T) < 16 ? n * sizeof(T) : 16>::Type;

// Of memory that nobody writes while the kernel runs.
template <int n, class T>
__device__ __forceinline__ void load(const T* p, T (&v)[n]) {
  using B = Bits<T, n>;
#pragma unroll
  for (int i = 0; i < int(sizeof(v) / sizeof(B)); ++i) {
    const B bits = __ldg(reinterpret_cast<const B*>(p) + i);
    memcpy(reinterpret_cast<char*>(v) + i * sizeof(B), &bits, sizeof(B));
  }
}
// Of memory that this thread has written.
template <int n, class T>
__device__ __forceinline__ void load_back(const T* p, T (&v)[n]) {
  using B = Bits<T, n>;
#pragma unroll
  for (int i = 0; i < int(sizeof(v) / sizeof(B)); ++i) {
    const B bits = reinterpret_cast<const B*>(p)[i];
    memcpy(reinterpret_cast<char*>(v) + i * sizeof(B), &bits, sizeof(B));
  }
}
template <int n, class T>
__device__ __forceinline__ void store(T* p, const T (&v)[n]) {
  using B = Bits<T, n>;
#pragma unroll
  for (int i = 0; i < int(sizeof(v) / sizeof(B)); ++i) {
    B bits;
    memcpy(static_cast<void*>(&bits), reinterpret_cast<const char*>(v) + i * sizeof(B), sizeof(B));
    reinterpret_cast<B*>(p)[i] = bits;
  }
}

// n elements of a mixed input from number c on, which may be one for all.
template <int n, class T, class S>
__device__ __forceinline__ void load_as(const void* p, int64_t c, bool one, S (&v)[n]) {
  T stored[n];
  if (one) {
    const T same = *static_cast<const T*>(p);
#pragma unroll
    for (int e = 0; e < n; ++e) stored[e] = same;
  } else {
    load<n>(static_cast<const T*>(p) + c, stored);
  }
#pragma unroll
  for (int e = 0; e < n; ++e) v[e] = S(stored[e]);
}
template <int n, class S>
__device__ __forceinline__ void load_mixed(const View& view, int64_t row, int64_t c, double absent, S (&v)[n]) {
  if (!view.data) {
#pragma unroll
    for (int e = 0; e < n; ++e) v[e] = S(absent);
    return;
  }
  const void* const p = static_cast<const char*>(view.data) + row * size_of(view.type);
  const bool one = view.col == 0;
  switch (view.type) {
    case DType::f64: return load_as<n, double>(p, c, one, v);
    case DType::f32: return load_as<n, float>(p, c, one, v);
    case DType::f16: return load_as<n, Half>(p, c, one, v);
    case DType::bf16: return load_as<n, BFloat16>(p, c, one, v);
    case DType::boolean: return load_as<n, bool>(p, c, one, v);
  }
}

template <class T>
constexpr int kPack = 16 / sizeof(T);

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// True if every row of the view can be read in packs of n elements. A view that is not given can.
inline bool in_packs(const View& v, const Extent& extent, int n) {
  if (!v.data) return true;
  bool yes = v.col == 1 && aligned(v.data);
  for (int d = 0; d < extent.dims; ++d) yes &= extent.size[d] == 1 || v.stride[d] % n == 0;
  return yes;
}

inline bool mixed_in_packs(const View& v, const Extent& extent, int n) {
  if (!v.data) return true;
  const int bytes = std::min(16, n * size_of(v.type));
  bool yes = v.col == 0 || (v.col == 1 && reinterpret_cast<uintptr_t>(v.data) % bytes == 0);
  for (int d = 0; d < extent.dims; ++d) yes &= v.col == 0 || extent.size[d] == 1 || v.stride[d] % n == 0;
  return yes;
}

constexpr int kMaxTeam = 512;     // threads on a row; 512 can have 128 registers each
constexpr int kBlock = 128;       // threads in a block of smaller teams
constexpr int kBlocksPerSM = 64;  // of a grid that is larger than that: several times what is resident at once

// How a row is dealt to threads: in tiles of K packs for each thread of its team.
struct Split {
  int team;       // threads on a row, a power of two: part of a warp, a warp or a block
  int threads;    // in a block
  int64_t packs;  // in a row
  int tiles;      // in a row
};

inline Split split(int64_t packs, int pack_bytes, int k, int team = 1, int max_team = kMaxTeam) {
  // Neighbours in a team read at least 64 bytes next to each other.
  const int least = std::min(32, 64 / pack_bytes);
  while (team < max_team && (int64_t(team) * k < packs || (team < least && team < packs))) team *= 2;
  const int64_t tile = int64_t(team) * k;
  return {team, team > 32 ? team : kBlock, packs, int((packs + tile - 1) / tile)};
}

}  // namespace
}  // namespace fusegrad
