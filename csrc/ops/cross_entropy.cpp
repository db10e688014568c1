#include "cross_entropy.h"

#include <ATen/ops/sum.h>

#include <algorithm>

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
namespace {

Frame classes(const char* op, const Tensor& x) {
  const int64_t dim = std::min<int64_t>(1, x.dim() - 1);
  return Frame(op, x, "input", dim, dim + 1);
}

// The sum of the class weights, where the formulas need it.
OptTensor weight_sum(const Frame& frame, const OptTensor& w, double smoothing) {
  return given(w) && smoothing != 0 ? OptTensor(at::sum(*w, frame.wide())) : OptTensor();
}

void forward(Frame& frame, const Tensor& x, const Tensor& target, const OptTensor& w, const CrossEntropyOptions& options,
             const LossRows& out) {
  using F = CrossEntropyFwd;
  RowArgs<F> args{{{}, options}};
  frame.in(args.in[F::kX], x, "input");
  frame.labels(args.index[F::kTarget], target, "target");
  args.param[F::kW] = frame.params(w, "weight");
  const OptTensor sum = weight_sum(frame, w, options.smoothing);
  if (sum) frame.per_row(args.scalar_in[F::kWeightSum], *sum, "sum of weight");
  frame.per_row(args.scalar_out[F::kLoss], out.loss, "loss");
  frame.per_row(args.scalar_out[F::kTop], out.top, "top");
  frame.per_row(args.scalar_out[F::kLogSum], out.log_sum, "log_sum");
  if (out.weight.defined()) frame.per_row(args.scalar_out[F::kWeight], out.weight, "weights");
  if (out.lse.defined()) frame.per_row(args.scalar_out[F::kLse], out.lse, "lse");
  run(frame, args);
}

}  // namespace

void check_labels(const char* op, const Tensor& target, int64_t classes, int64_t ignore_index) {
  if (kEmulated || !target.is_cpu()) return;
  const Tensor dense = target.contiguous();
  const int64_t* t = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i)
    TORCH_CHECK_INDEX((t[i] >= 0 && t[i] < classes) || t[i] == ignore_index, op, ": target must be in [0, ", classes,
                      ") or ignore_index (", ignore_index, "), got ", t[i]);
}

void loss_rows(const char* op, const Tensor& x, const Tensor& target, const OptTensor& w, const CrossEntropyOptions& options,
               const LossRows& out) {
  Frame frame = classes(op, x);
  forward(frame, x, target, w, options, out);
}

Tensor loss_rows_backward(const char* op, const Tensor& x, const Tensor& target, const OptTensor& w,
                          const CrossEntropyOptions& options, const LossRows& saved, const LossGrads& grads, Tensor dx,
                          const ClassBlock& block) {
  using B = CrossEntropyBwd;
  Frame frame = classes(op, x);
  const bool part = block.classes > frame.cols();
  RowArgs<B> args{{{}, options, block.first, part ? block.classes : frame.cols()}};
  if (!dx.defined()) dx = frame.empty_rows();
  frame.in(args.in[B::kX], x, "input");
  frame.labels(args.index[B::kTarget], target, "target");
  args.param[B::kW] = frame.params(part && given(w) ? w->narrow(0, block.first, frame.cols()) : w, "weight");
  const OptTensor sum = weight_sum(frame, w, options.smoothing);
  if (sum) frame.per_row(args.scalar_in[B::kWeightSum], *sum, "sum of weight");
  if (part && given(w)) {  // that of a label of another block, too
    const Tensor of_labels = w->index_select(0, target.clamp(0, block.classes - 1)).to(frame.wide());
    frame.per_row(args.scalar_in[B::kLabelWeight], of_labels, "weights of the labels");
  }
  frame.per_row(args.scalar_in[B::kTop], saved.top, "top");
  frame.per_row(args.scalar_in[B::kLogSum], saved.log_sum, "log_sum");
  if (given(grads.loss)) frame.per_row(args.scalar_in[B::kDLoss], *grads.loss, "gradient of the loss");
  if (given(grads.lse)) frame.per_row(args.scalar_in[B::kDLse], *grads.lse, "gradient of lse");
  if (given(grads.divisor)) frame.per_row(args.scalar_in[B::kDivisor], *grads.divisor, "divisor");
  frame.out(args.out[B::kDx], dx);
  run(frame, args);
  return dx;
}

std::tuple<Tensor, Tensor> loss_total(const char* op, const Tensor& loss, const Tensor& weight, const OptTensor& num_items,
                                      double items, bool mean, bool empty_is_zero) {
  Frame frame(op, loss, "loss", 0, loss.dim());
  RowArgs<LossTotal> args{{{}, items, mean, empty_is_zero}};
  Tensor total = frame.empty_per_row(), divisor = frame.empty_per_row();
  frame.in(args.in[LossTotal::kLoss], loss, "loss");
  frame.in(args.in[LossTotal::kWeight], weight, "weights");
  if (given(num_items)) frame.per_row(args.scalar_in[LossTotal::kItems], num_items->to(frame.wide()), "num_items");
  frame.per_row(args.scalar_out[LossTotal::kTotal], total, "loss");
  frame.per_row(args.scalar_out[LossTotal::kDivisor], divisor, "divisor");
  run(frame, args);
  return {total, divisor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd(
    const Tensor& x,             // [N, C, *] or [C]
    const Tensor& target,        // [N, *] or []
    const OptTensor& w,          // [C]
    const OptTensor& num_items,  // []
    int64_t ignore_index, double smoothing, double z_loss, double softcap, double scale,
    bool reduce,         // to one number: the sum, or
    bool mean,           // the sum over num_items, or
    double items,        // over this many, or, if it is 0, over the sum of the labels' weights;
    bool empty_is_zero,  // over nothing: 0 instead of NaN
    bool wide, bool return_lse) {
  RECORD_FUNCTION("fusegrad::cross_entropy_fwd", {});
  Frame frame = classes("cross_entropy", x);
  const auto out_type = wide ? frame.wide() : x.scalar_type();
  LossRows rows{frame.empty_per_row(), frame.empty_per_row(), frame.empty_per_row()};
  if (reduce) rows.weight = frame.empty_per_row();
  if (return_lse) rows.lse = frame.empty_per_row();
  check_labels("cross_entropy", target, frame.cols(), ignore_index);
  forward(frame, x, target, w, {ignore_index, smoothing, z_loss, softcap, scale}, rows);
  Tensor divisor;
  if (reduce)
    std::tie(rows.loss, divisor) = loss_total("cross_entropy", rows.loss, rows.weight, num_items, items, mean, empty_is_zero);
  return {rows.loss.to(out_type), return_lse ? rows.lse.to(out_type) : rows.lse, rows.top, rows.log_sum, divisor};
}

Tensor cross_entropy_bwd(const OptTensor& dloss,    // [] or [N, *]
                         const OptTensor& dlse,     // [N, *]
                         const Tensor& x,           // [N, C, *] or [C]
                         const Tensor& target,      // [N, *] or []
                         const OptTensor& w,        // [C]
                         const Tensor& top,         // [N, *]
                         const Tensor& log_sum,     // [N, *]
                         const OptTensor& divisor,  // []
                         int64_t ignore_index, double smoothing, double z_loss, double softcap, double scale) {
  RECORD_FUNCTION("fusegrad::cross_entropy_bwd", {});
  return loss_rows_backward("cross_entropy backward", x, target, w, {ignore_index, smoothing, z_loss, softcap, scale},
                            {{}, top, log_sum}, {dloss, dlse, divisor});
}

}  // namespace fusegrad
