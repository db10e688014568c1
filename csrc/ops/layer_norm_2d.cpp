#include "layer_norm_2d.h"

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {

std::tuple<Tensor, Tensor, Tensor> layer_norm_2d_fwd(const Tensor& x,     // [N, C, *]
                                                     const OptTensor& w,  // [C]
                                                     const OptTensor& b,  // [C]
                                                     double eps) {
  RECORD_FUNCTION("fusegrad::layer_norm_2d_fwd", {});
  Frame frame("layer_norm_2d", x, "input", 1, 2);
  RowArgs<LayerNorm2dFwd> args{{{}, eps, given(b)}};
  Tensor y = empty_as(x), mean = frame.empty_per_row(), rstd = frame.empty_per_row();
  frame.in(args.in[LayerNorm2dFwd::kX], x, "input");
  args.param[LayerNorm2dFwd::kW] = frame.params(w, "weight");
  args.param[LayerNorm2dFwd::kB] = frame.params(b, "bias");
  frame.out(args.out[LayerNorm2dFwd::kY], y);
  frame.per_row(args.scalar_out[LayerNorm2dFwd::kMean], mean, "mean");
  frame.per_row(args.scalar_out[LayerNorm2dFwd::kRstd], rstd, "rstd");
  run(frame, args);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_2d_bwd(const Tensor& dy,    // [N, C, *]
                                                     const Tensor& x,     // [N, C, *]
                                                     const OptTensor& w,  // [C]
                                                     const OptTensor& b,  // [C]
                                                     const Tensor& mean,  // [N, *]
                                                     const Tensor& rstd,  // [N, *]
                                                     std::array<bool, 3> needed) {
  RECORD_FUNCTION("fusegrad::layer_norm_2d_bwd", {});
  Frame frame("layer_norm_2d backward", x, "input", 1, 2);
  RowArgs<LayerNorm2dBwd> args{};
  Tensor dx, dw, db;
  frame.in(args.in[LayerNorm2dBwd::kX], x, "input");
  frame.in(args.in[LayerNorm2dBwd::kDy], dy, "gradient");
  frame.params(b, "bias");
  args.param[LayerNorm2dBwd::kW] = frame.params(w, "weight");
  frame.per_row(args.scalar_in[LayerNorm2dBwd::kMean], mean, "mean");
  frame.per_row(args.scalar_in[LayerNorm2dBwd::kRstd], rstd, "rstd");
  if (needed[0]) frame.out(args.out[LayerNorm2dBwd::kDx], dx = empty_as(x));
  if (needed[1]) args.col_out[LayerNorm2dBwd::kDw] = (dw = frame.empty_params(w)).mutable_data_ptr();
  if (needed[2]) args.col_out[LayerNorm2dBwd::kDb] = (db = frame.empty_params(b)).mutable_data_ptr();
  run(frame, args);
  return {dx, dw, db};
}

}  // namespace fusegrad
