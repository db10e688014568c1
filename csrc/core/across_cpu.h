// Runs a row op on the CPU whose columns may be apart while its rows lie next to each other, such as the pixels of an image with
// the channels as columns: SIMD lanes are rows then, and a tile of neighbouring rows is walked column by column. Nothing is
// gathered and results keep the layout. Rows that lie along memory go to rows_cpu.h.
//
// What an op may not use here: skip(), mixed inputs, In::is(), In::before(), In::stored(), fields of Row that are not of type S,
// and sets of parameters.
#pragma once

#include "rows_cpu.h"

namespace fusegrad {
namespace {

// An array of zeros; the standard's smart pointers would be weak symbols of a type that each variant has its own of. Those of a
// single step, as of small images, need no memory from the heap: asking for it took a fifth of a batch norm of 4 x 64 x 4.
template <class X>
struct Scratch {
  static constexpr int64_t kFew = 6;
  X few[kFew];
  X* const data;
  explicit Scratch(int64_t n) : few(), data(n <= kFew ? few : new X[n]()) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (data != few) delete[] data;
  }
  X& operator[](int64_t i) const { return data[i]; }
};

template <class Op, class T, class P>
class AcrossCpu {
  using S = Acc<T>;
  using A = Vec<S>;
  template <class X>
  using Row = typename Op::template Row<X>;
  using Sweeps = typename Op::template Sweeps<A>;
  static constexpr int W = Lanes<A>::count, kChunk = kStep<A>;
  static constexpr bool kOneWalk = std::is_same_v<Sweeps, List<>>;
  static constexpr int64_t kNear = 256 << 10;  // bytes of a tile that is walked more than once
  static constexpr int64_t kMost = 64 * kChunk;
  static constexpr int64_t kLeast = 64;     // units of work, if there are so many
  static constexpr int64_t kLevel = 64;     // columns in a sum of the first level, such sums in one of the second
  static constexpr int64_t kWork = 131072;  // elements of a unit that is walked once

 public:
  static_assert(Op::mixed == 0 && sizeof(Row<S>) % sizeof(S) == 0);
  explicit AcrossCpu(const RowArgs<Op>& args) : args(args), cols(args.extent.cols), lanes(args.extent.size[args.extent.dims - 1]) {
    // Runs of rows that fill no vector are taken together: layer norm of 4096 images of 256 x 2 x 2 took five times as long
    // without.
    for (int d = args.extent.dims - 1; lanes < kChunk && d > 0;) lanes *= args.extent.size[--d];
    const int64_t outer = args.extent.rows / std::max<int64_t>(1, lanes), bytes = std::max<int64_t>(1, cols) * sizeof(T) * Op::in;
    const int64_t wanted = kOneWalk ? kMost : std::min({kMost, kNear / bytes, lanes * outer / kLeast});
    tile = std::max<int64_t>(1, wanted / kChunk) * kChunk;
    tiles = (lanes + tile - 1) / tile;
    per_piece = kOneWalk && Op::col_out == 0
                    ? std::min(cols, std::max<int64_t>(1, kWork / std::min(tile, std::max<int64_t>(1, lanes))))
                    : cols;
    pieces = per_piece ? (cols + per_piece - 1) / per_piece : 1;
    units = outer * tiles * pieces;
    past = Op::out > 0 && beyond_caches(args.extent.rows * cols * int64_t(sizeof(T)) * (Op::in + Op::out));
  }

  int64_t slices() const { return std::min<int64_t>(64, units); }

  void run() const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(tile, lanes) * per_piece));
    if (!args.sums_columns()) {
      at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u) unit(u, -1);
      });
      return;
    }
    const int64_t per = args.slices ? (units + args.slices - 1) / args.slices : 0;
    at::parallel_for(0, args.slices, per ? (grain + per - 1) / per : 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        for (int i = 0; i < Op::col_out; ++i)
          if (args.col_out[i]) std::fill_n(partial(i, s), cols, S(0));
        for (int64_t u = s * per; u < std::min(units, (s + 1) * per); ++u) unit(u, s);
      }
    });
    RowsCpu<Op, T, P>(args).add_up();
  }

 private:
  const RowArgs<Op>& args;
  const int64_t cols;
  int64_t lanes;  // rows that a tile is cut from
  int64_t tile, tiles, per_piece, pieces, units;
  bool past;

  S* partial(int i, int64_t slice) const { return static_cast<S*>(args.partial) + (i * args.slices + slice) * cols; }

  // Where the first row of a tile lies, and the others from there on if not next to each other.
  template <class X>
  struct Lane {
    X* data = nullptr;
    const int64_t* places = nullptr;
  };
  // A tile of rows, of which n exist, from number `first` on; field f of one in lane l of a vector is S number f * W + l of it.
  struct Tile {
    int64_t first, n;
    Scratch<Row<A>> rows;
    Scratch<int64_t> places;
    Lane<const T> x[at_least_one(Op::in)];
    Lane<T> y[at_least_one(Op::out)];
  };
  // `places` is null where all rows of a tile lie next to each other for a plain reason.
  template <class X>
  Lane<X> find(const View& v, int64_t first, int64_t n, int64_t* places) const {
    const int64_t start = args.extent.offset(v, first), inner = args.extent.dims - 1, run = args.extent.size[inner];
    bool near = true;
    for (int64_t i = 0, left = 0, place = 0; places && i < n; ++i, --left, place += v.stride[inner]) {
      if (left == 0) place = args.extent.offset(v, first + i) - start, left = run - (first + i) % run;
      places[i] = place;
      near &= place == i;
    }
    return {static_cast<X*>(v.data) + start, near ? nullptr : places};
  }
  bool apart(int64_t first, int64_t n) const {
    const int64_t inner = args.extent.dims - 1, run = args.extent.size[inner];
    const auto steps = [&](const View& v) { return v.data && v.stride[inner] != 1; };
    return first % run + n > run ||
           (n > 1 && (std::any_of(args.in, args.in + Op::in, steps) || std::any_of(args.out, args.out + Op::out, steps)));
  }
  template <class V, class H>
  static void take(const V* from, int64_t l, H& h) {
    for (size_t f = 0; f < sizeof(H) / sizeof(S); ++f)
      std::memcpy(reinterpret_cast<char*>(&h) + f * sizeof(S),
                  reinterpret_cast<const char*>(from + l / W) + (f * W + l % W) * sizeof(S), sizeof(S));
  }
  static void put(Row<A>* to, int64_t l, const Row<S>& row) {
    for (size_t f = 0; f < sizeof(row) / sizeof(S); ++f)
      std::memcpy(reinterpret_cast<char*>(to + l / W) + (f * W + l % W) * sizeof(S),
                  reinterpret_cast<const char*>(&row) + f * sizeof(S), sizeof(S));
  }

  void unit(int64_t u, int64_t slice) const {
    const int64_t piece = u % pieces, outer = u / pieces / tiles, l = u / pieces % tiles * tile;
    const int64_t n = std::min(tile, lanes - l);
    const int64_t first = outer * lanes + l, to_find = apart(first, n) ? n : 0;
    Tile t{first, n, Scratch<Row<A>>(2 * ((n + kChunk - 1) / kChunk)), Scratch<int64_t>((Op::in + Op::out) * to_find), {}, {}};
    const auto places = [&](int view) { return to_find ? &t.places[view * n] : nullptr; };
    for (int i = 0; i < Op::in; ++i) t.x[i] = find<const T>(args.in[i], first, n, places(i));
    for (int i = 0; i < Op::out; ++i)
      if (args.out[i].data) t.y[i] = find<T>(args.out[i], first, n, places(Op::in + i));
    for (int64_t i = 0; i < t.n; ++i) {
      Row<S> row{};
      args.op.begin(row, At<Op, T, P>{args, t.first + i});
      put(t.rows.data, i, row);
    }
    sweeps(Sweeps{}, typename Op::template Sweeps<S>{}, t);
    if constexpr (Op::out > 0 || Op::col_out > 0) {
      const int64_t begin = piece * per_piece, end = std::min(cols, begin + per_piece);
      for (int64_t c = begin; c < end; ++c) map(t, c, slice);
      if (past) end_of_stores_past();
    }
  }

  template <class... V, class... H>
  void sweeps(List<V...>, List<H...>, [[maybe_unused]] Tile& t) const {
    (sweep<V, H>(t), ...);
  }

  // Sums of sums of sums, so that a long row loses no more digits than one that is walked along.
  template <class V, class H>
  void sweep(Tile& t) const {
    bool needed = false;
    for (int64_t i = 0; i < t.n && !needed; ++i) {
      Row<S> row;
      take(t.rows.data, i, row);
      needed = args.op.template needs<H>(row);
    }
    if (!needed) return;
    const int64_t count = 2 * ((t.n + kChunk - 1) / kChunk);
    const Scratch<V> sums(3 * count);
    const auto move_up = [&](int from) {
      for (int64_t k = 0; k < count; ++k) {
        sums[(from + 1) * count + k].merge(sums[from * count + k]);
        sums[from * count + k] = V{};
      }
    };
    for (int64_t c = 0; c < cols; ++c) {
      In<Op, A> in[2];
      params(in, c);
      for (int64_t l = 0; l < t.n; l += kChunk) {
        load_in(in, t, l, c);
        args.op.add(sums[l / W], t.rows[l / W], in[0]);
        args.op.add(sums[l / W + 1], t.rows[l / W + 1], in[1]);
      }
      if ((c + 1) % kLevel == 0) move_up(0);
      if ((c + 1) % (kLevel * kLevel) == 0) move_up(1);
    }
    move_up(0);
    move_up(1);
    for (int64_t i = 0; i < t.n; ++i) {
      Row<S> row;
      H sum;
      take(t.rows.data, i, row);
      if (!args.op.template needs<H>(row)) continue;
      take(&sums[2 * count], i, sum);
      args.op.finish(row, sum, At<Op, T, P>{args, t.first + i});
      put(t.rows.data, i, row);
    }
  }

  FUSEGRAD_FN void params(In<Op, A> (&in)[2], int64_t c) const {
    in[0].col = in[1].col = c;
    for (int i = 0; i < Op::params; ++i)
      in[0].p[i] = in[1].p[i] = A(args.param[i] ? S(static_cast<const P*>(args.param[i])[c]) : S(Op::absent));
  }
  FUSEGRAD_FN void load_in(In<Op, A> (&in)[2], const Tile& t, int64_t l, int64_t c) const {
    for (int i = 0; i < Op::in; ++i) {
      const int64_t n = t.n - l;
      const T* const from = t.x[i].data + c * args.in[i].col;
      A v[2];
      if (!t.x[i].places) {
        load(from + l, v, n);
      } else {
        T near[kChunk] = {};
        for (int64_t k = 0; k < std::min<int64_t>(n, kChunk); ++k) near[k] = from[t.x[i].places[l + k]];
        load(static_cast<const T*>(near), v);
      }
      in[0].x[i] = v[0], in[1].x[i] = v[1];
    }
  }

  void map(const Tile& t, int64_t c, [[maybe_unused]] int64_t slice) const {
    In<Op, A> in[2];
    params(in, c);
    [[maybe_unused]] A sum[at_least_one(Op::col_out)];
    for (int i = 0; i < Op::col_out; ++i) sum[i] = A(S(0));
    for (int64_t l = 0; l < t.n; l += kChunk) {
      const int64_t n = t.n - l;
      load_in(in, t, l, c);
      keep_again<A>(args.op, t.rows[l / W], in[0]);
      keep_again<A>(args.op, t.rows[l / W + 1], in[1]);
      Out<Op, A> out[2];
      args.op.template map<T>(t.rows[l / W], in[0], out[0]);
      args.op.template map<T>(t.rows[l / W + 1], in[1], out[1]);
      for (int i = 0; i < Op::out; ++i)
        if (t.y[i].data) put(t.y[i], c * args.out[i].col, l, out[0].y[i], out[1].y[i], n);
      for (int i = 0; i < Op::col_out; ++i) {
        if (n < kChunk) {
          out[0].col[i] = select(Lanes<A>::first(n), out[0].col[i], A(S(0)));
          out[1].col[i] = select(Lanes<A>::first(n - W), out[1].col[i], A(S(0)));
        }
        sum[i] = sum[i] + (out[0].col[i] + out[1].col[i]);
      }
    }
    if constexpr (Op::col_out > 0)
      if (slice >= 0)
        for (int i = 0; i < Op::col_out; ++i)
          if (args.col_out[i]) {
            for (int half = W / 2; half > 0; half /= 2) sum[i] = sum[i] + lanes_down(sum[i], half);
            S first;
            std::memcpy(&first, &sum[i], sizeof(S));
            partial(i, slice)[c] += first;
          }
  }

  FUSEGRAD_FN void put(const Lane<T>& y, int64_t column, int64_t l, const A& a, const A& b, int64_t n) const {
    const A v[2] = {a, b};
    T* to = y.data + column + l;
    if (y.places) {
      T near[kChunk];
      store(static_cast<T*>(near), v);
      for (int64_t k = 0; k < std::min<int64_t>(n, kChunk); ++k) y.data[column + y.places[l + k]] = near[k];
    } else if (n >= kChunk && past && on_lines<1>(&to)) {
      store<true>(to, v);
    } else {
      store(to, v, n);
    }
  }
};

template <class Op>
struct AnyRowsOnCpu {
  template <class F>
  static auto with(const RowArgs<Op>& args, const F& f) {
    for_types<(Op::params > 0)>(args.rows, args.params, [&](auto t, auto p) { f(AcrossCpu<Op, decltype(t), decltype(p)>(args)); });
  }
  static void launch(const RowArgs<Op>& args, void* stream) {
    if (along(args)) return RowsOnCpu<Op>::launch(args, stream);
    with(args, [](const auto& across) { across.run(); });
  }
  static int64_t slices(const RowArgs<Op>& args) {
    int64_t n = RowsOnCpu<Op>::slices(args);
    if (!along(args)) with(args, [&](const auto& across) { n = across.slices(); });
    return n;
  }
};

}  // namespace
}  // namespace fusegrad

#define FUSEGRAD_ANY_ROWS(Op)                                                                                                      \
  namespace fusegrad {                                                                                                             \
  template <>                                                                                                                      \
  const Kernel<RowArgs<Op>> Kernels<RowArgs<Op>, FUSEGRAD_VARIANT>::entry = {AnyRowsOnCpu<Op>::launch, AnyRowsOnCpu<Op>::slices};  \
  }
