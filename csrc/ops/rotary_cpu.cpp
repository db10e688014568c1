#include <ATen/Parallel.h>

#include <memory>
#include <utility>

#include "../core/simd.h"
#include "rotary.h"

namespace fusegrad {
namespace {

// A row goes through a buffer of the accumulate type: loaded, normed, turned, stored. The tables of a position are widened and put
// in the order of the pairs once for all of its heads.
template <class T, class C>
class RotaryCpu {
  using S = Acc<T>;
  using A = Vec<S>;
  using Side = RotaryArgs::Side;
  static constexpr int W = Lanes<A>::count;
  static constexpr int64_t kStepped = kStep<A>;
  static constexpr int64_t kGrain = 16384;  // elements

 public:
  explicit RotaryCpu(const RotaryArgs& args)
      : args(args), cols(args.cols), half(args.rot / 2), padded((cols + kStepped - 1) / kStepped * kStepped + kStepped) {}

  void run() const {
    const int64_t n = args.positions, heads = args.side[0].heads + args.side[1].heads;
    if (args.sums_columns()) return run_slices(n);
    at::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, heads * cols)), [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t i = begin; i < end; ++i) position(scratch, i, nullptr);
    });
  }

 private:
  struct Scratch {
    std::unique_ptr<S[]> memory;
    S *z, *x, *spare, *cos, *sin, *dw[2];
    explicit Scratch(const RotaryCpu& r) : memory(new S[7 * r.padded]()) {
      S** const parts[] = {&z, &x, &spare, &cos, &sin, &dw[0], &dw[1]};
      for (int i = 0; i < 7; ++i) *parts[i] = memory.get() + i * r.padded;
    }
  };

  const RotaryArgs& args;
  const int64_t cols, half, padded;

  S* partial(int side, int64_t slice) const { return static_cast<S*>(args.partial) + (side * args.slices + slice) * cols; }

  // As in rows_cpu.h: slices that depend on the shape alone, added up in order. A slice has many heads for each of its positions;
  // sums of a few positions first keep the rounding errors apart.
  void run_slices(int64_t n) const {
    const int64_t per = args.slices ? (n + args.slices - 1) / args.slices : 0;
    at::parallel_for(0, args.slices, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t s = begin; s < end; ++s) {
        for (int k = 0; k < 2; ++k) std::fill_n(partial(k, s), cols, S(0));
        const int64_t last = std::min(n, (s + 1) * per);
        for (int64_t i = s * per; i < last; ++i) {
          position(scratch, i, scratch.dw);
          if (i % 16 < 15 && i + 1 < last) continue;
          for (int k = 0; k < 2; ++k)
            for (int64_t c = 0; c < cols; ++c) partial(k, s)[c] += std::exchange(scratch.dw[k][c], S(0));
        }
      }
    });
    for (int i = 0; i < 2; ++i) {
      S* const dw = static_cast<S*>(args.side[i].dw);
      if (!dw) continue;
      std::fill_n(dw, cols, S(0));
      for (int64_t s = 0; s < args.slices; ++s)
        for (int64_t c = 0; c < cols; ++c) dw[c] += partial(i, s)[c];
    }
  }

  void position(const Scratch& scratch, int64_t i, S* const* dw) const {
    const Side& any = args.side[args.side[0].heads == 0];
    if (half > 0) {
      table(any, any.cos, i, scratch.cos);
      table(any, any.sin, i, scratch.sin);
    }
    for (int s = 0; s < 2; ++s) {
      const Side& side = args.side[s];
      const int64_t heads = side.heads;
      for (int64_t r = i * heads; r < (i + 1) * heads; ++r)
        args.backward ? back(scratch, side, r, dw ? dw[s] : nullptr) : forth(scratch, side, r);
    }
  }

  void table(const Side& any, const View& v, int64_t i, S* to) const {
    const C* from = static_cast<const C*>(v.data) + any.extent.offset(v, i * any.heads);
    for (int64_t c = 0; c < half; ++c) {
      to[c] = S(from[(args.interleaved ? 2 * c : c) * v.col]);
      to[half + c] = S(from[(args.interleaved ? 2 * c + 1 : half + c) * v.col]);
    }
  }

  void read(const Side& side, const View& v, int64_t r, S* to) const {
    const T* from = static_cast<const T*>(v.data) + side.extent.offset(v, r);
    if (v.col != 1) {
      for (int64_t c = 0; c < cols; ++c) to[c] = S(from[c * v.col]);
      return;
    }
    for (int64_t c = 0; c < cols; c += kStepped) {
      A a[2];
      load(from + c, a, cols - c);
      a[0].store(to + c), a[1].store(to + c + W);
    }
  }
  void write(const Side& side, int64_t r, const S* from) const {
    T* const to = static_cast<T*>(side.out.data) + side.extent.offset(side.out, r);
    for (int64_t c = 0; c < cols; c += kStepped) {
      const A a[2] = {A::loadu(from + c), A::loadu(from + c + W)};
      store(to + c, a, cols - c);
    }
  }

  template <class Way>
  void turn(const Scratch& s) const {
    if (!args.interleaved) return turn_halves<Way>(s.z, s);
    for (int64_t c = 0; c < half; ++c) s.spare[c] = s.z[2 * c], s.spare[half + c] = s.z[2 * c + 1];
    turn_halves<Way>(s.spare, s);
    for (int64_t c = 0; c < half; ++c) s.z[2 * c] = s.spare[c], s.z[2 * c + 1] = s.spare[half + c];
  }
  template <class Way>
  void turn_halves(S* z, const Scratch& s) const {
    for (int64_t c = 0; c < half; c += W) {
      const int64_t n = std::min<int64_t>(W, half - c);
      A a = A::loadu(z + c), b = A::loadu(z + half + c);
      Way::turn(a, b, A::loadu(s.cos + c), A::loadu(s.cos + half + c), A::loadu(s.sin + c), A::loadu(s.sin + half + c));
      // The lanes from n on are others' columns: of b for a, which were loaded before.
      a.store(z + c, int(n)), b.store(z + half + c, int(n));
    }
  }

  template <class F>
  S sum(const F& f) const {
    A total[2] = {A(S(0)), A(S(0))};
    for (int64_t c = 0; c < cols; c += kStepped)
      for (int k = 0; k < 2; ++k) total[k] = select(Lanes<A>::first(cols - c - k * W), total[k] + f(c + k * W), total[k]);
    S lanes[W], sum = 0;
    (total[0] + total[1]).store(lanes);
    for (S a : lanes) sum += a;
    return sum;
  }

  void forth(const Scratch& s, const Side& side, int64_t r) const {
    read(side, side.in, r, s.z);
    if (args.normed) {
      const S* const w = static_cast<const S*>(side.w);
      const S xx = sum([&](int64_t c) { return square(A::loadu(s.z + c)); });
      const S rstd = rsqrt(xx / S(cols) + S(args.eps));
      static_cast<S*>(side.rstd.data)[side.extent.offset(side.rstd, r)] = rstd;
      for (int64_t c = 0; c < cols; ++c) s.z[c] = s.z[c] * rstd * (w ? w[c] : S(1));
    }
    turn<RotaryFwd>(s);
    write(side, r, s.z);
  }

  void back(const Scratch& s, const Side& side, int64_t r, S* dw) const {
    read(side, side.in, r, s.z);
    turn<RotaryBwd>(s);
    if (args.normed) {
      const S* const w = static_cast<const S*>(side.w);
      read(side, side.x, r, s.x);
      const S rstd = static_cast<const S*>(side.rstd.data)[side.extent.offset(side.rstd, r)];
      if (dw)
        for (int64_t c = 0; c < cols; ++c) dw[c] += s.z[c] * (s.x[c] * rstd);
      if (w)
        for (int64_t c = 0; c < cols; ++c) s.z[c] *= w[c];
      if (!side.out.data) return;
      const S dot = sum([&](int64_t c) { return A::loadu(s.x + c) * A::loadu(s.z + c); });
      const S projection = dot * rstd / S(cols) * rstd * rstd;
      for (int64_t c = 0; c < cols; ++c) s.z[c] = s.z[c] * rstd - s.x[c] * projection;
    }
    if (side.out.data) write(side, r, s.z);
  }
};

struct RotaryOnCpu {
  static void launch(const RotaryArgs& args, void*) {
    for_types<true>(args.rows, args.table, [&](auto t, auto c) { RotaryCpu<decltype(t), decltype(c)>(args).run(); });
  }
  static int64_t slices(const RotaryArgs& args) { return std::min<int64_t>(64, (args.positions + 15) / 16); }
};

}  // namespace

template <>
const Kernel<RotaryArgs> Kernels<RotaryArgs, FUSEGRAD_VARIANT>::entry = {RotaryOnCpu::launch, RotaryOnCpu::slices};

}  // namespace fusegrad
