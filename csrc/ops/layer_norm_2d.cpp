#include "../host/run.h"
#include "layer_norm.h"
#include "ops.h"

namespace fusegrad {

std::tuple<Tensor, Tensor, Tensor> layer_norm_2d_fwd(const Tensor& x,     // [N, C, *]
                                                     const OptTensor& w,  // [C]
                                                     const OptTensor& b,  // [C]
                                                     double eps) {
  RECORD_FUNCTION("fusegrad::layer_norm_2d_fwd", {});
  Frame frame("layer_norm_2d", x, "input", 1, 2);
  RowArgs<LayerNormFwd> args{{{}, eps, given(b)}};
  Tensor y = empty_as(x), mean = frame.empty_per_row(), rstd = frame.empty_per_row();
  frame.in(args.in[LayerNormFwd::kX], x, "input");
  args.param[LayerNormFwd::kW] = frame.params(w, "weight");
  args.param[LayerNormFwd::kB] = frame.params(b, "bias");
  frame.out(args.out[LayerNormFwd::kY], y);
  frame.per_row(args.scalar_out[LayerNormFwd::kMean], mean, "mean");
  frame.per_row(args.scalar_out[LayerNormFwd::kRstd], rstd, "rstd");
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
  RowArgs<LayerNormBwd> args{};
  Tensor dx, dw, db;
  frame.in(args.in[LayerNormBwd::kX], x, "input");
  frame.in(args.in[LayerNormBwd::kDy], dy, "gradient");
  frame.params(b, "bias");
  args.param[LayerNormBwd::kW] = frame.params(w, "weight");
  frame.per_row(args.scalar_in[LayerNormBwd::kMean], mean, "mean");
  frame.per_row(args.scalar_in[LayerNormBwd::kRstd], rstd, "rstd");
  args.out[LayerNormBwd::kDx].col = step_as(x, 1);  // so that sums have the same bits without it
  if (needed[0]) frame.out(args.out[LayerNormBwd::kDx], dx = empty_as(x));
  if (needed[1]) args.col_out[LayerNormBwd::kDw] = (dw = frame.empty_params(w)).mutable_data_ptr();
  if (needed[2]) args.col_out[LayerNormBwd::kDb] = (db = frame.empty_params(b)).mutable_data_ptr();
  run(frame, args);
  return {dx, dw, db};
}

}  // namespace fusegrad
