#include <ATen/ops/empty.h>

#include "../host/run.h"
#include "dropout.h"
#include "ops.h"

namespace fusegrad {

// The kernel reads the seed: to look at it here would be to wait for the device.
Dropout dropout_of(const Frame& frame, const Tensor& seed, double p) {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong && seed.dim() == 0, frame.op(), ": seed must be a 0-dim int64 tensor, got ",
                   seed.scalar_type(), " ", seed.sizes());
  TORCH_CHECK(seed.device() == frame.main().device(), frame.op(), ": seed must be on ", frame.main().device(),
              ", where the input is, got a tensor on ", seed.device());
  return Dropout(seed.const_data_ptr<int64_t>(), p);
}

namespace {

// y = x m
Tensor dropped(const char* op, const Tensor& x, const char* name, const Tensor& seed, double p) {
  Frame frame = Frame::flat(op, x, name);
  MapArgs<DropoutFwd> args{{{}, dropout_of(frame, seed, p)}};
  Tensor y = empty_as(x);
  frame.numbers(args.number);
  frame.out(args.out[DropoutFwd::kY], y);
  frame.in(args.in[DropoutFwd::kX], x, name);
  run(frame, args);
  return y;
}

}  // namespace

Tensor dropout_fwd(const Tensor& x,            // [*]
                   const OptTensor& bias,      // [n], the last dimension
                   const OptTensor& residual,  // [*]
                   const Tensor& seed,         // []
                   double p) {
  RECORD_FUNCTION("fusegrad::dropout_fwd", {});
  if (!given(residual)) return dropped("dropout", x, "input", seed, p);
  using F = BiasDropoutAddFwd;
  Frame frame("bias_dropout_add", x, "input", x.dim() - 1, x.dim());
  RowArgs<F> args{{{}, dropout_of(frame, seed, p)}};
  Tensor y = frame.empty_rows();
  frame.in(args.in[F::kX], x, "input");
  frame.in(args.in[F::kResidual], *residual, "residual");
  args.param[F::kBias] = frame.params(bias, "bias");
  frame.out(args.out[F::kY], y);
  run(frame, args);
  return y;
}

std::tuple<Tensor, Tensor> dropout_bwd(const Tensor& dy,       // [*]
                                       const OptTensor& bias,  // [n]
                                       const Tensor& seed,     // []
                                       double p, std::array<bool, 2> needed) {
  RECORD_FUNCTION("fusegrad::dropout_bwd", {});
  if (!needed[1]) return {needed[0] ? dropped("dropout backward", dy, "gradient", seed, p) : Tensor(), Tensor()};
  using F = BiasDropoutAddBwd;
  Frame frame("bias_dropout_add backward", dy, "gradient", dy.dim() - 1, dy.dim());
  RowArgs<F> args{{{}, dropout_of(frame, seed, p)}};
  Tensor dx, dbias;
  frame.in(args.in[F::kDy], dy, "gradient");
  args.param[F::kBias] = frame.params(bias, "bias");
  if (needed[0]) frame.out(args.out[F::kDx], dx = frame.empty_rows());
  args.col_out[F::kDbias] = (dbias = frame.empty_params(bias)).mutable_data_ptr();
  run(frame, args);
  return {dx, dbias};
}

Tensor dropout_mask(const Tensor& seed,         // []
                    c10::SymIntArrayRef sizes,  // of the mask
                    double p) {
  RECORD_FUNCTION("fusegrad::dropout_mask", {});
  const Tensor kept = at::empty(C10_AS_INTARRAYREF_SLOW(sizes), seed.options().dtype(at::kFloat));
  Frame frame = Frame::flat("dropout_mask", kept, "mask");
  MapArgs<DropoutMask> args{{{}, dropout_of(frame, seed, p)}};
  frame.numbers(args.number);
  frame.out(args.out[0], kept);
  run(frame, args);
  return kept.to(at::kBool);
}

}  // namespace fusegrad
