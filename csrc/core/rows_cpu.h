// Runs a row op on the CPU: rows are spread over threads, a row's columns over SIMD lanes.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "simd.h"

namespace fusegrad {
namespace {

// Below this many elements one thread is faster than waking a second one.
constexpr int64_t kGrain = 32768;

template <class Op, class T, class P>
class RowsCpu {
  using S = Acc<T>;
  using A = Vec<S>;
  using Row = typename Op::template Row<S>;
  static constexpr int W = Lanes<A>::count;
  static constexpr int kChunk = kStep<A>;
  // A tensor whose columns are apart is gathered this many rows at a time: for a transposed one that is a cache line of each
  // column.
  static constexpr int64_t kBlock = 64 / sizeof(T);
  // Rows up to this length are fetched into the caches while those before are written, which keeps the memory busy in between:
  // rms_norm backward took 0.75 (float32, 2048 x 2048) to 0.9 of the time without it.
  static constexpr int64_t kAhead = 65536 / sizeof(T) / at_least_one(Op::in);
  // So many rows of up to kShort columns in all go through each sweep together, so that none waits for the sum of another: a
  // layer norm of 65536 x 64 in bfloat16 took 0.67 of the time, one of 32768 x 256 0.81.
  static constexpr int64_t kTogether = 8, kShort = 512;
  static constexpr int64_t kMostKept = 32768;  // columns, while what is kept of a row stays in a cache of its core

 public:
  explicit RowsCpu(const RowArgs<Op>& args)
      : args(args),
        cols(args.extent.cols),
        padded((cols + kChunk - 1) / kChunk * kChunk),
        together(std::clamp<int64_t>(kShort / std::max<int64_t>(1, cols), 1, kTogether)),
        past(Op::out > 0 && beyond_caches(args.extent.rows * cols * int64_t(sizeof(T)) * (Op::in + Op::out))) {
    for (int i = 0; i < Op::in; ++i) gathered += args.in[i].col != 1;
    for (int i = 0; i < Op::out; ++i) scattered += args.out[i].data && args.out[i].col != 1;
    for (int i = 0; i < Op::mixed; ++i) apart |= args.mixed[i].data && args.mixed[i].col > 1;
  }

  void run() const {
    if constexpr (Op::col_out > 0) {
      if (args.sums_columns()) return run_slices();
    }
    at::parallel_for(0, args.extent.rows, grain(),
                     [&](int64_t begin, int64_t end) { rows<false>(begin, end, 0, scratch_for(end - begin)); });
  }

  // The sums over the rows, from those of the slices.
  void add_up() const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args.slices));
    at::parallel_for(0, args.sets * cols, grain, [&](int64_t begin, int64_t end) {
      for (int i = 0; i < Op::col_out; ++i)
        if (args.col_out[i])
          i < Op::col_out - Op::wide_cols ? add_slices(i, static_cast<P*>(args.col_out[i]), begin, end)
                                          : add_slices(i, static_cast<S*>(args.col_out[i]), begin, end);
    });
  }

 private:
  const RowArgs<Op>& args;
  const int64_t cols, padded, together;
  const bool past;
  int gathered = 0, scattered = 0;
  bool apart = false;  // a mixed input

  // Of a row: where its columns lie next to each other, here or gathered.
  struct Source {
    const T* x[at_least_one(Op::in)];
    Mixed m[at_least_one(Op::mixed)];
    S* kept;              // [Op::kept, padded], or null
    int64_t first_param;  // of its set
  };
  // A row, and what is known of it.
  struct Item {
    int64_t r;
    Row row;
    bool skipped;
    Source x;
    const T* ahead[at_least_one(Op::in)];
    T* y[at_least_one(Op::out)];
  };
  // Of one thread: rows that were gathered or are to be scattered, and what sweeps keep.
  struct Scratch {
    std::unique_ptr<T[]> in, out;
    std::unique_ptr<uint64_t[]> mixed;
    std::unique_ptr<S[]> kept;
  };

  int64_t grain() const { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols)); }

  // The rows are cut into slices that depend on the shape alone and are added up in order: the same bits for any number of threads.
  // A slice has the rows of all sets, and is shared out by sets where slices are few.
  void run_slices() const {
    const int64_t slices = args.slices, sets = args.sets, samples = args.extent.rows / sets;
    const int64_t per = slices ? (samples + slices - 1) / slices : 0;
    const int64_t some = std::clamp<int64_t>(sets * slices / 64, std::min(sets, together), sets), parts = (sets + some - 1) / some;
    const int64_t unit = std::max<int64_t>(1, per * some);
    at::parallel_for(0, slices * parts, (grain() + unit - 1) / unit, [&](int64_t begin, int64_t end) {
      const Scratch scratch = scratch_for(unit);
      for (int64_t u = begin; u < end; ++u) {
        const int64_t s = u / parts, set = u % parts * some, n = std::min(some, sets - set),
                      last = std::min(samples, (s + 1) * per);
        for (int i = 0; i < Op::col_out; ++i)
          if (args.col_out[i]) std::fill_n(partial(i, s, set), n * cols, S(0));
        if (n == sets)
          rows<true>(s * per * sets, last * sets, s, scratch);
        else
          for (int64_t sample = s * per; sample < last; ++sample)
            rows<true>(sample * sets + set, sample * sets + set + n, s, scratch);
      }
    });
    add_up();
  }

  S* partial(int i, int64_t slice, int64_t set = 0) const {
    return static_cast<S*>(args.partial) + ((i * args.slices + slice) * args.sets + set) * cols;
  }

  template <class Y>
  void add_slices(int i, Y* y, int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; c += kChunk) {
      const int64_t n = std::min<int64_t>(kChunk, end - c);
      A total[2] = {A(S(0)), A(S(0))};
      for (int64_t s = 0; s < args.slices; ++s) {
        A v[2];
        load(partial(i, s) + c, v, n);
        total[0] = total[0] + v[0], total[1] = total[1] + v[1];
      }
      store(y + c, total, n);
    }
  }

  Scratch scratch_for(int64_t rows) const {
    const int64_t some = std::clamp<int64_t>(rows, 0, kBlock);  // rows at a time
    Scratch scratch;
    if (gathered) scratch.in.reset(new T[gathered * some * cols]);
    if (scattered) scratch.out.reset(new T[scattered * some * cols]);
    if (apart) scratch.mixed.reset(new uint64_t[together * Op::mixed * cols]);
    if (Op::kept > 0 && cols <= kMostKept) scratch.kept.reset(new S[together * Op::kept * padded]);
    return scratch;
  }

  template <bool sum_columns>
  void rows(int64_t begin, int64_t end, int64_t slice, const Scratch& scratch) const {
    const int64_t some = std::clamp<int64_t>(end - begin, 0, kBlock);
    for (int64_t block = begin; block < end; block += some) {
      const int64_t n = std::min(some, end - block);
      if (gathered) gather(scratch.in.get(), block, n, some);
      for (int64_t r = block; r < block + n; r += together) {
        Item items[kTogether];
        const int count = int(std::min(together, block + n - r));
        for (int k = 0; k < count; ++k) start(items[k], k, r + k, block, some, end, scratch);
        few<sum_columns>(items, count, slice);
      }
      if (scattered) scatter(scratch.out.get(), block, n, some);
    }
    if (past) end_of_stores_past();
  }

  // Number k of the rows that go together.
  FUSEGRAD_FN void start(Item& item, int k, int64_t r, int64_t block, int64_t some, int64_t end, const Scratch& scratch) const {
    Source& x = item.x;
    for (int i = 0, g = 0; i < Op::in; ++i)
      x.x[i] = args.in[i].col == 1 ? static_cast<const T*>(args.in[i].data) + args.extent.offset(args.in[i], r)
                                   : scratch.in.get() + (g++ * some + r - block) * cols;
    for (int i = 0; i < Op::mixed; ++i) {
      Mixed& m = x.m[i] = Mixed(args.mixed[i], args.extent.offset(args.mixed[i], r));
      if (!m.data || args.mixed[i].col <= 1) continue;
      char* const to = reinterpret_cast<char*>(scratch.mixed.get() + (k * Op::mixed + i) * cols);
      fusegrad::gather(to, m.data, cols, args.mixed[i].col, m.step);
      m.data = to;
    }
    x.kept = scratch.kept ? scratch.kept.get() + k * Op::kept * padded : nullptr;
    x.first_param = args.set(r) * cols;
    for (int i = 0; i < Op::in; ++i)
      item.ahead[i] = args.in[i].col == 1 && r + together < end && cols <= kAhead
                          ? static_cast<const T*>(args.in[i].data) + args.extent.offset(args.in[i], r + together)
                          : x.x[i];
    for (int i = 0, g = 0; i < Op::out; ++i)
      item.y[i] = !args.out[i].data      ? nullptr
                  : args.out[i].col == 1 ? static_cast<T*>(args.out[i].data) + args.extent.offset(args.out[i], r)
                                         : scratch.out.get() + (g++ * some + r - block) * cols;
    item.r = r;
    item.row = Row{};
    args.op.begin(item.row, At<Op, T, P>{args, r});
    item.skipped = args.op.skip(item.row);
  }

  // n rows; those of the next tensor lie `some` rows further.
  void gather(T* to, int64_t first, int64_t n, int64_t some) const {
    for (int i = 0; i < Op::in; ++i) {
      const View& v = args.in[i];
      if (v.col == 1) continue;
      const T* from[kBlock];
      for (int64_t r = 0; r < n; ++r) from[r] = static_cast<const T*>(v.data) + args.extent.offset(v, first + r);
      for (int64_t c = 0; c < cols; ++c)
        for (int64_t r = 0; r < n; ++r) to[r * cols + c] = from[r][c * v.col];
      to += some * cols;
    }
  }

  void scatter(const T* from, int64_t first, int64_t n, int64_t some) const {
    for (int i = 0; i < Op::out; ++i) {
      const View& v = args.out[i];
      if (!v.data || v.col == 1) continue;
      T* to[kBlock];
      for (int64_t r = 0; r < n; ++r) to[r] = static_cast<T*>(v.data) + args.extent.offset(v, first + r);
      for (int64_t c = 0; c < cols; ++c)
        for (int64_t r = 0; r < n; ++r) to[r][c * v.col] = from[r * cols + c];
      from += some * cols;
    }
  }

  template <bool sum_columns>
  void few(Item* items, int count, int64_t slice) const {
    sweeps(typename Op::template Sweeps<A>{}, typename Op::template Sweeps<S>{}, items, count);
    for (const Item* item = items; item < items + count; ++item) {
      if (item->skipped) {
        for (int i = 0; i < Op::out; ++i)
          if (item->y[i]) std::fill_n(item->y[i], cols, T(0));
      } else if constexpr (Op::out > 0 || Op::col_out > 0) {
        S* col[at_least_one(Op::col_out)] = {};
        if constexpr (sum_columns)
          for (int i = 0; i < Op::col_out; ++i)
            if (args.col_out[i]) col[i] = partial(i, slice) + item->x.first_param;
        past&& on_lines<Op::out>(item->y) ? maps<sum_columns, true>(*item, col) : maps<sum_columns, false>(*item, col);
      }
    }
  }

  template <bool sum_columns, bool past>
  void maps(const Item& item, S* const* col) const {
    int64_t c = 0;
    for (; c + kChunk <= cols; c += kChunk) {
      fetch(item.ahead, c);
      map<sum_columns, false, past>(item.row, item.x, item.y, col, c, kChunk);
    }
    if (c < cols) map<sum_columns, true, false>(item.row, item.x, item.y, col, c, cols - c);
  }

  FUSEGRAD_FN static void fetch(const T* const* ahead, int64_t c) {
    for (int i = 0; i < Op::in; ++i)
      for (size_t line = 0; line < kChunk * sizeof(T); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(ahead[i] + c) + line);
  }

  template <class... V, class... H>
  void sweeps(List<V...>, List<H...>, [[maybe_unused]] Item* items, [[maybe_unused]] int count) const {
    (sweep_all<V, H>(items, count), ...);
  }
  template <class V, class H>
  void sweep_all(Item* items, int count) const {
    for (Item* item = items; item < items + count; ++item)
      if (!item->skipped && args.op.template needs<H>(item->row))
        args.op.finish(item->row, sweep<V, H>(item->row, item->x, item->ahead), At<Op, T, P>{args, item->r});
  }

  // A long row in parts, so that no sum grows so large beside what is added to it that it always rounds to the same side: the sum
  // of 262,144 squares of bfloat16 was off by 7e-6.
  template <class V, class H>
  FUSEGRAD_FN H sweep(const Row& row, const Source& x, const T* const* ahead) const {
    constexpr int64_t kPart = 8192;
    V sum;
    for (int64_t c = 0; c < cols; c += kPart) sum.merge(sweep<V>(row, x, ahead, c, std::min(cols, c + kPart)));
    return across_lanes<V, H>(sum);
  }

  // Four sums at a time, so that the additions do not wait for each other; then together in a fixed order.
  template <class V>
  FUSEGRAD_FN V sweep(const Row& row, const Source& x, [[maybe_unused]] const T* const* ahead, int64_t c, int64_t end) const {
    V sum[4];
    for (; c + 2 * kChunk <= end; c += 2 * kChunk) {
      if constexpr (Op::out == 0 && Op::col_out == 0) fetch(ahead, c), fetch(ahead, c + kChunk);  // no map will
      add(sum + 0, row, x, c);
      add(sum + 2, row, x, c + kChunk);
    }
    if (c + kChunk <= end) {
      add(sum + 0, row, x, c);
      c += kChunk;
    }
    if (c < end) {  // the end of the row
      V with[2] = {sum[2], sum[3]};
      add<true>(with, row, x, c);
      keep_first(sum[2], with[0], cols - c);
      keep_first(sum[3], with[1], cols - c - W);
    }
    sum[0].merge(sum[2]);
    sum[1].merge(sum[3]);
    sum[0].merge(sum[1]);
    return sum[0];
  }

  template <bool tail = false>
  FUSEGRAD_FN void load_in(InRows<Op, A, T> (&in)[2], const Source& x, int64_t c) const {
    const int64_t n = tail ? cols - c : kChunk;
    in[0].col = c, in[1].col = c + W;
    for (int i = 0; i < Op::in; ++i) {
      A v[2];
      load(x.x[i] + c, v, n);
      in[0].x[i] = v[0], in[1].x[i] = v[1];
    }
    for (int i = 0; i < Op::mixed; ++i) {
      A v[2];
      load(x.m[i], Op::absent, c, v, n);
      in[0].m[i] = v[0], in[1].m[i] = v[1];
    }
    for (int i = 0; i < Op::params; ++i) {
      A v[2] = {A(S(Op::absent)), A(S(Op::absent))};
      if (args.param[i]) load(static_cast<const P*>(args.param[i]) + x.first_param + c, v, n);
      in[0].p[i] = v[0], in[1].p[i] = v[1];
    }
  }

  template <bool tail = false, class V>
  FUSEGRAD_FN void add(V* sum, const Row& row, const Source& x, int64_t c) const {
    InRows<Op, A, T> in[2];
    load_in<tail>(in, x, c);
    args.op.add(sum[0], row, in[0]);
    args.op.add(sum[1], row, in[1]);
    if constexpr (Op::kept > 0 && std::is_same_v<V, Keeper<Op, A>>)
      if (x.kept)
        for (int i = 0; i < Op::kept; ++i)
          for (int half = 0; half < 2; ++half) in[half].k[i].store(x.kept + i * padded + c + half * W);
  }
  FUSEGRAD_FN void load_kept([[maybe_unused]] InRows<Op, A, T> (&in)[2], const Row& row, const Source& x, int64_t c) const {
    if (!x.kept) {
      keep_again<A>(args.op, row, in[0]);
      keep_again<A>(args.op, row, in[1]);
    } else {
      for (int i = 0; i < Op::kept; ++i)
        for (int half = 0; half < 2; ++half) in[half].k[i] = A::loadu(x.kept + i * padded + c + half * W);
    }
  }

  template <class V>
  static void keep_first(V& sum, const V& with, int64_t n) {
    const auto mask = Lanes<A>::first(n);
    A* const a = reinterpret_cast<A*>(&sum);
    const A* const b = reinterpret_cast<const A*>(&with);
    for (size_t i = 0; i < sizeof(V) / sizeof(A); ++i) a[i] = select(mask, b[i], a[i]);
  }

  template <class V, class H>
  static H across_lanes(V sum) {
    constexpr int n = sizeof(H) / sizeof(S);
    static_assert(sizeof(V) == n * sizeof(A), "a sum holds nothing but fields of the accumulate type");
    for (int half = W / 2; half > 0; half /= 2) {
      V upper;
      for (int i = 0; i < n; ++i) reinterpret_cast<A*>(&upper)[i] = lanes_down(reinterpret_cast<const A*>(&sum)[i], half);
      sum.merge(upper);
    }
    H first;
    for (int i = 0; i < n; ++i) std::memcpy(reinterpret_cast<S*>(&first) + i, reinterpret_cast<const A*>(&sum) + i, sizeof(S));
    return first;
  }

  template <bool sum_columns, bool tail, bool past>
  FUSEGRAD_FN void map(const Row& row, const Source& x, T* const* y, S* const* col, int64_t c, int64_t n) const {
    InRows<Op, A, T> in[2];
    load_in<tail>(in, x, c);
    if constexpr (Op::kept > 0) load_kept(in, row, x, c);
    Out<Op, A> out[2];
    args.op.template map<T>(row, in[0], out[0]);
    args.op.template map<T>(row, in[1], out[1]);
    for (int i = 0; i < Op::out; ++i)
      if (y[i]) {
        const A v[2] = {out[0].y[i], out[1].y[i]};
        tail ? store(y[i] + c, v, n) : store<past>(y[i] + c, v);
      }
    if constexpr (sum_columns)
      for (int i = 0; i < Op::col_out; ++i)
        if (col[i]) {
          A v[2];
          tail ? load(static_cast<const S*>(col[i] + c), v, n) : load(static_cast<const S*>(col[i] + c), v);
          v[0] = v[0] + out[0].col[i], v[1] = v[1] + out[1].col[i];
          tail ? store(col[i] + c, v, n) : store(col[i] + c, v);
        }
  }
};

template <class Op>
struct RowsOnCpu {
  static void launch(const RowArgs<Op>& args, void*) {
    for_types<(Op::params > 0)>(args.rows, args.params, [&](auto t, auto p) { RowsCpu<Op, decltype(t), decltype(p)>(args).run(); });
  }
  // Few enough that the partial sums are small beside the rows, enough for many threads.
  static int64_t slices(const RowArgs<Op>& args) { return std::min<int64_t>(64, (args.extent.rows / args.sets + 15) / 16); }
};

}  // namespace
}  // namespace fusegrad

#define FUSEGRAD_ROWS(Op)                                                                                                          \
  namespace fusegrad {                                                                                                             \
  template <>                                                                                                                      \
  const Kernel<RowArgs<Op>> Kernels<RowArgs<Op>, FUSEGRAD_VARIANT>::entry = {RowsOnCpu<Op>::launch, RowsOnCpu<Op>::slices};        \
  }
