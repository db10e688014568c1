// Cross entropy of one row of C logits x with label t, with z = softcap(scale x), softcap(a) = cap tanh(a / cap):
//
//   top = max(z)     log_sum = log sum(exp(z - top))     lse = top + log_sum
//   loss = (1 - smoothing) w_t ((top - z_t) + log_sum) + smoothing / C sum_c(w_c ((top - z_c) + log_sum)) + z_loss lse^2
//
// Never lse - z_t: a large top would swallow the digits of log_sum. For the same reason both parts are kept for the backward,
// with p = exp((z - top) - log_sum), W = sum_c(w_c) and g the gradient of the loss:
//
//   dz_c = p_c (g ((1 - smoothing) w_t + smoothing / C W + 2 z_loss lse) + dlse) - g smoothing / C w_c - [c = t] g (1 - smoothing)
//   w_t dx_c = dz_c scale (1 - (z_c / cap)^2)
//
// A row with the label ignore_index is not read: its loss, lse and gradient are 0. A label outside [0, C) makes them NaN (on the
// CPU the host function raises first). Smoothing: Szegedy et al. 2016, arXiv:1512.00567; z_loss: Chowdhery et al. 2022,
// arXiv:2204.02311; soft cap: Gemma 2, arXiv:2408.00118.
#pragma once

#include "../core/row_op.h"

namespace fusegrad {

struct CrossEntropyOptions {
  int64_t ignore_index;
  double smoothing, z_loss, softcap /* 0: none */, scale;

  template <class A>
  FUSEGRAD_FN A z(A x) const {
    using S = Scalar<A>;
    x = x * A(S(scale));
    return softcap > 0 ? tanh(x / A(S(softcap))) * A(S(softcap)) : x;
  }
  template <class A>
  FUSEGRAD_FN A dz_dx(A z) const {
    using S = Scalar<A>;
    return softcap > 0 ? A(S(scale)) * (A(1) - square(z / A(S(softcap)))) : A(S(scale));
  }
};

struct CrossEntropyFwd : RowOp {
  static constexpr int in = 1, params = 1, index = 1, scalar_in = 1, scalar_out = 5;
  enum { kX, kW = 0, kTarget = 0, kWeightSum = 0, kLoss = 0, kWeight, kTop, kLogSum, kLse };
  CrossEntropyOptions o;

  template <class S>
  struct Row {
    int64_t target;
    bool skip;
    S top, z_t, w_t;
  };
  template <class A>
  struct Peak {
    A top{-std::numeric_limits<Scalar<A>>::infinity()};  // of the numbers: the sum of the row finds its NaN
    FUSEGRAD_FN void merge(const Peak& other) { top = larger_number(top, other.top); }
  };
  template <class A>
  struct Mass {
    A e{0}, below{0};  // sum of exp(z - top), and of w (top - z) if there is smoothing
    FUSEGRAD_FN void merge(const Mass& other) { e = e + other.e, below = below + other.below; }
  };
  template <class A>
  using Sweeps = List<Peak<A>, Mass<A>>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    row.target = at.index(kTarget);
    const bool label = row.target >= 0 && row.target < at.args.extent.cols;
    row.skip = row.target == o.ignore_index || !label;
    if (row.skip) {
      const S value = row.target == o.ignore_index ? S(0) : std::numeric_limits<S>::quiet_NaN();
      for (int i = 0; i < scalar_out; ++i) at.put(i, value);
    } else {
      row.z_t = o.z(at.x(kX, row.target));
      row.w_t = at.p(kW, row.target);
    }
  }
  template <class R>
  FUSEGRAD_FN bool skip(const R& row) const {
    return row.skip;
  }
  // The columns are a template, as sisters of this op that derive from it have their own.
  template <class A, class R, class Columns>
  FUSEGRAD_FN void add(Peak<A>& sum, const R&, const Columns& in) const {
    sum.top = larger_number(sum.top, o.z(in.x[kX]));
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Peak<S>& sum, const At&) const {
    row.top = sum.top;
  }
  template <class A, class R, class Columns>
  FUSEGRAD_FN void add(Mass<A>& sum, const R& row, const Columns& in) const {
    const A below = A(row.top) - o.z(in.x[kX]);
    sum.e = sum.e + exp(A(0) - below);
    if (o.smoothing != 0) sum.below = fma(in.p[kW], below, sum.below);
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Mass<S>& sum, const At& at) const {
    const S log_sum = log(sum.e), lse = row.top + log_sum, cols = S(at.args.extent.cols), smoothing = S(o.smoothing);
    S loss = (S(1) - smoothing) * row.w_t * ((row.top - row.z_t) + log_sum);
    if (o.smoothing != 0) loss += smoothing / cols * (sum.below + at.scalar(kWeightSum, cols) * log_sum);
    if (o.z_loss != 0) loss += S(o.z_loss) * lse * lse;
    at.put(kLoss, loss);
    at.put(kWeight, row.w_t);
    at.put(kTop, row.top);
    at.put(kLogSum, log_sum);
    at.put(kLse, lse);
  }
};

// Of all classes, or of the logits [first, first + cols) of them, as a shard of them has or a block.
struct CrossEntropyBwd : RowOp {
  static constexpr int in = 1, params = 1, out = 1, index = 1, scalar_in = 7;
  enum { kX, kW = 0, kDx = 0, kTarget = 0, kWeightSum = 0, kLabelWeight, kTop, kLogSum, kDLoss, kDivisor, kDLse };
  CrossEntropyOptions o;
  int64_t first, classes;

  template <class S>
  struct Row {
    int64_t target;  // its column, maybe none of those here
    bool skip;
    S top, log_sum, of_p, of_w, of_target;  // the three factors of dz
  };
  template <class A>
  using Sweeps = List<>;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    const int64_t label = at.index(kTarget);
    row.skip = label == o.ignore_index;
    if (row.skip) return;
    row.target = label - first;
    const bool known = label >= 0 && label < classes, here = known && row.target >= 0 && row.target < at.args.extent.cols;
    const S w_t = at.scalar(kLabelWeight, here ? at.p(kW, row.target) : S(1));
    const S g = at.given(kDLoss) ? at.scalar(kDLoss) / at.scalar(kDivisor, S(1)) : S(0);  // and not 0 / 0, beside a gradient of lse
    row.top = at.scalar(kTop);
    row.log_sum = at.scalar(kLogSum);
    row.of_w = g * S(o.smoothing) / S(classes);
    row.of_target = known ? g * (S(1) - S(o.smoothing)) * w_t : std::numeric_limits<S>::quiet_NaN();
    row.of_p = row.of_target + row.of_w * at.scalar(kWeightSum, S(classes)) + g * S(2 * o.z_loss) * (row.top + row.log_sum) +
               at.scalar(kDLse);
  }
  template <class R>
  FUSEGRAD_FN bool skip(const R& row) const {
    return row.skip;
  }
  template <class T, class R, class Columns, class Result>
  FUSEGRAD_FN void map(const R& row, const Columns& in, Result& out) const {
    using A = std::decay_t<decltype(in.x[0])>;
    const A z = o.z(in.x[kX]), p = exp((z - A(row.top)) - A(row.log_sum));
    A dz = p * A(row.of_p);
    if (o.smoothing != 0) dz = dz - in.p[kW] * A(row.of_w);
    dz = select(in.is(row.target), dz - A(row.of_target), dz);
    out.y[kDx] = dz * o.dz_dx(z);
  }
};

// The losses of all rows, seen as one row of N columns, to one number: sum, or sum / divisor with
// divisor = items, given as a tensor or a number, or the sum of the weights if neither is. Over no item: NaN, or 0 with
// empty_is_zero.
struct LossTotal : RowOp {
  static constexpr int in = 2, scalar_in = 1, scalar_out = 2;
  enum { kLoss, kWeight, kItems = 0, kTotal = 0, kDivisor };
  double items;
  bool mean, empty_is_zero;

  template <class S>
  struct Row {};
  template <class A>
  struct Totals {
    A loss{0}, weight{0};
    FUSEGRAD_FN void merge(const Totals& other) { loss = loss + other.loss, weight = weight + other.weight; }
  };
  template <class A>
  using Sweeps = List<Totals<A>>;

  template <class A, class R>
  FUSEGRAD_FN void add(Totals<A>& sum, const R&, const In<LossTotal, A>& in) const {
    sum.loss = sum.loss + in.x[kLoss];
    sum.weight = sum.weight + in.x[kWeight];
  }
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>&, const Totals<S>& sum, const At& at) const {
    S divisor = mean ? at.scalar(kItems, items > 0 ? S(items) : sum.weight) : S(1);
    if (mean && empty_is_zero && sum.weight == S(0)) divisor = std::numeric_limits<S>::infinity();  // the gradient is 0 too
    at.put(kTotal, sum.loss / divisor);
    at.put(kDivisor, divisor);
  }
};

}  // namespace fusegrad
