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
  explicit MapCpu(const MapArgs<Op>& args)
      : args(args),
        op(args.op),
        past(beyond_caches(args.extent.rows * args.extent.cols * int64_t(sizeof(T)) * (Op::in + Op::out))) {}

  void run() const {
    const int64_t cols = args.extent.cols, rows = args.extent.rows;
    const int64_t per_row = (cols + kBlock - 1) / kBlock;
    const int64_t block = per_row > 1 ? kBlock : cols;
    // Turns are counted in elements: short rows share a turn's worth of work.
    const int64_t grain = std::max<int64_t>(1, kGrain * kBlock / std::max<int64_t>(1, block));
    at::parallel_for(0, rows * per_row, grain, [&](int64_t begin, int64_t end) {
      MapCpu mine(*this);
      mine.op.begin();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = per_row > 1 ? i / per_row : i, c = (i - r * per_row) * kBlock;
        mine.piece(r, c, std::min(kBlock, cols - c));
      }
      if (past) end_of_stores_past();
    });
  }

 private:
  const MapArgs<Op>& args;
  Op op;
  const bool past;

  void piece(int64_t r, int64_t first, int64_t n) const {
    const T* x[at_least_one(Op::in)];
    T* y[at_least_one(Op::out)];
    bool dense = true;
    for (int i = 0; i < Op::in; ++i) {
      x[i] = static_cast<const T*>(args.in[i].data) + args.extent.offset(args.in[i], r) + first * args.in[i].col;
      dense &= args.in[i].col == 1;
    }
    for (int i = 0; i < Op::out; ++i)
      y[i] = args.out[i].data ? static_cast<T*>(args.out[i].data) + args.extent.offset(args.out[i], r) + first : nullptr;
    const int64_t number = Op::numbered ? args.extent.offset(args.number, r) + first * args.number.col : 0;
    dense ? chunks(x, y, n, number) : gathered(x, y, n, number);
  }

  // Inputs whose elements are apart are gathered a few at a time.
  void gathered(const T* const* x, T* const* y, int64_t n, int64_t number) const {
    constexpr int64_t kNear = 512;
    T near[at_least_one(Op::in)][kNear];
    for (int64_t c = 0; c < n; c += kNear) {
      const int64_t m = std::min(kNear, n - c);
      const T* from[at_least_one(Op::in)];
      T* to[at_least_one(Op::out)];
      for (int i = 0; i < Op::in; ++i) {
        const int64_t step = args.in[i].col;
        from[i] = step == 1 ? x[i] + c : near[i];
        if (step != 1)
          for (int64_t k = 0; k < m; ++k) near[i][k] = x[i][(c + k) * step];
      }
      for (int i = 0; i < Op::out; ++i) to[i] = y[i] ? y[i] + c : nullptr;
      chunks(from, to, m, number + c * args.number.col);
    }
  }

  void chunks(const T* const* x, T* const* y, int64_t n, int64_t number) const {
    past&& on_lines<Op::out>(y) ? chunks<true>(x, y, n, number) : chunks<false>(x, y, n, number);
  }

  template <bool past>
  void chunks(const T* const* x, T* const* y, int64_t n, int64_t number) const {
    int64_t c = 0;
    for (; c + kChunk <= n; c += kChunk) chunk<false, past>(x, y, c, kChunk, number);
    if (c < n) chunk<true, false>(x, y, c, n - c, number);
  }

  template <bool tail, bool past>
  FUSEGRAD_FN void chunk(const T* const* x, T* const* y, int64_t c, int64_t n, int64_t number) const {
    In<Op, A> in[2];
    for (int i = 0; i < 2; ++i) in[i].number = number + (c + i * Lanes<A>::count) * args.number.col, in[i].apart = args.number.col;
#pragma GCC unroll 8
    for (int i = 0; i < Op::in; ++i) {
      A v[2];
      tail ? load(x[i] + c, v, n) : load(x[i] + c, v);
      in[0].x[i] = v[0], in[1].x[i] = v[1];
    }
    Out<Op, A> out[2];
    op.map(in[0], out[0]);
    op.map(in[1], out[1]);
#pragma GCC unroll 8
    for (int i = 0; i < Op::out; ++i)
      if (y[i]) {
        const A v[2] = {out[0].y[i], out[1].y[i]};
        tail ? store(y[i] + c, v, n) : store<past>(y[i] + c, v);
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
