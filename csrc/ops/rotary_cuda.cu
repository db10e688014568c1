#include "../core/rows_cuda.cuh"
#include "rotary.h"

namespace fusegrad {
namespace {

struct Weights {
  static constexpr int col_out = 2, wide_cols = 0;
};
enum Mode { kTurn, kTurnBack, kNorm, kNormBack };

// A team, at most a warp, takes a row of q or k. Its threads take packs of V columns that pair with each other: the same pack of
// both halves, or, interleaved, two packs in a row. What lies behind the pairs goes one by one. The rows of a block share a
// position or have neighbouring ones, so that the tables come from the first cache; so does x where it is read twice.
template <class T, class C, bool packed, Mode mode>
class RotaryCuda {
  using S = Acc<T>;
  using Side = RotaryArgs::Side;
  using Way = std::conditional_t<mode == kTurn || mode == kNorm, RotaryFwd, RotaryBwd>;
  static constexpr bool kNormed = mode == kNorm || mode == kNormBack;
  static constexpr int V = packed ? kPack<T> : 1;

 public:
  static constexpr int kMaxThreads = kBlock;
  struct Args {
    RotaryArgs r;
    int team;
    bool shared;  // the sums of the columns lie in shared memory: [teams, 2, cols]
  };

  static bool fits(const RotaryArgs& a) {
    bool yes = a.rot / 2 % V == 0;
    for (const Side& s : a.side) {
      for (const View* v : {&s.in, &s.out, &s.x}) yes &= in_packs(*v, s.extent, V);
      for (const View* v : {&s.cos, &s.sin}) yes &= in_packs(*v, s.extent, std::min(V, kPack<C>));
      yes &= aligned(s.w);
    }
    return yes;
  }
  static int team_of(const RotaryArgs& a) {
    int team = 1;
    while (team < 32 && int64_t(team) * 2 * V < a.cols) team *= 2;
    return team;
  }
  static int64_t blocks(const RotaryArgs& a) {
    const int64_t rows = a.side[0].extent.rows + a.side[1].extent.rows, teams = kBlock / team_of(a);
    return (rows + teams - 1) / teams;
  }
  // Four rows for a team at least; four blocks are resident at once.
  static int64_t slices(const RotaryArgs& a) { return std::min<int64_t>((blocks(a) + 3) / 4, 4 * int64_t(multiprocessors())); }
  static constexpr int64_t kShared = 48 << 10;

  static void launch(const RotaryArgs& a, void* stream) {
    const bool sums = mode == kNormBack && a.sums_columns();
    int team = team_of(a);
    int threads = kBlock;
    int64_t bytes = sums ? int64_t(threads / team) * 2 * a.cols * sizeof(S) : 0;
    const bool shared = bytes > 0 && bytes <= kShared;
    if (sums && !shared) threads = team = 32, bytes = 0;  // one team, which sums in memory
    if (blocks(a) > 0) {
      const int64_t n = sums ? a.slices : std::min(blocks(a), int64_t(kBlocksPerSM) * multiprocessors());
      fusegrad::launch<RotaryCuda>(n, threads, stream, {a, team, shared}, size_t(bytes));
    }
    if constexpr (mode == kNormBack) {
      if (!sums || a.cols == 0) return;
      using Add = AddSlices<Weights, S, S>;
      const int64_t groups = (a.cols + 31) / 32, slices = blocks(a) > 0 ? a.slices : 0;
      fusegrad::launch<Add>(2 * groups, Add::threads(slices), stream,
                            {static_cast<const S*>(a.partial), {a.side[0].dw, a.side[1].dw}, slices, a.cols, groups});
    }
  }

  static __device__ __forceinline__ void run(const Args& args) { RotaryCuda(args).rows(args.shared); }

 private:
  const RotaryArgs& a;
  const int team, member;
  const Side* side = nullptr;
  const C *cos = nullptr, *sin = nullptr;

  __device__ __forceinline__ explicit RotaryCuda(const Args& args)
      : a(args.r), team(args.team), member(threadIdx.x & (args.team - 1)) {}

  __device__ __forceinline__ void rows([[maybe_unused]] bool shared) {
    if constexpr (mode == kNormBack) {
      FUSEGRAD_DYNAMIC_SHARED(S, memory);
      const bool sums = a.sums_columns();
      const int64_t teams = blockDim.x / team, mine = threadIdx.x / team;
      if (sums && shared)
        for (int64_t i = threadIdx.x; i < teams * 2 * a.cols; i += blockDim.x) memory[i] = S(0);
      for (int s = 0; s < 2 && sums && !shared; ++s)
        for (int64_t c = threadIdx.x; c < a.cols; c += blockDim.x) slice(s)[c] = S(0);
      __syncthreads();
      each_row([&](int s, int64_t c, S dw) {
        if (sums && shared)
          memory[(mine * 2 + s) * a.cols + c] += dw;
        else if (sums)
          slice(s)[c] += dw;
      });
      if (!sums || !shared) return;
      __syncthreads();
      for (int s = 0; s < 2; ++s)
        for (int64_t c = threadIdx.x; c < a.cols; c += blockDim.x) {
          S total = S(0);
          for (int64_t t = 0; t < teams; ++t) total += memory[(t * 2 + s) * a.cols + c];
          slice(s)[c] = total;
        }
    } else {
      each_row([](int, int64_t, S) {});
    }
  }

  template <class F>
  __device__ __forceinline__ void each_row(const F& add_dw) {
    const int teams = blockDim.x / team;
    const int64_t q_rows = a.side[0].extent.rows, count = q_rows + a.side[1].extent.rows;
    for (int64_t first = int64_t(blockIdx.x) * teams; first < count; first += int64_t(gridDim.x) * teams) {
      const int64_t i = first + threadIdx.x / team;
      const int s = i >= q_rows;
      side = &a.side[s];
      row(s ? i - q_rows : i, i < count && (side->out.data || side->dw), [&](int64_t c, S dw) { add_dw(s, c, dw); });
    }
  }

  __device__ __forceinline__ S* slice(int s) const {
    return static_cast<S*>(a.partial) + (int64_t(s) * a.slices + blockIdx.x) * a.cols;
  }
  template <class E>
  __device__ __forceinline__ E* at(const View& v, int64_t r) const {
    return static_cast<E*>(v.data) + side->extent.offset(v, r);
  }

  // The threads of a warp meet in the sums, whether their rows are live or not.
  template <class F>
  __device__ __forceinline__ void row(int64_t r, bool live, [[maybe_unused]] const F& add_dw) {
    const T* in = nullptr;
    if (live) {
      in = at<const T>(side->in, r);
      if (a.rot > 0) cos = at<const C>(side->cos, r), sin = at<const C>(side->sin, r);
    }
    const auto nothing = [](int64_t, auto&) {};
    if constexpr (!kNormed) {
      if (live) turned(in, nothing, [&](int64_t c, auto& z) { put(r, c, z); });
      return;
    }
    const S n = S(a.cols);
    const S* const w = static_cast<const S*>(side->w);
    const auto times_w = [&](int64_t c, auto& z) {
      if (!w) return;
      constexpr int m = sizeof(z) / sizeof(S);
      S v[m];
      load<m>(w + c, v);
#pragma unroll
      for (int e = 0; e < m; ++e) z[e] *= v[e];
    };
    if constexpr (mode == kNorm) {
      S xx = S(0);
      if (live)
        each([&](int64_t c, auto& z) {
          get(in, side->in, c, z);
          S pack = S(0);  // the sum of a pack first: fewer steps to add up in, and fewer digits lost
          for (S v : z) pack += v * v;
          xx += pack;
        });
      const S rstd = rsqrt(of_team(xx) / n + S(a.eps));
      if (!live) return;
      if (member == 0) *at<S>(side->rstd, r) = rstd;
      const auto normed = [&](int64_t c, auto& z) {
        for (S& v : z) v *= rstd;
        times_w(c, z);
      };
      turned(in, normed, [&](int64_t c, auto& z) { put(r, c, z); });
    } else {
      const T* x = nullptr;
      S rstd = S(0), dot = S(0);
      if (live) x = at<const T>(side->x, r), rstd = *at<const S>(side->rstd, r);
      if (live)
        turned(in, nothing, [&](int64_t c, auto& z) {
          constexpr int m = sizeof(z) / sizeof(S);
          S v[m];
          get(x, side->x, c, v);
#pragma unroll
          for (int e = 0; e < m; ++e) add_dw(c + e, z[e] * (v[e] * rstd));
          times_w(c, z);
          S pack = S(0);
#pragma unroll
          for (int e = 0; e < m; ++e) pack += v[e] * z[e];
          dot += pack;
        });
      dot = of_team(dot);
      if (!live || !side->out.data) return;
      const S projection = dot * rstd / n * rstd * rstd;
      turned(in, nothing, [&](int64_t c, auto& z) {
        constexpr int m = sizeof(z) / sizeof(S);
        S v[m];
        get(x, side->x, c, v);
        times_w(c, z);
#pragma unroll
        for (int e = 0; e < m; ++e) z[e] = z[e] * rstd - v[e] * projection;
        put(r, c, z);
      });
    }
  }

  // Calls f(c, z) for the thread's packs of a row, and then for its single columns.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    pairs([&](int64_t c, int64_t d) {
      S z[V];
      f(c, z);
      f(d, z);
    });
    rest(f);
  }
  template <class F>
  __device__ __forceinline__ void pairs(const F& f) const {
    for (int64_t p = member; p < a.rot / (2 * V); p += team)
      a.interleaved ? f(2 * p * V, (2 * p + 1) * V) : f(p * V, a.rot / 2 + p * V);
  }
  template <class F>
  __device__ __forceinline__ void rest(const F& f) const {
    for (int64_t c = a.rot + member; c < a.cols; c += team) {
      S z[1];
      f(c, z);
    }
  }

  // The row at `in` turned: `before` may change what is loaded, `after` gets the result. Both see columns in their order in memory.
  template <class F, class G>
  __device__ __forceinline__ void turned(const T* in, const F& before, const G& after) const {
    pairs([&](int64_t c, int64_t d) {
      S z[2][V], co[2][V], si[2][V];
      get(in, side->in, c, z[0]);
      get(in, side->in, d, z[1]);
      get(cos, side->cos, c, co[0]);
      get(cos, side->cos, d, co[1]);
      get(sin, side->sin, c, si[0]);
      get(sin, side->sin, d, si[1]);
      before(c, z[0]);
      before(d, z[1]);
      const bool next = V > 1 && a.interleaved;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        // Interleaved, the pairs are neighbours within the 2 V columns.
        constexpr int n = V;
        const int i = 2 * e;
        if (next)
          Way::turn(z[i / n][i % n], z[(i + 1) / n][(i + 1) % n], co[i / n][i % n], co[(i + 1) / n][(i + 1) % n], si[i / n][i % n],
                    si[(i + 1) / n][(i + 1) % n]);
        else
          Way::turn(z[0][e], z[1][e], co[0][e], co[1][e], si[0][e], si[1][e]);
      }
      after(c, z[0]);
      after(d, z[1]);
    });
    rest([&](int64_t c, auto& z) {
      get(in, side->in, c, z);
      before(c, z);
      after(c, z);
    });
  }

  template <class E, int n>
  __device__ __forceinline__ void get(const E* from, const View& v, int64_t c, S (&z)[n]) const {
    E raw[n];
    load<n>(from + (packed ? c : c * v.col), raw);
#pragma unroll
    for (int e = 0; e < n; ++e) z[e] = S(raw[e]);
  }
  template <int n>
  __device__ __forceinline__ void put(int64_t r, int64_t c, const S (&z)[n]) const {
    T raw[n];
#pragma unroll
    for (int e = 0; e < n; ++e) raw[e] = T(z[e]);
    store<n>(at<T>(side->out, r) + c, raw);
  }

  __device__ __forceinline__ S of_team(S sum) const {
    for (int step = 1; step < team; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  }
};

struct RotaryOnCuda {
  template <class F>
  static void with_program(const RotaryArgs& args, const F& f) {
    for_types<true>(args.rows, args.table, [&](auto t, auto c) {
      using T = decltype(t);
      using C = decltype(c);
      const auto in_mode = [&](auto mode) {
        using Packed = RotaryCuda<T, C, true, Mode(decltype(mode)::value)>;
        using Single = RotaryCuda<T, C, false, Mode(decltype(mode)::value)>;
        Packed::fits(args) ? f(static_cast<Packed*>(nullptr)) : f(static_cast<Single*>(nullptr));
      };
      if (args.normed)
        args.backward ? in_mode(std::integral_constant<int, kNormBack>()) : in_mode(std::integral_constant<int, kNorm>());
      else
        args.backward ? in_mode(std::integral_constant<int, kTurnBack>()) : in_mode(std::integral_constant<int, kTurn>());
    });
  }
  static void launch(const RotaryArgs& args, void* stream) {
    with_program(args, [&](auto* program) { std::remove_pointer_t<decltype(program)>::launch(args, stream); });
  }
  static int64_t slices(const RotaryArgs& args) {
    int64_t n = 0;
    with_program(args, [&](auto* program) { n = std::remove_pointer_t<decltype(program)>::slices(args); });
    return n;
  }
};

}  // namespace

template <>
const Kernel<RotaryArgs> Kernels<RotaryArgs, kCuda>::entry = {RotaryOnCuda::launch, RotaryOnCuda::slices};

}  // namespace fusegrad
