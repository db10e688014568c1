#include "losses.h"

#include <ATen/ops/div.h>

#include <cmath>

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
namespace {

const char* const kNames[] = {"mse_loss",           "l1_loss", "huber_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits",
                              "sigmoid_focal_loss", "kl_div",  "js_div"};
const char* const kBackwards[] = {"mse_loss backward",
                                  "l1_loss backward",
                                  "huber_loss backward",
                                  "smooth_l1_loss backward",
                                  "binary_cross_entropy_with_logits backward",
                                  "sigmoid_focal_loss backward",
                                  "kl_div backward",
                                  "js_div backward"};

// To what a loss is reduced; over_weight divides by the sum of the weights, over_batch by the size of the first dimension.
enum Reduction { kNone, kSum, kMean, kOverWeight, kOverBatch };

double items(const Tensor& x, int64_t reduction) {
  return reduction == kMean ? double(x.numel()) : reduction == kOverBatch && x.dim() > 0 ? double(x.size(0)) : 1;
}

}  // namespace

std::tuple<Tensor, Tensor> losses_fwd(const Tensor& x,       // [*]
                                      const Tensor& target,  // [*], as all others of any dtype
                                      const OptTensor& w,    // [*]
                                      const OptTensor& pos,  // [*]
                                      int64_t kind, double a, double b, bool log_target, int64_t reduction, bool wide) {
  RECORD_FUNCTION("fusegrad::losses_fwd", {});
  using F = LossesFwd;
  Frame frame = Frame::flat(kNames[checked_number("losses: kind", kind, std::size(kNames))], x, "input");
  MapArgs<F> args{{{}, {LossKind(kind), log_target, a, b, std::log(a), given(pos)}}};
  frame.in(args.in[F::kX], x, "input");
  frame.mixed(args.mixed[F::kT], target, "target");
  frame.mixed(args.mixed[F::kW], w, "weight");
  frame.mixed(args.mixed[F::kV], pos, "pos_weight");
  if (reduction == kNone) {
    Tensor y = empty_as(x);
    frame.out(args.out[F::kLoss], y);
    run(frame, args);
    return {y, Tensor()};
  }
  const Tensor sums = run_sums(frame, args);
  const bool over_weight = reduction == kOverWeight;
  auto [loss, divisor] = loss_total(kNames[kind], sums[F::kLoss], sums[F::kWeight], OptTensor(),
                                    over_weight ? 0 : items(x, reduction), reduction != kSum, false);
  return {loss.to(wide ? frame.wide() : x.scalar_type()), over_weight ? divisor : Tensor()};
}

std::tuple<Tensor, Tensor> losses_bwd(const Tensor& dloss,       // [] or [*]
                                      const Tensor& x,           // [*]
                                      const Tensor& target,      // [*]
                                      const OptTensor& w,        // [*]
                                      const OptTensor& pos,      // [*]
                                      const OptTensor& divisor,  // []
                                      int64_t kind, double a, double b, bool log_target, int64_t reduction,
                                      std::array<bool, 2> needed) {
  RECORD_FUNCTION("fusegrad::losses_bwd", {});
  using B = LossesBwd;
  Frame frame = Frame::flat(kBackwards[checked_number("losses: kind", kind, std::size(kBackwards))], x, "input");
  MapArgs<B> args{{{}, {LossKind(kind), log_target, a, b, std::log(a), given(pos)}, 1 / items(x, reduction), needed[1]}};
  Tensor dx, dt;
  const Tensor g = given(divisor) ? at::div(dloss, *divisor) : dloss;
  if (needed[0]) frame.out(args.out[B::kDx], dx = empty_as(x));
  if (needed[1]) frame.out(args.out[B::kDt], dt = empty_as(x));
  frame.in(args.in[B::kX], x, "input");
  frame.mixed(args.mixed[B::kT], target, "target");
  frame.mixed(args.mixed[B::kW], w, "weight");
  frame.mixed(args.mixed[B::kV], pos, "pos_weight");
  frame.mixed(args.mixed[B::kG], g.expand_symint(x.sym_sizes()), "gradient");
  run(frame, args);
  return {dx, dt};
}

}  // namespace fusegrad
