// Runs a map op on a GPU: a team of threads takes a tile of a row, see Split.
#pragma once

#include "pack.cuh"

namespace fusegrad {
namespace {

template <class Op, class T, bool packed>
class MapCuda {
  using S = Acc<T>;
  static constexpr int kIn = at_least_one(Op::in), kOut = at_least_one(Op::out);
  static constexpr int V = packed ? kPack<T> : 1;

 public:
  static constexpr int K = packed ? (Op::in > 2 ? 2 : 4) : 16 / sizeof(T);
  static constexpr int kMaxThreads = 256;
  struct Args {
    MapArgs<Op> map;
    Split split;
  };

  static bool fits(const MapArgs<Op>& a) {
    bool yes = a.extent.cols >= V;
    for (int i = 0; i < Op::in; ++i) yes &= in_packs(a.in[i], a.extent, V);
    for (int i = 0; i < Op::out; ++i) yes &= in_packs(a.out[i], a.extent, V);
    return yes;
  }

  static void launch(const MapArgs<Op>& a, void* stream) {
    const Split s = split(a.extent.cols / V, V * sizeof(T), K, 1, kMaxThreads);
    const int64_t items = a.extent.rows * s.tiles, teams = s.threads / s.team;
    const int64_t blocks = std::min((items + teams - 1) / teams, int64_t(kBlocksPerSM) * multiprocessors());
    if (blocks > 0) fusegrad::launch<MapCuda>(blocks, s.threads, stream, {a, s});
  }

  static __device__ __forceinline__ void run(const Args& args) {
    const MapArgs<Op>& a = args.map;
    const Split& s = args.split;
    const int team = s.team, member = threadIdx.x & (team - 1), teams = blockDim.x / team;
    const int64_t count = a.extent.rows * s.tiles;
    Op op = a.op;
    op.begin();
    for (int64_t i = int64_t(blockIdx.x) * teams + threadIdx.x / team; i < count; i += int64_t(gridDim.x) * teams) {
      const int64_t r = s.tiles > 1 ? i / s.tiles : i, tile = i - r * s.tiles;
      const T* x[kIn];
      T* y[kOut];
#pragma unroll
      for (int j = 0; j < Op::in; ++j) x[j] = static_cast<const T*>(a.in[j].data) + a.extent.offset(a.in[j], r);
#pragma unroll
      for (int j = 0; j < Op::out; ++j)
        y[j] = a.out[j].data ? static_cast<T*>(a.out[j].data) + a.extent.offset(a.out[j], r) : nullptr;
      const int64_t number = Op::numbered ? a.extent.offset(a.number, r) : 0;
      const int64_t first = tile * K * team + member;
      T v[K][kIn][V];
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (first + k * team < s.packs) read<V>(a, x, first + k * team, v[k]);
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (first + k * team < s.packs) write<V>(a, op, number, v[k], y, first + k * team);
      // What is left of a row after its last pack.
      if (V > 1 && tile == s.tiles - 1)
        for (int64_t c = s.packs * V + member; c < a.extent.cols; c += team) {
          T one[kIn][1];
          read<1>(a, x, c, one);
          write<1>(a, op, number, one, y, c);
        }
    }
  }

 private:
  // Pack number p, of n elements.
  template <int n>
  static __device__ __forceinline__ void read(const MapArgs<Op>& a, const T* const* x, int64_t p, T (&v)[kIn][n]) {
#pragma unroll
    for (int j = 0; j < Op::in; ++j) load<n>(x[j] + p * (packed ? n : a.in[j].col), v[j]);
  }
  template <int n>
  static __device__ __forceinline__ void write(const MapArgs<Op>& a, const Op& op, int64_t number, const T (&v)[kIn][n],
                                               T* const* y, int64_t p) {
    T made[kOut][n];
#pragma unroll
    for (int e = 0; e < n; ++e) {
      In<Op, S> in;
      Out<Op, S> out;
      in.col = p * n + e;
      in.number = number + in.col * a.number.col;
#pragma unroll
      for (int j = 0; j < Op::in; ++j) in.x[j] = S(v[j][e]);
      op.map(in, out);
#pragma unroll
      for (int j = 0; j < Op::out; ++j) made[j][e] = T(out.y[j]);
    }
#pragma unroll
    for (int j = 0; j < Op::out; ++j)
      if (y[j]) store<n>(y[j] + p * (packed ? n : a.out[j].col), made[j]);
  }
};

template <class Op>
struct MapOnCuda {
  static void launch(const MapArgs<Op>& args, void* stream) {
    for_types<false>(args.rows, args.rows, [&](auto t, auto) {
      using Packed = MapCuda<Op, decltype(t), true>;
      Packed::fits(args) ? Packed::launch(args, stream) : MapCuda<Op, decltype(t), false>::launch(args, stream);
    });
  }
};

}  // namespace
}  // namespace fusegrad

#define FUSEGRAD_MAP(Op)                                                                                                           \
  namespace fusegrad {                                                                                                             \
  template <>                                                                                                                      \
  const Kernel<MapArgs<Op>> Kernels<MapArgs<Op>, kCuda>::entry = {MapOnCuda<Op>::launch, nullptr};                                 \
  }
