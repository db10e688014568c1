#include "vocab_parallel_cross_entropy.h"

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {

std::tuple<Tensor, Tensor, Tensor, Tensor> vocab_parallel_cross_entropy_fwd(
    const Tensor& x,                 // [N, C / number of shards]
    const Tensor& target,            // [N]
    int64_t first, int64_t classes,  // number of the first class of this shard, and of all classes
    int64_t ignore_index, double smoothing, double softcap, double scale) {
  RECORD_FUNCTION("fusegrad::vocab_parallel_cross_entropy_fwd", {});
  using F = VocabParallelCrossEntropyFwd;
  constexpr const char* op = "vocab_parallel_cross_entropy";
  Frame frame(op, x, "input", 1, 2);
  RowArgs<F> args{};
  args.op.o = {ignore_index, smoothing, 0, softcap, scale};
  args.op.first = first, args.op.classes = classes;
  frame.in(args.in[F::kX], x, "input");
  frame.labels(args.index[F::kTarget], target, "target");
  check_labels(op, target, classes, ignore_index);
  Tensor top = frame.empty_per_row(), mass = frame.empty_per_row(), label = frame.empty_per_row();
  Tensor below = smoothing != 0 ? frame.empty_per_row() : Tensor();
  frame.per_row(args.scalar_out[F::kTop], top, "top");
  frame.per_row(args.scalar_out[F::kMass], mass, "mass");
  if (below.defined()) frame.per_row(args.scalar_out[F::kBelow], below, "below");
  frame.per_row(args.scalar_out[F::kLabel], label, "label");
  run(frame, args);
  return {top, mass, label, below};
}

Tensor vocab_parallel_cross_entropy_bwd(const OptTensor& dloss,    // [] or [N]
                                        const OptTensor& dlse,     // [N]
                                        const Tensor& x,           // [N, C / number of shards]
                                        const Tensor& target,      // [N]
                                        const Tensor& top,         // [N]
                                        const Tensor& log_sum,     // [N]
                                        const OptTensor& divisor,  // []
                                        int64_t first, int64_t classes, int64_t ignore_index, double smoothing, double z_loss,
                                        double softcap, double scale) {
  RECORD_FUNCTION("fusegrad::vocab_parallel_cross_entropy_bwd", {});
  return loss_rows_backward("vocab_parallel_cross_entropy backward", x, target, {},
                            {ignore_index, smoothing, z_loss, softcap, scale}, {{}, top, log_sum}, {dloss, dlse, divisor}, {},
                            {first, classes});
}

}  // namespace fusegrad
