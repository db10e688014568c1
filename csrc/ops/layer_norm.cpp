#include "layer_norm.h"

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x,     // [*, normalized dims]
                                                  const OptTensor& w,  // [normalized dims]
                                                  const OptTensor& b,  // [normalized dims]
                                                  int64_t dims, double eps) {
  RECORD_FUNCTION("fusegrad::layer_norm_fwd", {});
  using F = LayerNormFwd;
  Frame frame("layer_norm", x, "input", x.dim() - dims, x.dim());
  RowArgs<F> args{{{}, eps, given(b)}};
  Tensor y = frame.empty_rows(), mean = frame.empty_per_row(), rstd = frame.empty_per_row();
  frame.in(args.in[F::kX], x, "input");
  args.param[F::kW] = frame.params(w, "weight");
  args.param[F::kB] = frame.params(b, "bias");
  frame.out(args.out[F::kY], y);
  frame.per_row(args.scalar_out[F::kMean], mean, "mean");
  frame.per_row(args.scalar_out[F::kRstd], rstd, "rstd");
  run(frame, args);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy,    // [*, normalized dims]
                                                  const Tensor& x,     // [*, normalized dims]
                                                  const OptTensor& w,  // [normalized dims]
                                                  const OptTensor& b,  // [normalized dims]
                                                  const Tensor& mean,  // [*]
                                                  const Tensor& rstd,  // [*]
                                                  int64_t dims, std::array<bool, 3> needed) {
  RECORD_FUNCTION("fusegrad::layer_norm_bwd", {});
  using B = LayerNormBwd;
  Frame frame("layer_norm backward", x, "input", x.dim() - dims, x.dim());
  RowArgs<B> args{};
  Tensor dx, dw, db;
  frame.in(args.in[B::kX], x, "input");
  frame.in(args.in[B::kDy], dy, "gradient");
  args.param[B::kW] = frame.params(w, "weight");
  frame.params(b, "bias");  // for its type
  frame.per_row(args.scalar_in[B::kMean], mean, "mean");
  frame.per_row(args.scalar_in[B::kRstd], rstd, "rstd");
  if (needed[0]) frame.out(args.out[B::kDx], dx = frame.empty_rows());
  if (needed[1]) args.col_out[B::kDw] = (dw = frame.empty_params(w)).mutable_data_ptr();
  if (needed[2]) args.col_out[B::kDb] = (db = frame.empty_params(b)).mutable_data_ptr();
  run(frame, args);
  return {dx, dw, db};
}

}  // namespace fusegrad
