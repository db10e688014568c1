// Runs a map op on the CPU: elements are spread over threads and SIMD lanes, rows only matter for where they lie in memory.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "simd.h"

namespace fusegrad {
namespace {

template <class Op, class T>
class MapCpu {
  using A = Vec<Acc<T>>;
  static constexpr int kChunk = kStep<A>;
  static constexpr int64_t kBlock = 4096;  // elements that one turn of the loop over threads takes
  static constexpr int64_t kGrain = 8;     // such turns

 public:
  explicit MapCpu(const MapArgs<Op>& args) : args(args) {}

  void run() const {
    const int64_t cols = args.extent.cols, rows = args.extent.rows;
    const int64_t per_row = (cols + kBlock - 1) / kBlock;
    const int64_t block = per_row > 1 ? kBlock : cols;
    // Turns are counted in elements: short rows share a turn's worth of work.
    const int64_t grain = std::max<int64_t>(1, kGrain * kBlock / std::max<int64_t>(1, block));
    at::parallel_for(0, rows * per_row, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = per_row > 1 ? i / per_row : i, c = (i - r * per_row) * kBlock;
        piece(r, c, std::min(kBlock, cols - c));
      }
    });
  }

 private:
  const MapArgs<Op>& args;

  void piece(int64_t r, int64_t first, int64_t n) const {
    const T* x[at_least_one(Op::in)];
    T* y[at_least_one(Op::out)];
    for (int i = 0; i < Op::in; ++i)
      x[i] = static_cast<const T*>(args.in[i].data) + args.extent.offset(args.in[i], r) + first * args.in[i].col;
    for (int i = 0; i < Op::out; ++i)
      y[i] = args.out[i].data ? static_cast<T*>(args.out[i].data) + args.extent.offset(args.out[i], r) + first : nullptr;
    int64_t c = 0;
    for (; c + kChunk <= n; c += kChunk) chunk<false>(x, y, c, kChunk);
    if (c < n) chunk<true>(x, y, c, n - c);
  }

  template <bool tail>
  FUSEGRAD_FN void chunk(const T* const* x, T* const* y, int64_t c, int64_t n) const {
    In<Op, A> in[2];
    for (int i = 0; i < Op::in; ++i) {
      A v[2];
      const int64_t step = args.in[i].col;
      if (step == 1) {
        tail ? load(x[i] + c, v, n) : load(x[i] + c, v);
      } else {
        T near[kChunk] = {};
        for (int64_t k = 0; k < n; ++k) near[k] = x[i][(c + k) * step];
        load(static_cast<const T*>(near), v);
      }
      in[0].x[i] = v[0], in[1].x[i] = v[1];
    }
    Out<Op, A> out[2];
    args.op.map(in[0], out[0]);
    args.op.map(in[1], out[1]);
    for (int i = 0; i < Op::out; ++i)
      if (y[i]) {
        const A v[2] = {out[0].y[i], out[1].y[i]};
        tail ? store(y[i] + c, v, n) : store(y[i] + c, v);
      }
  }
};

template <class Op>
struct MapOnCpu {
  static void launch(const MapArgs<Op>& args, void*) {
    for_types<false>(args.rows, args.rows, [&](auto t, auto) { MapCpu<Op, decltype(t)>(args).run(); });
  }
};

}  // namespace
}  // namespace fusegrad

#define FUSEGRAD_MAP(Op)                                                                                                           \
  namespace fusegrad {                                                                                                             \
  template <>                                                                                                                      \
  const Kernel<MapArgs<Op>> Kernels<MapArgs<Op>, FUSEGRAD_VARIANT>::entry = {MapOnCpu<Op>::launch, nullptr};                       \
  }
