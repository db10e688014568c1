// Runs a map op on a GPU: a team of threads takes a tile of a row, see Split.
#pragma once

#include "pack.cuh"

namespace fusegrad {
namespace {

template <class Op, class T, bool packed>
class MapCuda {
  using S = Acc<T>;
  static constexpr int kIn = at_least_one(Op::in), kMixed = at_least_one(Op::mixed), kOut = at_least_one(Op::out);
  static constexpr int V = packed ? kPack<T> : 1;

 public:
  static constexpr int K = packed ? (Op::in + Op::mixed > 3 ? 1 : Op::in > 2 ? 2 : 4) : 16 / sizeof(T);
  static constexpr int kMaxThreads = 256;
  struct Args {
    MapArgs<Op> map;
    Split split;
  };

  static bool fits(const MapArgs<Op>& a) {
    bool yes = a.extent.cols >= V;
    for (int i = 0; i < Op::in; ++i) yes &= in_packs(a.in[i], a.extent, V);
    for (int i = 0; i < Op::mixed; ++i) yes &= mixed_in_packs(a.mixed[i], a.extent, V);
    for (int i = 0; i < Op::out; ++i) yes &= in_packs(a.out[i], a.extent, V);
    return yes;
  }

  static Split split_of(const MapArgs<Op>& a) { return split(a.extent.cols / V, V * sizeof(T), K, 1, kMaxThreads); }
  static int64_t blocks(const MapArgs<Op>& a, const Split& s) {
    const int64_t items = a.extent.rows * s.tiles, teams = s.threads / s.team;
    // A block takes the sums of all of its items: few blocks, that there be few sums.
    return std::min((items + teams - 1) / teams, int64_t(Op::sums > 0 ? 8 : kBlocksPerSM) * multiprocessors());
  }
  static void launch(const MapArgs<Op>& a, void* stream) {
    const Split s = split_of(a);
    const int64_t n = blocks(a, s);
    if (n > 0) fusegrad::launch<MapCuda>(n, s.threads, stream, {a, s});
  }

  static __device__ __forceinline__ void run(const Args& args) {
    const MapArgs<Op>& a = args.map;
    const Split& s = args.split;
    const int team = s.team, member = threadIdx.x & (team - 1), teams = blockDim.x / team;
    const int64_t count = a.extent.rows * s.tiles;
    Op op = a.op;
    op.begin();
    S sums[at_least_one(Op::sums)] = {};
    for (int64_t i = int64_t(blockIdx.x) * teams + threadIdx.x / team; i < count; i += int64_t(gridDim.x) * teams) {
      const int64_t r = s.tiles > 1 ? i / s.tiles : i, tile = i - r * s.tiles;
      const T* x[kIn];
      T* y[kOut];
      int64_t row_of_mixed[kMixed];
#pragma unroll
      for (int j = 0; j < Op::mixed; ++j) row_of_mixed[j] = a.extent.offset(a.mixed[j], r);
#pragma unroll
      for (int j = 0; j < Op::in; ++j) x[j] = static_cast<const T*>(a.in[j].data) + a.extent.offset(a.in[j], r);
#pragma unroll
      for (int j = 0; j < Op::out; ++j)
        y[j] = a.out[j].data ? static_cast<T*>(a.out[j].data) + a.extent.offset(a.out[j], r) : nullptr;
      const int64_t number = Op::numbered ? a.extent.offset(a.number, r) : 0;
      const int64_t first = tile * K * team + member;
      T v[K][kIn][V];
      S m[K][kMixed][V];
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (first + k * team < s.packs) read<V>(a, x, row_of_mixed, first + k * team, v[k], m[k]);
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (first + k * team < s.packs) write<V>(a, op, number, v[k], m[k], y, first + k * team, sums);
      // What is left of a row after its last pack.
      if (V > 1 && tile == s.tiles - 1)
        for (int64_t c = s.packs * V + member; c < a.extent.cols; c += team) {
          T one[kIn][1];
          S m_one[kMixed][1];
          read<1>(a, x, row_of_mixed, c, one, m_one);
          write<1>(a, op, number, one, m_one, y, c, sums);
        }
    }
    if constexpr (Op::sums > 0) {
      if (a.partial) write_sums(a, sums);
    }
  }

 private:
  // Pack number p, of n elements.
  template <int n>
  static __device__ __forceinline__ void read(const MapArgs<Op>& a, const T* const* x, const int64_t* row_of_mixed, int64_t p,
                                              T (&v)[kIn][n], S (&m)[kMixed][n]) {
#pragma unroll
    for (int j = 0; j < Op::in; ++j) load<n>(x[j] + p * (packed ? n : a.in[j].col), v[j]);
#pragma unroll
    for (int j = 0; j < Op::mixed; ++j)
      load_mixed<n>(a.mixed[j], row_of_mixed[j], p * (packed ? n : a.mixed[j].col), Op::absent, m[j]);
  }
  template <int n>
  static __device__ __forceinline__ void write(const MapArgs<Op>& a, const Op& op, int64_t number, const T (&v)[kIn][n],
                                               const S (&m)[kMixed][n], T* const* y, int64_t p, S* sums) {
    T made[kOut][n];
#pragma unroll
    for (int e = 0; e < n; ++e) {
      In<Op, S> in;
      Out<Op, S> out;
      in.col = p * n + e;
      in.number = number + in.col * a.number.col;
#pragma unroll
      for (int j = 0; j < Op::in; ++j) in.x[j] = S(v[j][e]);
#pragma unroll
      for (int j = 0; j < Op::mixed; ++j) in.m[j] = m[j][e];
      op.map(in, out);
#pragma unroll
      for (int j = 0; j < Op::sums; ++j) sums[j] += out.sum[j];
#pragma unroll
      for (int j = 0; j < Op::out; ++j) made[j][e] = T(out.y[j]);
    }
#pragma unroll
    for (int j = 0; j < Op::out; ++j)
      if (y[j]) store<n>(y[j] + p * (packed ? n : a.out[j].col), made[j]);
  }

  // Over the threads of the block, in a fixed order.
  static __device__ __forceinline__ void write_sums(const MapArgs<Op>& a, S* sums) {
    FUSEGRAD_SHARED(S, parts, at_least_one(Op::sums) * (kMaxThreads / 32));
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < Op::sums; ++j) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sums[j] += __shfl_xor_sync(~0u, sums[j], step);
      if (threadIdx.x % 32 == 0) parts[j * (kMaxThreads / 32) + warp] = sums[j];
    }
    __syncthreads();
    if (threadIdx.x < Op::sums) {
      S sum = S(0);
      for (int w = 0; w < warps; ++w) sum += parts[threadIdx.x * (kMaxThreads / 32) + w];
      static_cast<S*>(a.partial)[threadIdx.x * a.slices + blockIdx.x] = sum;
    }
  }
};

template <class Op>
class MapOnCuda {
  template <class F>
  static void with_program(const MapArgs<Op>& args, const F& f) {
    for_types<false>(args.rows, args.rows, [&](auto t, auto) {
      using Packed = MapCuda<Op, decltype(t), true>;
      using Single = MapCuda<Op, decltype(t), false>;
      Packed::fits(args) ? f(static_cast<Packed*>(nullptr)) : f(static_cast<Single*>(nullptr));
    });
  }

 public:
  static void launch(const MapArgs<Op>& args, void* stream) {
    with_program(args, [&](auto* program) { std::remove_pointer_t<decltype(program)>::launch(args, stream); });
  }
  static int64_t slices(const MapArgs<Op>& args) {
    int64_t n = 0;
    with_program(args, [&](auto* program) {
      using Program = std::remove_pointer_t<decltype(program)>;
      n = Program::blocks(args, Program::split_of(args));
    });
    return n;
  }
};

}  // namespace
}  // namespace fusegrad

#define FUSEGRAD_MAP(Op)                                                                                                           \
  namespace fusegrad {                                                                                                             \
  template <>                                                                                                                      \
  const Kernel<MapArgs<Op>> Kernels<MapArgs<Op>, kCuda>::entry = {MapOnCuda<Op>::launch, MapOnCuda<Op>::slices};                   \
  }
