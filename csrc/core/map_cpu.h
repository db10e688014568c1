// Runs a map op on the CPU: elements are spread over threads and SIMD lanes, rows only matter for where they lie in memory.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "simd.h"

namespace fusegrad {
namespace {

// The usual mixed inputs, which leave nothing to be decided at each step: elements of the rows' type T, or one value for all.
template <class A, class T, int count>
struct Settled {
  const T* data[at_least_one(count)];  // null: the value
  A value[at_least_one(count)];

  // False if they are not like that.
  bool from(const Mixed* m, double absent) {
    constexpr DType type = std::is_same_v<T, double>  ? DType::f64
                           : std::is_same_v<T, float> ? DType::f32
                           : std::is_same_v<T, Half>  ? DType::f16
                                                      : DType::bf16;
    for (int i = 0; i < count; ++i) {
      const bool one = !m[i].data || m[i].step == 0;
      if (!one && m[i].type != type) return false;
      data[i] = one ? nullptr : reinterpret_cast<const T*>(m[i].data);
      A v[2] = {A(Scalar<A>(0)), A(Scalar<A>(0))};
      if (one) load(m[i], absent, 0, v, kStep<A>);
      value[i] = v[0];
    }
    return true;
  }
};

template <class Op, class T>
class MapCpu {
  using A = Vec<Acc<T>>;
  static constexpr int kChunk = kStep<A>;
  static constexpr int64_t kBlock = 4096;  // elements that one turn of the loop over threads takes
  static constexpr int64_t kGrain = 8;     // such turns
  static constexpr int64_t kNear = 512;    // elements that are gathered at a time
  static constexpr int64_t kLong = 256;    // columns of a row that is read where it lies

 public:
  explicit MapCpu(const MapArgs<Op>& args)
      : args(args),
        op(args.op),
        past(beyond_caches(args.extent.rows * args.extent.cols * int64_t(sizeof(T)) * (Op::in + Op::out))) {}

  static_assert(!(Op::numbered && Op::sums > 0));
  static int64_t slices(const MapArgs<Op>& args) { return (args.extent.rows * args.extent.cols + kBlock - 1) / kBlock; }

  void run() const {
    if constexpr (Op::sums > 0) {
      if (args.partial) return run_sums();
    }
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
    Mixed m[at_least_one(Op::mixed)];
    T* y[at_least_one(Op::out)];
    bool dense = true;
    for (int i = 0; i < Op::in; ++i) {
      x[i] = static_cast<const T*>(args.in[i].data) + args.extent.offset(args.in[i], r) + first * args.in[i].col;
      dense &= args.in[i].col == 1;
    }
    for (int i = 0; i < Op::mixed; ++i) {
      m[i] = Mixed(args.mixed[i], args.extent.offset(args.mixed[i], r) + first * args.mixed[i].col);
      dense &= args.mixed[i].col == 1 || args.mixed[i].col == 0;
    }
    for (int i = 0; i < Op::out; ++i)
      y[i] = args.out[i].data ? static_cast<T*>(args.out[i].data) + args.extent.offset(args.out[i], r) + first : nullptr;
    const int64_t number = Op::numbered ? args.extent.offset(args.number, r) + first * args.number.col : 0;
    dense ? chunks(x, m, y, n, number) : gathered(x, m, y, n, number);
  }

  // Inputs whose elements are apart are gathered a few at a time.
  void gathered(const T* const* x, const Mixed* m, T* const* y, int64_t n, int64_t number) const {
    T near[at_least_one(Op::in)][kNear];
    alignas(8) char near_mixed[at_least_one(Op::mixed)][Op::mixed > 0 ? kNear * 8 : 1];
    for (int64_t c = 0; c < n; c += kNear) {
      const int64_t count = std::min(kNear, n - c);
      const T* from[at_least_one(Op::in)];
      Mixed mixed[at_least_one(Op::mixed)];
      T* to[at_least_one(Op::out)];
      for (int i = 0; i < Op::in; ++i) {
        const int64_t step = args.in[i].col;
        from[i] = step == 1 ? x[i] + c : near[i];
        if (step != 1)
          for (int64_t k = 0; k < count; ++k) near[i][k] = x[i][(c + k) * step];
      }
      for (int i = 0; i < Op::mixed; ++i) {
        const int64_t step = args.mixed[i].col;
        mixed[i] = m[i];
        if (!m[i].data || step == 0) continue;
        mixed[i].data = step == 1 ? m[i].data + c * m[i].step : near_mixed[i];
        if (step != 1) gather(near_mixed[i], m[i].data + c * step * m[i].step, count, step, m[i].step);
      }
      for (int i = 0; i < Op::out; ++i) to[i] = y[i] ? y[i] + c : nullptr;
      chunks(from, mixed, to, count, number + c * args.number.col);
    }
  }

  // Calls f(mixed inputs), settled if they can be: with a choice of type at each step, bce backward took 1.3 times as long in
  // float32 (4096 x 1024).
  template <class F>
  static void with_mixed(const Mixed* m, const F& f) {
    if constexpr (Op::mixed > 0) {
      Settled<A, T, Op::mixed> settled;
      if (settled.from(m, Op::absent)) return f(settled);
    }
    f(m);
  }

  void chunks(const T* const* x, const Mixed* m, T* const* y, int64_t n, int64_t number) const {
    with_mixed(m, [&](const auto& m) {
      past&& on_lines<Op::out>(y) ? chunks<true>(x, m, y, n, number) : chunks<false>(x, m, y, n, number);
    });
  }

  template <bool past, class M>
  void chunks(const T* const* x, const M& m, T* const* y, int64_t n, int64_t number) const {
    int64_t c = 0;
    for (; c + kChunk <= n; c += kChunk) chunk<false, past>(x, m, y, c, kChunk, number);
    if (c < n) chunk<true, false>(x, m, y, c, n - c, number);
  }

  FUSEGRAD_FN static void load_mixed(const Mixed* m, int i, int64_t c, A (&v)[2], int64_t n) { load(m[i], Op::absent, c, v, n); }
  FUSEGRAD_FN static void load_mixed(const Settled<A, T, Op::mixed>& m, int i, int64_t c, A (&v)[2], int64_t n) {
    if (m.data[i])
      load(m.data[i] + c, v, n);
    else
      v[0] = v[1] = m.value[i];
  }

  template <bool tail, class M>
  FUSEGRAD_FN void map(const T* const* x, const M& m, int64_t c, int64_t n, int64_t number, Out<Op, A> (&out)[2]) const {
    In<Op, A> in[2];
    for (int i = 0; i < 2; ++i) in[i].number = number + (c + i * Lanes<A>::count) * args.number.col, in[i].apart = args.number.col;
#pragma GCC unroll 8
    for (int i = 0; i < Op::in; ++i) {
      A v[2];
      tail ? load(x[i] + c, v, n) : load(x[i] + c, v);
      in[0].x[i] = v[0], in[1].x[i] = v[1];
    }
#pragma GCC unroll 8
    for (int i = 0; i < Op::mixed; ++i) {
      A v[2];
      load_mixed(m, i, c, v, tail ? n : kChunk);
      in[0].m[i] = v[0], in[1].m[i] = v[1];
    }
    op.map(in[0], out[0]);
    op.map(in[1], out[1]);
  }

  template <bool tail, bool past, class M>
  FUSEGRAD_FN void chunk(const T* const* x, const M& m, T* const* y, int64_t c, int64_t n, int64_t number) const {
    Out<Op, A> out[2];
    map<tail>(x, m, c, n, number, out);
#pragma GCC unroll 8
    for (int i = 0; i < Op::out; ++i)
      if (y[i]) {
        const A v[2] = {out[0].y[i], out[1].y[i]};
        tail ? store(y[i] + c, v, n) : store<past>(y[i] + c, v);
      }
  }

  // The elements in the order of their numbers, whatever lies where: a layout, or a number of threads, changes no bit of a sum.
  void run_sums() const {
    at::parallel_for(0, args.slices, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) slice(s);
    });
  }

  void slice(int64_t s) const {
    const int64_t cols = args.extent.cols, first = s * kBlock, end = std::min(first + kBlock, args.extent.rows * cols);
    // Rows over whose ends no vector reaches are read where they lie, unless they are so short that the beginning of each counts.
    // mse_loss of strided bfloat16, ns an element: rows of 1024 in place 0.18 (contiguous 0.16), of 256 0.25; brought together rows
    // of 128 0.44, of 32 0.62, which took 1.3 times as long in place.
    bool in_place = args.extent.rows == 1 || (cols % kChunk == 0 && cols >= kLong);
    for (int i = 0; i < Op::in; ++i) in_place &= args.in[i].col == 1;
    for (int i = 0; i < Op::mixed; ++i) in_place &= !args.mixed[i].data || args.mixed[i].col <= 1;
    A sum[at_least_one(Op::sums)][2];
    for (int i = 0; i < Op::sums; ++i) sum[i][0] = sum[i][1] = A(Acc<T>(0));
    for (int64_t c = first, n; c < end; c += n) {
      n = in_place ? std::min(cols - c % cols, end - c) : end - c;
      add_numbered(sum, c, n, in_place);
    }
    for (int i = 0; i < Op::sums; ++i)
      static_cast<Acc<T>*>(args.partial)[i * args.slices + s] = sum_of_lanes(sum[i][0] + sum[i][1]);
  }

  void add_numbered(A (*sum)[2], int64_t first, int64_t n, bool in_place) const {
    constexpr int W = Lanes<A>::count;
    const int64_t r = first / args.extent.cols, column = first - r * args.extent.cols;
    alignas(8) char near[Op::in + Op::mixed][kBlock * 8];
    const T* x[at_least_one(Op::in)];
    Mixed m[at_least_one(Op::mixed)];
    for (int i = 0; i < Op::in; ++i)
      x[i] = in_place ? static_cast<const T*>(args.in[i].data) + args.extent.offset(args.in[i], r) + column
                      : reinterpret_cast<const T*>(numbered(args.in[i], sizeof(T), first, n, near[i]));
    for (int i = 0; i < Op::mixed; ++i) {
      const View& v = args.mixed[i];
      m[i] = Mixed(v, in_place ? args.extent.offset(v, r) + column * v.col : 0);
      if (in_place || !m[i].data || (m[i].step == 0 && args.extent.rows == 1)) continue;
      m[i].step = size_of(m[i].type);
      m[i].data = numbered(v, m[i].step, first, n, near[Op::in + i]);
    }
    with_mixed(m, [&](const auto& m) {
      Out<Op, A> out[2];
      int64_t c = 0;
      for (; c + kChunk <= n; c += kChunk) {
        map<false>(x, m, c, kChunk, 0, out);
        for (int i = 0; i < Op::sums; ++i) sum[i][0] = sum[i][0] + out[0].sum[i], sum[i][1] = sum[i][1] + out[1].sum[i];
      }
      if (c < n) {
        map<true>(x, m, c, n - c, 0, out);
        for (int i = 0; i < Op::sums; ++i) {
          sum[i][0] = select(Lanes<A>::first(n - c), sum[i][0] + out[0].sum[i], sum[i][0]);
          sum[i][1] = select(Lanes<A>::first(n - c - W), sum[i][1] + out[1].sum[i], sum[i][1]);
        }
      }
    });
  }

  // Elements [first, first + n): where they lie if that is one after the other, else brought together.
  const char* numbered(const View& v, int size, int64_t first, int64_t n, char* near) const {
    const int64_t cols = args.extent.cols;
    const auto at = [&](int64_t r, int64_t c) {
      return static_cast<const char*>(v.data) + (args.extent.offset(v, r) + c * v.col) * size;
    };
    int64_t r = first / cols, c = first - r * cols, expected = cols;
    bool dense = v.col == 1;
    if (c + n > cols)
      for (int d = args.extent.dims - 1; d >= 0; expected *= args.extent.size[d--]) dense &= v.stride[d] == expected;
    if (dense) return at(r, c);
    for (int64_t done = 0; done < n; ++r, c = 0) {
      const int64_t count = std::min(cols - c, n - done);
      if (v.col == 1)
        std::memcpy(near + done * size, at(r, c), count * size);
      else
        gather(near + done * size, at(r, c), count, v.col, size);
      done += count;
    }
    return near;
  }
};

template <class Op>
struct MapOnCpu {
  static void launch(const MapArgs<Op>& args, void*) {
    for_types<false>(args.rows, args.rows, [&](auto t, auto) { MapCpu<Op, decltype(t)>(args).run(); });
  }
  static int64_t slices(const MapArgs<Op>& args) { return MapCpu<Op, float>::slices(args); }
};

}  // namespace
}  // namespace fusegrad

#define FUSEGRAD_MAP(Op)                                                                                                           \
  namespace fusegrad {                                                                                                             \
  template <>                                                                                                                      \
  const Kernel<MapArgs<Op>> Kernels<MapArgs<Op>, FUSEGRAD_VARIANT>::entry = {MapOnCpu<Op>::launch, MapOnCpu<Op>::slices};          \
  }
