#include "softmax.h"

#include "../host/pool.h"
#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
namespace {

const char* const kNames[] = {"softmax", "log_softmax", "scaled_masked_softmax"};
const char* const kBackwards[] = {"softmax backward", "log_softmax backward", "scaled_masked_softmax backward"};

// Contiguous, as torch's; but where the columns lie next to each other (channels_last), so do those of the result.
Tensor empty_result(const Frame& frame, const Tensor& x, int64_t dim) {
  return dim == x.dim() - 1 || x.stride(dim) == 1 ? frame.empty_rows() : pool::empty(x.sizes(), x);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> softmax_fwd(const Tensor& x,        // [*]
                                               const OptTensor& mask,  // [*], bool or floating-point
                                               int64_t dim, double scale, bool causal, int64_t kind,
                                               bool statistics) {  // return the maximum and log_sum of each row, too
  RECORD_FUNCTION("fusegrad::softmax_fwd", {});
  using F = SoftmaxFwd;
  Frame frame(kNames[checked_number("softmax: kind", kind, std::size(kNames))], x, "input", dim, dim + 1);
  const Mask type = !given(mask) ? Mask::none : mask->scalar_type() == at::kBool ? Mask::boolean : Mask::additive;
  RowArgs<F> args{{{}, SoftmaxKind(kind), type, causal, causal ? x.size(dim - 1) : 1, scale}};
  Tensor y = empty_result(frame, x, dim), top, log_sum;
  frame.in(args.in[F::kX], x, "input");
  frame.mixed(args.mixed[F::kMask], mask, "mask");
  frame.out(args.out[F::kY], y);
  if (statistics) {
    frame.per_row(args.scalar_out[F::kTop], top = frame.empty_per_row(), "top");
    frame.per_row(args.scalar_out[F::kLogSum], log_sum = frame.empty_per_row(), "log_sum");
  }
  run(frame, args);
  return {y, top, log_sum};
}

Tensor softmax_bwd(const Tensor& dy,          // [*]
                   const Tensor& saved,       // [*]: the output; the input if there are
                   const OptTensor& top,      // [* without dim]
                   const OptTensor& log_sum,  // [* without dim]
                   int64_t dim, double scale, int64_t kind) {
  RECORD_FUNCTION("fusegrad::softmax_bwd", {});
  using B = SoftmaxBwd;
  Frame frame(kBackwards[checked_number("softmax: kind", kind, std::size(kBackwards))], saved, "output", dim, dim + 1);
  RowArgs<B> args{{{}, SoftmaxKind(kind), scale}};
  Tensor dx = empty_result(frame, saved, dim);
  frame.in(args.in[B::kSaved], saved, "output");
  frame.in(args.in[B::kDy], dy, "gradient");
  if (given(top)) frame.per_row(args.scalar_in[B::kTop], *top, "top");
  if (given(log_sum)) frame.per_row(args.scalar_in[B::kLogSum], *log_sum, "log_sum");
  frame.out(args.out[B::kDx], dx);
  run(frame, args);
  return dx;
}

}  // namespace fusegrad
