#include "channel_norm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/sum.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <functional>
#include <string>

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
namespace {

constexpr double kLeakySlope = 0.01;  // torch's default

at::TensorOptions wide_options(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// How a call walks tensors of shape [N, C, *]: as rows of one channel each. What is next to each other in memory becomes the
// columns or, for channels_last, the last dimension of the rows; nothing is copied that a view can walk.
class Walk {
 public:
  Walk(const char* op, const Tensor& x, bool batch, std::initializer_list<OptTensor> others) : op_(op), x_(x), batch_(batch) {
    n_ = x.size(0), c_ = x.size(1), l_ = x.numel() / std::max<int64_t>(1, n_ * c_);
    joined_ = step(x) >= 0;
    bool all = joined_ && (n_ == 1 || l_ == 1 || x.stride(0) == l_ * step(x));
    for (const auto& t : others)
      if (given(t)) {
        joined_ = joined_ && step(*t) >= 0;
        all = all && joined_ && (n_ == 1 || l_ == 1 || t->stride(0) == l_ * step(*t));
      }
    if (batch && all && (x.stride(1) == 1 || l_ == 1))
      kind_ = kSamples, axes_ = "c", sizes_ = {c_, n_ * l_};
    else if (batch && joined_ && l_ < kShort && (l_ == 1 || x.stride(1) == l_ * step(x)))
      kind_ = kShortPlanes, axes_ = "cl", sizes_ = {c_, l_, n_};
    else if (joined_)
      axes_ = "nc", sizes_ = {n_, c_, l_};
    else
      axes_ = "nc" + std::string(x.dim() - 3, 'l'), sizes_ = at::DimVector(x.sizes());
  }

  int64_t rows() const { return int64_t(axes_.size()); }

  // Columns [first, first + count * size) of all rows, cut into `count` cells of a row each.
  Tensor cells(const Tensor& t, int64_t first, int64_t count, int64_t size) const {
    const at::DimVector of_rows = strides_of(t);
    const int64_t column = of_rows.back();
    at::DimVector sizes{count}, strides{column * size};
    sizes.append(sizes_.begin(), sizes_.end());
    sizes.back() = size;
    strides.append(of_rows.begin(), of_rows.end());
    return t.as_strided(sizes, strides, t.storage_offset() + first * column);
  }
  Tensor whole(const Tensor& t) const { return t.as_strided(sizes_, strides_of(t), t.storage_offset()); }

  // A value of each channel [C], or of each sample's channel [N, C], for each row. The pixels of short planes get their own, as the
  // rows are then walked as one dimension: a batch of 65536 samples of 64 x 4 took 16 times as long without, one of 4 is faster.
  Tensor spread(const Tensor& t) const {
    constexpr int64_t kFew = 8192;
    if (kind_ == kShortPlanes && l_ > 1 && x_.numel() > kFew) return t.unsqueeze(-1).expand({c_, l_}).contiguous();
    at::DimVector strides;
    for (char axis : axes_) strides.push_back(axis == 'c' ? t.stride(-1) : axis == 'n' && t.dim() == 2 ? t.stride(0) : 0);
    return t.as_strided(at::IntArrayRef(sizes_).slice(0, rows()), strides, t.storage_offset());
  }

  // Calls f(first column, cells, columns of a cell, number of the first cell): twice, if the last cell is shorter. Many cells keep
  // the threads busy; where lanes are rows, a cell is also what is read again from the caches.
  template <class F>
  void for_cells(const F& f) const {
    const int64_t columns = sizes_.back(), size = cell();
    if (columns >= size) f(0, columns / size, size, 0);
    if (columns % size) f(columns - columns % size, 1, columns % size, columns / size);
  }
  // Values of each cell, [k, rows..., cells], in the order of the rows, or such that those of a set are next to each other: in
  // `results` [k, *], which has one for each set, if that is enough, else in memory of their own.
  Tensor cell_memory(const Tensor& results, int64_t k) const {
    at::DimVector sizes(sizes_.begin(), sizes_.end() - 1);
    sizes.insert(sizes.begin(), k);
    sizes.push_back((sizes_.back() + cell() - 1) / cell());
    if (swapped()) std::swap(sizes[1], sizes[2]);
    if (c10::multiply_integers(sizes) != k * results[0].numel()) return at::empty(sizes, wide_options(x_));
    sizes[0] = results.size(0);
    return results.view(sizes);
  }
  Tensor cell_values(const Tensor& cells, int64_t i, int64_t first, int64_t count) const {
    at::DimVector sizes{count}, strides{1};
    sizes.append(sizes_.begin(), sizes_.end() - 1);
    strides.append(cells.strides().begin() + 1, cells.strides().end() - 1);
    if (swapped()) std::swap(strides[1], strides[2]);
    return cells.as_strided(sizes, strides, cells.storage_offset() + i * cells.stride(0) + first);
  }
  const char* op() const { return op_; }
  const Tensor& x() const { return x_; }

  // The same with the groups as channels, where those of a group lie next to each other: one row for many.
  static Tensor groups_as_channels(const Tensor& x, int64_t groups) {
    const int64_t n = x.size(0), c = x.size(1), l = x.numel() / std::max<int64_t>(1, n * c), apart = step(x);
    if (apart < 0 || x.stride(1) != l * apart) return x;
    return x.as_strided({n, groups, c / groups * l}, {x.stride(0), c / groups * x.stride(1), apart}, x.storage_offset());
  }

 private:
  enum Kind { kPlanes, kSamples, kShortPlanes };
  static constexpr int64_t kShort = 32;
  const char* op_;
  const Tensor x_;
  bool batch_, joined_;
  Kind kind_ = kPlanes;
  int64_t n_, c_, l_;
  std::string axes_;     // of the rows: sample, channel, part of the plane
  at::DimVector sizes_;  // of the rows' dimensions, and the columns

  // Planes of a batch have their samples first, and their sets have theirs last.
  bool swapped() const { return batch_ && kind_ == kPlanes; }

  int64_t cell() const {
    const int64_t columns = sizes_.back(), all = std::max<int64_t>(1, x_.numel());
    const bool lanes_are_rows = strides_of(x_).back() != 1;
    const int64_t others = std::max<int64_t>(1, all / std::max<int64_t>(1, columns) / (lanes_are_rows ? c_ : 1));
    const int64_t least = lanes_are_rows ? 64 : 16384, parts = std::max<int64_t>(1, 256 / others);
    return std::max<int64_t>(1, std::min(columns, std::max(least, (columns + parts - 1) / parts)));
  }

  // From one element of a plane to the next if there is one step for all of them, else -1.
  static int64_t step(const Tensor& t) {
    int64_t step = -1, expected = -1;
    for (int64_t d = t.dim() - 1; d > 1; --d) {
      if (t.size(d) == 1) continue;
      if (expected < 0)
        step = t.stride(d);
      else if (t.stride(d) != expected)
        return -1;
      expected = t.stride(d) * t.size(d);
    }
    return expected < 0 ? 1 : step;
  }
  at::DimVector strides_of(const Tensor& t) const {
    if (kind_ == kSamples) return {t.stride(1), l_ == 1 ? t.stride(0) : step(t)};
    if (kind_ == kShortPlanes) return {t.stride(1), step(t), t.stride(0)};
    if (joined_) return {t.stride(0), t.stride(1), step(t)};
    return at::DimVector(t.strides());
  }
};

// Checks what is given, with the names and shapes that the caller knows.
void check(const char* op, const Tensor& x, const OptTensor& dy, const OptTensor& w, const OptTensor& b, const OptTensor& r,
           const OptTensor& mean, const OptTensor& var) {
  Frame frame(op, x, "input", 1, 2);
  View view;
  if (given(dy)) frame.in(view, *dy, "gradient");
  if (given(r)) frame.in(view, *r, "residual");
  frame.params(w, "weight");
  frame.params(b, "bias");
  frame.params(mean, "running_mean");
  frame.params(var, "running_var");
}

// Mean, variance and what the mean lost of each set, into [3, N, groups], or [3, C] without groups.
void statistics(const Walk& walk, const Tensor& stats) {
  using M = ChannelMoments;
  const Tensor cells = walk.cell_memory(stats, 4);
  const bool alone = cells.is_alias_of(stats);
  walk.for_cells([&](int64_t column, int64_t count, int64_t size, int64_t cell) {
    const Tensor rows = walk.cells(walk.x(), column, count, size);
    Frame frame(walk.op(), rows, "input", rows.dim() - 1, rows.dim());
    RowArgs<M> args{{{}, alone}};
    frame.in(args.in[M::kX], rows, "input");
    for (int i = 0; i < cells.size(0); ++i) frame.per_row(args.scalar_out[i], walk.cell_values(cells, i, cell, count), "cell");
    run(frame, args);
  });
  if (alone) return;
  using S = ChannelStatistics;
  const int64_t sets = stats[0].numel();
  const Tensor by_set = cells.view({4, sets, sets ? cells.numel() / (4 * sets) : 0});
  Frame frame(walk.op(), by_set[0], "input", 1, 2);
  RowArgs<S> args{};
  for (int i : {S::kMean, S::kSquares, S::kLost, S::kCount}) frame.in(args.in[i], by_set[i], "cells");
  for (int i : {S::kToMean, S::kToVar, S::kToLost}) frame.per_row(args.scalar_out[i], stats[i].view(-1), "statistics");
  run(frame, args);
}

// Beyond the dimensions that a view can walk a tensor is copied, as Frame does: rare enough. But what Frame copies is not written
// to, and of sets of rows that are.
Tensor walkable(const Tensor& t) { return t.dim() > kMaxDims ? t.contiguous() : t; }
OptTensor walkable(const OptTensor& t) { return given(t) ? OptTensor(walkable(*t)) : t; }

// Of each set, for the channels in it.
Tensor per_channel(const Tensor& t, int64_t channels) {
  const int64_t n = t.size(0), groups = t.size(1);
  return groups == channels ? t : t.unsqueeze(-1).expand({n, groups, channels / groups}).reshape({n, channels});
}

template <class Op>
void channel_rows(Frame& frame, RowArgs<Op>& args, const Tensor& mean, const Tensor& var, const OptTensor& lost, const OptTensor& w,
                  const OptTensor& b, const std::function<Tensor(const Tensor&)>& cut) {
  frame.per_row(args.scalar_in[ChannelRow::kMean], cut(mean), "mean");
  frame.per_row(args.scalar_in[ChannelRow::kVar], cut(var), "var");
  if (given(lost)) frame.per_row(args.scalar_in[ChannelRow::kLost], cut(*lost), "mean");
  if (given(w)) frame.per_row(args.scalar_in[ChannelRow::kW], cut(*w), "weight");
  if (given(b)) frame.per_row(args.scalar_in[ChannelRow::kB], cut(*b), "bias");
}

// The sums of each row of `terms` [2, rows, columns], with weights [rows, columns], into [2, *] with as many elements as rows.
void totals(const char* op, const Tensor& terms, const Tensor& sums, const OptTensor& weights = {}) {
  using T = ChannelTotals;
  const Tensor first = terms[0];
  Frame frame(op, first, "input", 1, 2);
  RowArgs<T> args{{{}, given(weights)}};
  for (int i : {T::kDz, T::kDzH}) {
    frame.in(args.in[i], terms[i], "sums");
    frame.per_row(args.scalar_out[i], sums[i].view(-1), "sums");
  }
  frame.in(args.in[T::kW], given(weights) ? *weights : first, "weight");
  run(frame, args);
}

// Calls f(first sample, samples). Sets within a sample are done a few at a time on the CPU, whose last cache then still has what
// the statistics have read when it is read again.
template <class F>
void for_samples(const Tensor& x, int64_t groups, const F& f) {
  constexpr int64_t kNear = 4 << 20;
  const int64_t n = x.size(0), bytes = n ? x.numel() / n * x.element_size() : 0;
  const int64_t some = groups && x.is_cpu() ? std::max<int64_t>(1, kNear / std::max<int64_t>(1, bytes)) : std::max<int64_t>(1, n);
  for (int64_t i = 0; i < n || i == 0; i += some) f(i, std::min(some, n - i));
}
OptTensor narrow(const OptTensor& t, int64_t dim, int64_t first, int64_t count) {
  return given(t) && count < t->size(dim) ? OptTensor(t->narrow(dim, first, count)) : t;
}

// Groups as rows [N, groups, *], where a group's channels lie next to each other and are too short to be rows of their own: each
// group's columns have the w and b of their channels.
class GroupRows {
 public:
  // Against channels as rows, forward and backward of 64 x 256 x 512 in 32 groups took 0.81 of the time in bfloat16 and 0.56 in
  // float32, of 32 x 256 x 1024 0.88 and 0.8, and planes of 4096 1.1. A w and b for each pixel must be little beside the samples.
  static bool pays(const Tensor& x, int64_t groups, std::initializer_list<OptTensor> others) {
    constexpr int64_t kShort = 1024, kRow = 8192, kFew = 16384, kSamples = 8;
    if (!groups || !x.numel()) return false;
    const int64_t sample = x.numel() / x.size(0);
    if (plane(x) > kShort || sample / groups > kRow || (sample > kFew && x.size(0) < kSamples)) return false;
    const auto dense = [&](const Tensor& t) {
      int64_t expected = 1;
      for (int64_t d = t.dim() - 1; d > 0; expected *= t.size(d--))
        if (t.size(d) != 1 && t.stride(d) != expected) return false;
      return true;
    };
    return dense(x) && std::all_of(others.begin(), others.end(), [&](const OptTensor& t) { return !given(t) || dense(*t); });
  }
  GroupRows(const Tensor& x, int64_t groups) : x_(x), groups_(groups), cols_(x.numel() / (x.size(0) * groups)) {}

  Tensor of(const Tensor& t) const {
    return t.as_strided({t.size(0), groups_, cols_}, {t.stride(0), cols_, 1}, t.storage_offset());
  }
  // Of each group's columns [groups, columns]: w or b; memory for the sums over the samples; and those as sums of each channel.
  OptTensor columns(const OptTensor& p) const {
    if (!given(p)) return p;
    const Tensor wide = p->to(wide_options(x_).dtype());
    const int64_t channels = x_.size(1), pixels = plane(x_);
    return (pixels == 1 ? wide : wide.unsqueeze(1).expand({channels, pixels})).reshape({groups_, cols_});
  }
  Tensor columns() const { return at::empty({groups_, cols_}, wide_options(x_)); }
  Tensor channels(const Tensor& columns) const {
    const int64_t pixels = plane(x_);
    return pixels == 1 ? columns.view(-1) : columns.view({x_.size(1), pixels}).sum(1);
  }

 private:
  const Tensor& x_;
  int64_t groups_, cols_;

  static int64_t plane(const Tensor& x) { return x.numel() / (x.size(0) * x.size(1)); }
};

void group_rows_fwd(const char* op, const Tensor& x, const OptTensor& w, const OptTensor& b, const Tensor& y, const Tensor& stats,
                    const ChannelRow& channel, int64_t groups) {
  using F = GroupNormFwd;
  const GroupRows rows(x, groups);
  const Tensor of_x = rows.of(x);
  Frame frame(op, of_x, "input", 2, 3);
  RowArgs<F> args{{{}, channel, given(b)}};
  args.sets = groups;
  frame.in(args.in[F::kX], of_x, "input");
  args.param[F::kW] = frame.params(rows.columns(w), "weight", 1);
  args.param[F::kB] = frame.params(rows.columns(b), "bias", 1);
  frame.out(args.out[F::kY], rows.of(y));
  for (int i : {F::kMean, F::kVar, F::kLost}) frame.per_row(args.scalar_out[i], stats[i], "statistics");
  run(frame, args);
}

// The sums over the samples of each channel, where they are needed: [C] of dz h and of dz.
std::array<Tensor, 2> group_rows_bwd(const char* op, const Tensor& dy, const Tensor& x, const OptTensor& w, const OptTensor& b,
                                     const Tensor& mean, const Tensor& var, const Tensor& lost, const OptTensor& dx,
                                     const ChannelRow& channel, int64_t groups, bool dw, bool db) {
  using B = GroupNormBwd;
  const GroupRows rows(x, groups);
  const Tensor sums[] = {dw ? rows.columns() : Tensor(), db ? rows.columns() : Tensor()};
  const Tensor of_x = rows.of(x);
  Frame frame(op, of_x, "input", 2, 3);
  RowArgs<B> args{{{}, channel, given(b)}};
  args.sets = groups;
  frame.in(args.in[B::kX], of_x, "input");
  frame.in(args.in[B::kDy], rows.of(dy), "gradient");
  args.param[B::kW] = frame.params(rows.columns(w), "weight", 1);
  args.param[B::kB] = frame.params(rows.columns(b), "bias", 1);
  frame.per_row(args.scalar_in[B::kMean], mean, "mean");
  frame.per_row(args.scalar_in[B::kVar], var, "var");
  frame.per_row(args.scalar_in[B::kLost], lost, "mean");
  if (given(dx)) frame.out(args.out[B::kDx], rows.of(*dx));
  for (int i : {B::kDw, B::kDb})
    if (sums[i].defined()) args.col_out[i] = sums[i].mutable_data_ptr();
  run(frame, args);
  return {dw ? rows.channels(sums[B::kDw]) : Tensor(), db ? rows.channels(sums[B::kDb]) : Tensor()};
}

}  // namespace

std::tuple<Tensor, Tensor> channel_norm_fwd(const Tensor& input,     // [N, C, *]
                                            const OptTensor& w,      // [C]
                                            const OptTensor& b,      // [C]
                                            const OptTensor& added,  // [N, C, *]
                                            const OptTensor& mean,   // [C], if the statistics are given
                                            const OptTensor& var,    // [C]
                                            int64_t groups,          // 0: batch norm
                                            double eps, int64_t activation) {
  RECORD_FUNCTION("fusegrad::channel_norm_fwd", {});
  const at::AutoDispatchBelowADInplaceOrView views_without_a_graph;
  const char* const op = groups ? "group_norm" : "batch_norm";
  check(op, input, {}, w, b, added, mean, var);
  const Tensor x = walkable(input);
  const OptTensor r = walkable(added);
  Tensor y = empty_as(x), stats;
  if (!given(mean))
    stats = groups ? at::empty({3, x.size(0), groups}, wide_options(x)) : at::empty({3, x.size(1)}, wide_options(x));
  const ChannelRow channel{eps, {Act(checked_number("activation", activation, kActs)), kLeakySlope}, given(r)};
  if (!given(mean) && !given(r) && GroupRows::pays(x, groups, {y})) {
    group_rows_fwd(op, x, w, b, y, stats, channel, groups);
    return {y, stats};
  }
  for_samples(x, groups, [&](int64_t first, int64_t count) {
    using F = ChannelNormFwd;
    const Tensor some = *narrow(x, 0, first, count), y_some = *narrow(y, 0, first, count);
    const OptTensor r_some = narrow(r, 0, first, count), found = groups ? narrow(stats, 1, first, count) : stats;
    const Walk walk(op, some, !groups, {r_some, y_some});
    if (given(found)) statistics(groups ? Walk(op, Walk::groups_as_channels(some, groups), false, {}) : walk, *found);
    const auto of = [&](int i) { return groups ? per_channel((*found)[i], x.size(1)) : (*found)[i]; };
    const Tensor rows = walk.whole(some);
    Frame frame(op, rows, "input", walk.rows(), rows.dim());
    RowArgs<F> args{{{}, channel}};
    frame.in(args.in[F::kX], rows, "input");
    frame.in(args.in[F::kR], given(r) ? walk.whole(*r_some) : rows, "residual");
    const auto spread = [&](const Tensor& t) { return walk.spread(t); };
    if (given(found))
      channel_rows(frame, args, of(0), of(1), of(2), w, b, spread);
    else
      channel_rows(frame, args, *mean, *var, {}, w, b, spread);
    frame.out(args.out[F::kY], walk.whole(y_some));
    run(frame, args);
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_norm_bwd(
    const Tensor& gradient,  // [N, C, *]
    const Tensor& input,     // [N, C, *]
    const OptTensor& w,      // [C]
    const OptTensor& b,      // [C]
    const OptTensor& added,  // [N, C, *]
    const Tensor& mean,      // [N, groups], or [C] without groups
    const Tensor& var,       // the same
    const OptTensor& lost,   // the same; not given: the statistics are constants
    int64_t groups, double eps, int64_t activation, std::array<bool, 4> needed) {
  RECORD_FUNCTION("fusegrad::channel_norm_bwd", {});
  const at::AutoDispatchBelowADInplaceOrView views_without_a_graph;
  const char* const op = groups ? "group_norm backward" : "batch_norm backward";
  check(op, input, gradient, w, b, added, {}, {});
  const Tensor x = walkable(input), dy = walkable(gradient);
  const OptTensor r = walkable(added);
  const int64_t n = x.size(0), c = x.size(1), m = x.numel() / std::max<int64_t>(1, groups ? n * groups : c);
  const ChannelRow channel{eps, {Act(checked_number("activation", activation, kActs)), kLeakySlope}, given(r)};
  const bool through_sets = needed[0] && given(lost), summed = needed[1] || needed[2] || through_sets;
  Tensor dx, dw, db, dr, sums, weights;
  if (needed[0]) dx = empty_as(x);
  if (needed[3]) dr = empty_as(x);
  const auto w_type = given(w) ? w->scalar_type() : x.scalar_type(), b_type = given(b) ? b->scalar_type() : x.scalar_type();
  if (given(lost) && !given(r) && !needed[3] && GroupRows::pays(x, groups, {dy, dx})) {
    const auto [of_w, of_b] = group_rows_bwd(op, dy, x, w, b, mean, var, *lost, dx, channel, groups, needed[1], needed[2]);
    return {dx, needed[1] ? of_w.to(w_type) : of_w, needed[2] ? of_b.to(b_type) : of_b, dr};
  }
  if (summed) sums = groups ? at::empty({2, n, c}, wide_options(x)) : at::empty({2, c}, wide_options(x));
  if (groups && given(w)) weights = w->to(sums.scalar_type());

  for_samples(x, groups, [&](int64_t first, int64_t count) {
    const Tensor some = *narrow(x, 0, first, count), dy_some = *narrow(dy, 0, first, count);
    const OptTensor r_some = narrow(r, 0, first, count), dx_some = narrow(dx, 0, first, count),
                    dr_some = narrow(dr, 0, first, count);
    const Walk walk(op, some, !groups, {r_some, dy_some, dx_some, dr_some});
    const auto of = [&](const Tensor& t) { return groups ? per_channel(*narrow(t, 0, first, count), c) : t; };
    const Tensor of_mean = of(mean), of_var = of(var);
    const OptTensor of_lost = given(lost) ? OptTensor(of(*lost)) : lost;
    Tensor g;  // [2, N, C], or [2, C] without groups: what the sets add up to
    if (summed) {
      using B = ChannelSums;
      g = groups ? *narrow(sums, 1, first, count) : sums;
      const Tensor cells = walk.cell_memory(g, 2);
      walk.for_cells([&](int64_t column, int64_t parts, int64_t size, int64_t cell) {
        const auto cut = [&](const Tensor& t) { return walk.cells(t, column, parts, size); };
        const Tensor rows = cut(some);
        Frame frame(op, rows, "input", rows.dim() - 1, rows.dim());
        RowArgs<B> args{{{}, channel}};
        frame.in(args.in[B::kX], rows, "input");
        frame.in(args.in[B::kDy], cut(dy_some), "gradient");
        frame.in(args.in[B::kR], given(r) ? cut(*r_some) : rows, "residual");
        channel_rows(frame, args, of_mean, of_var, of_lost, w, b, [&](const Tensor& t) {
          at::DimVector sizes(rows.sizes().begin(), rows.sizes().end() - 1);
          return walk.spread(t).unsqueeze(0).expand(sizes);
        });
        for (int i : {B::kDz, B::kDzH}) frame.per_row(args.scalar_out[i], walk.cell_values(cells, i, cell, parts), "cell");
        run(frame, args);
      });
      const int64_t channels = groups ? count * c : c;
      if (!cells.is_alias_of(g)) totals(op, cells.view({2, channels, channels ? cells.numel() / (2 * channels) : 0}), g);
      if (groups && through_sets) {
        const Tensor sets = at::empty({2, count * groups}, sums.options());
        const Tensor terms = g.reshape({2, count * groups, c / groups});
        totals(op, terms, sets, given(weights) ? OptTensor(weights.repeat({count}).view(terms.sizes().slice(1))) : OptTensor());
        g = per_channel(sets.view({2 * count, groups}), c).view({2, count, c});
      }
    }
    if (!needed[0] && !needed[3]) return;
    using B = ChannelNormBwd;
    const Tensor rows = walk.whole(some);
    Frame frame(op, rows, "input", walk.rows(), rows.dim());
    RowArgs<B> args{{{}, channel, double(m), groups > 0}};
    const auto cut = [&](const Tensor& t) { return walk.spread(t); };
    frame.in(args.in[B::kX], rows, "input");
    frame.in(args.in[B::kDy], walk.whole(dy_some), "gradient");
    frame.in(args.in[B::kR], given(r) ? walk.whole(*r_some) : rows, "residual");
    channel_rows(frame, args, of_mean, of_var, of_lost, w, b, cut);
    if (through_sets) {
      frame.per_row(args.scalar_in[B::kG], cut(g[0]), "sums");
      frame.per_row(args.scalar_in[B::kGH], cut(g[1]), "sums");
    }
    if (needed[0]) frame.out(args.out[B::kDx], walk.whole(*dx_some));
    if (needed[3]) frame.out(args.out[B::kDr], walk.whole(*dr_some));
    run(frame, args);
  });
  const Tensor of_params = groups && (needed[1] || needed[2]) ? at::sum(sums, 1) : sums;
  if (needed[1]) dw = of_params[1].to(w_type, false, true);
  if (needed[2]) db = of_params[0].to(b_type, false, true);  // a copy: results share no memory
  return {dx, dw, db, dr};
}

}  // namespace fusegrad
