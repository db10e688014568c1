// Runs a row op on a GPU: a team of threads takes a row, see Split. One tile of the row stays in registers, and the walks over
// the tiles go forward and backward in turn: a row of one tile is read once, and a longer one is read again from where the last
// walk ended, which is still in registers or in a cache.
// For sums over the rows each block adds up the rows it takes, and a second kernel adds up the blocks: the same order every time.
#pragma once

#include "pack.cuh"

namespace fusegrad {
namespace {

template <class... Sums>
constexpr int length(List<Sums...>) {
  return sizeof...(Sums);
}

// Every thread of a team computes the values of its row; the first one stores them.
template <class Op, class T, class P>
struct AtTeam : At<Op, T, P> {
  bool first;

  __device__ __forceinline__ void put(int i, Acc<T> value) const {
    if (first) At<Op, T, P>::put(i, value);
  }
};

template <class Op, class T, class P, bool packed>
class RowsCuda {
  using S = Acc<T>;
  using Row = typename Op::template Row<S>;
  using Here = AtTeam<Op, T, P>;
  static constexpr int kIn = at_least_one(Op::in), kParams = at_least_one(Op::params), kOut = at_least_one(Op::out);
  static constexpr int kCols = at_least_one(Op::col_out), kMixed = at_least_one(Op::mixed);

  // Registers that a thread keeps for a pack of each input: the pack, and its columns' sums.
  static constexpr int V = packed ? kPack<T> : 1;
  static constexpr int kKept = Op::in * std::max<int>(1, V * sizeof(T) / 4) + Op::col_out * V * int(sizeof(S) / 4);
  static constexpr int tile_packs(int k) { return k > 1 && k * kKept > 72 ? tile_packs(k / 2) : k; }

 public:
  static constexpr int K = tile_packs(packed ? Op::packs : Op::packs * 8 / sizeof(T));
  static constexpr int kMaxThreads = kMaxTeam;
  // Without a reduction, a team can take a single tile as well as a row.
  static constexpr bool kByTiles = length(typename Op::template Sweeps<S>{}) == 0 && Op::col_out == 0;
  struct Args {
    RowArgs<Op> row;
    Split split;
  };

  static bool fits(const RowArgs<Op>& a) {
    bool yes = a.extent.cols % V == 0;
    for (int i = 0; i < Op::in; ++i) yes &= in_packs(a.in[i], a.extent, V);
    for (int i = 0; i < Op::out; ++i) yes &= in_packs(a.out[i], a.extent, V);
    for (int i = 0; i < Op::mixed; ++i) yes &= mixed_in_packs(a.mixed[i], a.extent, V);
    for (int i = 0; i < Op::params; ++i) yes &= aligned(a.param[i]);
    return yes;
  }
  static Split split_of(const RowArgs<Op>& a) {
    const bool across = !packed && Op::in > 0 && !a.sums_columns() && a.in[0].col > 1 && a.in[0].stride[a.extent.dims - 1] == 1;
    // Where the rows and not the columns are next to each other, neighbouring threads take neighbouring rows.
    if (across && a.extent.rows >= 64 * int64_t(multiprocessors())) return split(a.extent.cols, sizeof(T), K, 1, 1);
    return split(a.extent.cols / V, V * sizeof(T), K);
  }
  static int64_t groups(const RowArgs<Op>& a, const Split& s) {
    const int64_t items = a.extent.rows * (kByTiles ? std::max<int64_t>(1, s.tiles) : 1), teams = s.threads / s.team;
    return (items + teams - 1) / teams;
  }

  static __device__ __forceinline__ void run(const Args& args) { RowsCuda(args).items(); }

 private:
  const RowArgs<Op>& a;
  const int64_t packs;
  const int team, member;
  const int row_tiles;
  int tile0 = 0, tiles = 0;  // that the team takes of the row at hand
  int held = -1;             // the tile in registers
  int64_t at = 0;            // see place()
  int left = 0;
  bool forward = true;
  int turn = 0;
  const T* x[kIn];
  int64_t row_of_mixed[kMixed];
  int64_t first_param = 0;  // of the row's set
  Bits<T, V> kept[kIn][K];
  S sums[kCols][K][V];

  __device__ __forceinline__ explicit RowsCuda(const Args& args)
      : a(args.row), packs(args.split.packs), team(args.split.team), member(threadIdx.x & (team - 1)), row_tiles(args.split.tiles) {
    if constexpr (Op::col_out > 0) {
#pragma unroll
      for (int i = 0; i < Op::col_out; ++i)
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int e = 0; e < V; ++e) sums[i][k][e] = S(0);
    }
  }

  // The threads of a warp take as many turns as each other, and those of a block if a row is theirs: they meet in every sum.
  __device__ __forceinline__ void items() {
    if constexpr (Op::col_out > 0) clear_columns();
    const int teams = blockDim.x / team;
    const int pieces = kByTiles && row_tiles > 1 ? row_tiles : 1;
    // The rows that a block adds up are of one set.
    const int64_t sets = a.sums_columns() ? a.known_sets() : 1, set = blockIdx.x % sets;
    const int64_t count = a.extent.rows / sets * pieces, step = gridDim.x / sets * teams;
    for (int64_t first = blockIdx.x / sets * teams; first < count; first += step) {
      const int64_t i = first + threadIdx.x / team, r = pieces > 1 ? i / pieces : i;
      row(r * sets + set, i < count, int(i - r * pieces), pieces > 1);
    }
    if constexpr (Op::col_out > 0) write_columns();
  }

  __device__ __forceinline__ void row(int64_t r, bool live, int piece, bool by_tiles) {
    const Here here{{a, r}, member == 0 && piece == 0};
    Row row{};
    T* y[kOut] = {};
    tile0 = by_tiles ? piece : 0, tiles = by_tiles ? 1 : row_tiles, held = -1, forward = true;
    bool skip = false;
    if (live) {
      first_param = a.set(r) * a.extent.cols;
#pragma unroll
      for (int i = 0; i < Op::in; ++i) x[i] = static_cast<const T*>(a.in[i].data) + a.extent.offset(a.in[i], r);
#pragma unroll
      for (int i = 0; i < Op::mixed; ++i) row_of_mixed[i] = a.extent.offset(a.mixed[i], r);
      a.op.begin(row, here);
      skip = a.op.skip(row);
#pragma unroll
      for (int i = 0; i < Op::out; ++i)
        if (a.out[i].data) y[i] = static_cast<T*>(a.out[i].data) + a.extent.offset(a.out[i], r);
    }
    if (skip) clear(y);
    if (!live || skip) tiles = 0;
    sweeps(typename Op::template Sweeps<S>{}, row, here, live && !skip);
    if constexpr (Op::out > 0 || Op::col_out > 0) map(row, y);
  }

  // Places the thread on a tile: its first pack is number `at`, further ones are `team` apart as long as k * team < left.
  __device__ __forceinline__ void place(int tile) {
    at = int64_t(tile) * (K * team) + member;
    left = int(std::min<int64_t>(packs - at, K * team));
  }
  // The tile that comes next in this walk, in registers.
  __device__ __forceinline__ void next(int i) {
    const int tile = tile0 + (forward ? i : tiles - 1 - i);
    if (tile == held) return;
    held = tile;
    place(tile);
#pragma unroll
    for (int i = 0; i < Op::in; ++i) {
      const int64_t step = packed ? 1 : a.in[i].col;
      const Bits<T, V>* const from = reinterpret_cast<const Bits<T, V>*>(x[i]) + at * step;
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (k * team < left) kept[i][k] = __ldg(from + (packed ? k * team : k * team * step));
    }
  }

  struct Columns {
    T x[kIn][V];
    P p[kParams][V];
    S m[kMixed][V];
  };
  __device__ __forceinline__ void columns(Columns& c, int k) const {
#pragma unroll
    for (int i = 0; i < Op::in; ++i) memcpy(c.x[i], &kept[i][k], sizeof(c.x[i]));
#pragma unroll
    for (int i = 0; i < Op::params; ++i)
      if (a.param[i]) load<V>(static_cast<const P*>(a.param[i]) + first_param + at * V + k * team * V, c.p[i]);
#pragma unroll
    for (int i = 0; i < Op::mixed; ++i)  // read each time: in registers they would be as large as the accumulate type
      load_mixed<V>(a.mixed[i], row_of_mixed[i], (at + k * team) * (packed ? V : a.mixed[i].col), Op::absent, c.m[i]);
  }
  __device__ __forceinline__ InRows<Op, S, T> column(const Columns& c, int k, int e) const {
    InRows<Op, S, T> in;
    in.col = (at + k * team) * V + e;
#pragma unroll
    for (int i = 0; i < Op::in; ++i) in.x[i] = S(c.x[i][e]);
#pragma unroll
    for (int i = 0; i < Op::params; ++i) in.p[i] = a.param[i] ? S(c.p[i][e]) : S(Op::absent);
#pragma unroll
    for (int i = 0; i < Op::mixed; ++i) in.m[i] = c.m[i][e];
    return in;
  }

  template <class... Sums>
  __device__ __forceinline__ void sweeps(List<Sums...>, Row& row, const Here& here, bool live) {
    (sweep<Sums>(row, here, live), ...);
  }

  template <class Sum>
  __device__ __forceinline__ void sweep(Row& row, const Here& here, bool live) {
    Sum sum;
    const bool wanted = a.op.template needs<Sum>(row);
    for (int i = 0; i < (wanted ? tiles : 0); ++i) {
      next(i);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k * team >= left) continue;
        Columns c;
        columns(c, k);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          InRows<Op, S, T> in = column(c, k, e);
          a.op.add(sum, row, in);
        }
      }
    }
    if (wanted) forward = !forward;
    sum = of_team(sum);  // which the other rows of a warp may have to take
    if (live && wanted) a.op.finish(row, sum, here);
  }

  // A sum holds nothing but fields of type S.
  template <class Sum>
  static constexpr int kFields = sizeof(Sum) / sizeof(S);

  template <class Sum>
  __device__ __forceinline__ Sum of_team(Sum sum) {
    sum = across_lanes(sum, team < 32 ? team : 32);
    if (team > 32) {
      // Written again no sooner than two sums later: everyone has read it before the barrier of the one between.
      FUSEGRAD_SHARED(S, parts, 2 * (kMaxTeam / 32) * kFields<Sum>);
      const int warps = team / 32;
      S* const fields = reinterpret_cast<S*>(&sum);
      turn ^= 1;
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int f = 0; f < kFields<Sum>; ++f) parts[(turn * kFields<Sum> + f) * (kMaxTeam / 32) + threadIdx.x / 32] = fields[f];
      }
      __syncthreads();
#pragma unroll
      for (int f = 0; f < kFields<Sum>; ++f) fields[f] = parts[(turn * kFields<Sum> + f) * (kMaxTeam / 32) + threadIdx.x % warps];
      sum = across_lanes(sum, warps);
    }
    return sum;
  }

  // The lower lane comes first on both sides, so that all lanes have the same bits whatever merge() does.
  template <class Sum>
  static __device__ __forceinline__ Sum across_lanes(Sum sum, int width) {
    for (int step = 1; step < width; step *= 2) {
      Sum low = sum, high = sum;
      const bool upper = threadIdx.x & step;
#pragma unroll
      for (int f = 0; f < kFields<Sum>; ++f) {
        const S mine = reinterpret_cast<S*>(&sum)[f], other = __shfl_xor_sync(~0u, mine, step);
        reinterpret_cast<S*>(&low)[f] = upper ? other : mine;
        reinterpret_cast<S*>(&high)[f] = upper ? mine : other;
      }
      low.merge(high);
      sum = low;
    }
    return sum;
  }

  __device__ __forceinline__ void map(const Row& row, T* const* y) {
    for (int i = 0; i < tiles; ++i) {
      next(i);
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (k * team < left) map(row, y, k);
    }
  }

  __device__ __forceinline__ void map(const Row& row, T* const* y, int k) {
    Columns c;
    columns(c, k);
    T made[kOut][V];
    S of_column[kCols][V];
#pragma unroll
    for (int e = 0; e < V; ++e) {
      InRows<Op, S, T> in = column(c, k, e);
      keep_again<S>(a.op, row, in);
      Out<Op, S> out;
      a.op.template map<T>(row, in, out);
#pragma unroll
      for (int i = 0; i < Op::out; ++i) made[i][e] = T(out.y[i]);
#pragma unroll
      for (int i = 0; i < Op::col_out; ++i) of_column[i][e] = out.col[i];
    }
#pragma unroll
    for (int i = 0; i < Op::out; ++i)
      if (y[i]) store<V>(y[i] + (at + k * team) * (packed ? V : a.out[i].col), made[i]);
#pragma unroll
    for (int i = 0; i < Op::col_out; ++i) {
      if (row_tiles == 1) {
#pragma unroll
        for (int e = 0; e < V; ++e) sums[i][k][e] += of_column[i][e];
      } else if (a.col_out[i]) {
        S so_far[V], *const to = partial(i) + at * V + k * team * V;
        load_back<V>(to, so_far);
#pragma unroll
        for (int e = 0; e < V; ++e) so_far[e] += of_column[i][e];
        store<V>(to, so_far);
      }
    }
  }

  __device__ __forceinline__ void clear(T* const* y) {
    const T zeros[V] = {};
    for (int t = 0; t < tiles; ++t) {
      place(tile0 + t);
#pragma unroll
      for (int i = 0; i < Op::out; ++i)
        if (y[i])
          for (int k = 0; k * team < left; ++k) store<V>(y[i] + (at + k * team) * (packed ? V : a.out[i].col), zeros);
    }
  }

  __device__ __forceinline__ S* partial(int i) const {
    return static_cast<S*>(a.partial) + (i * a.slices * a.known_sets() + blockIdx.x) * a.extent.cols;
  }

  // Columns that do not fit into registers are summed in memory, each by the thread that has them in every row.
  __device__ __forceinline__ void clear_columns() const {
    if (row_tiles <= 1) return;
    const S zeros[V] = {};
    for (int i = 0; i < Op::col_out; ++i)
      if (a.col_out[i])
        for (int64_t v = member; v < packs; v += team) store<V>(partial(i) + v * V, zeros);
  }
  // The others are in the registers of each team: the teams of a warp add theirs by shuffles, and the warps take turns. In turns
  // alone, equal rows of many small teams lost digits, each rounded the same way.
  __device__ __forceinline__ void write_columns() {
    if (row_tiles != 1) return;
    FUSEGRAD_SHARED(S, total, 32 * K * V);
    const int apart = team < 32 ? 32 : team, turns = blockDim.x / apart;
#pragma unroll
    for (int i = 0; i < Op::col_out; ++i) {
      if (!a.col_out[i]) continue;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        if (step < team) continue;
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int e = 0; e < V; ++e) sums[i][k][e] += __shfl_xor_sync(~0u, sums[i][k][e], step);
      }
      if (turns == 1) {
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (int(threadIdx.x) < team && member + k * team < packs) store<V>(partial(i) + (member + k * team) * V, sums[i][k]);
        continue;
      }
      for (int t = 0; t < turns; ++t) {
        if (threadIdx.x - unsigned(t * apart) < unsigned(team)) {  // below t * apart it wraps round
#pragma unroll
          for (int k = 0; k < K; ++k)
#pragma unroll
            for (int e = 0; e < V; ++e) {
              const int c = (k * team + member) * V + e;
              total[c] = t == 0 ? sums[i][k][e] : total[c] + sums[i][k][e];
            }
        }
        __syncthreads();
      }
      for (int64_t c = threadIdx.x; c < a.extent.cols; c += blockDim.x) partial(i)[c] = total[c];
      __syncthreads();
    }
  }
};

// The sums over the blocks: the warps of a block share them out for 32 columns, and the first warp adds up the warps.
template <class Op, class S, class P>
struct AddSlices {
  static constexpr int kMaxThreads = 512;
  struct Args {
    const S* partial;  // [col_out, slices, cols]
    void* y[at_least_one(Op::col_out)];
    int64_t slices, cols, groups;
  };

  static __device__ __forceinline__ void run(const Args& a) {
    FUSEGRAD_SHARED(S, parts, kMaxThreads);
    const int warps = blockDim.x / 32;
    const int64_t i = blockIdx.x / a.groups, c = (blockIdx.x - i * a.groups) * 32 + threadIdx.x % 32;
    const bool mine = a.y[i] && c < a.cols;
    const S* const from = a.partial + i * a.slices * a.cols + c;
    S sum = S(0);
    if (mine) {
#pragma unroll 8
      for (int64_t s = threadIdx.x / 32; s < a.slices; s += warps) sum += __ldg(from + s * a.cols);
    }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (!mine || threadIdx.x >= 32) return;
    for (int w = 1; w < warps; ++w) sum += parts[w * 32 + threadIdx.x];
    if (i < Op::col_out - Op::wide_cols)
      static_cast<P*>(a.y[i])[c] = P(sum);
    else
      static_cast<S*>(a.y[i])[c] = sum;
  }
  // Eight slices are loaded at a time.
  static int threads(int64_t slices) { return int(std::clamp<int64_t>((slices + 7) / 8 * 32, 32, kMaxThreads)); }
};

template <class Op, class S, class P>
void add_slices(const RowArgs<Op>& args, void* stream) {
  if constexpr (Op::col_out > 0) {
    if (!args.sums_columns() || args.extent.cols == 0) return;
    using Add = AddSlices<Op, S, P>;
    const int64_t cols = args.sets * args.extent.cols;
    typename Add::Args add{static_cast<const S*>(args.partial), {}, args.slices, cols, (cols + 31) / 32};
    for (int i = 0; i < Op::col_out; ++i) add.y[i] = args.col_out[i];
    fusegrad::launch<Add>(Op::col_out * add.groups, Add::threads(args.slices), stream, add);
  }
}

template <class Op>
class RowsOnCuda {
  template <class F>
  static void with_program(const RowArgs<Op>& args, const F& f) {
    for_types<(Op::params > 0)>(args.rows, args.params, [&](auto t, auto p) {
      using Packed = RowsCuda<Op, decltype(t), decltype(p), true>;
      using Single = RowsCuda<Op, decltype(t), decltype(p), false>;
      Packed::fits(args) ? f(static_cast<Packed*>(nullptr), t, p) : f(static_cast<Single*>(nullptr), t, p);
    });
  }

 public:
  static void launch(const RowArgs<Op>& args, void* stream) {
    with_program(args, [&](auto* program, auto t, auto p) {
      using Program = std::remove_pointer_t<decltype(program)>;
      const Split split = Program::split_of(args);
      const bool sums = args.sums_columns();
      const int64_t blocks = std::min<int64_t>(Program::groups(args, split), int64_t(kBlocksPerSM) * multiprocessors());
      if (args.extent.rows > 0)
        fusegrad::launch<Program>(sums ? args.slices * args.sets : blocks, split.threads, stream, {args, split});
      add_slices<Op, Acc<decltype(t)>, decltype(p)>(args, stream);
    });
  }

  // A block each: as many as are sure to be resident at once; of several sets one for each at least.
  static int64_t slices(const RowArgs<Op>& args) {
    int64_t n = 0;
    with_program(args, [&](auto* program, auto, auto) {
      using Program = std::remove_pointer_t<decltype(program)>;
      const Split split = Program::split_of(args);
      n = std::min<int64_t>(Program::groups(args, split), int64_t(kMaxTeam / split.threads) * multiprocessors());
    });
    return args.sets == 1 ? n : (n + args.sets - 1) / args.sets;
  }
};

}  // namespace
}  // namespace fusegrad

#define FUSEGRAD_ROWS(Op)                                                                                                          \
  namespace fusegrad {                                                                                                             \
  template <>                                                                                                                      \
  const Kernel<RowArgs<Op>> Kernels<RowArgs<Op>, kCuda>::entry = {RowsOnCuda<Op>::launch, RowsOnCuda<Op>::slices};                 \
  }
