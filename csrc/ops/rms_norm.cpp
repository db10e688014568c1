#include "rms_norm.h"

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x,     // [*, normalized dims]
                                        const OptTensor& w,  // [normalized dims]
                                        int64_t dims, double eps, double offset, bool cast_first) {
  RECORD_FUNCTION("fusegrad::rms_norm_fwd", {});
  Frame frame("rms_norm", x, "input", x.dim() - dims, x.dim());
  RowArgs<RMSNormFwd> args{{{}, eps, given(w) ? offset : 0, cast_first}};
  Tensor y = frame.empty_rows(), rstd = frame.empty_per_row();
  frame.in(args.in[RMSNormFwd::kX], x, "input");
  args.param[RMSNormFwd::kW] = frame.params(w, "weight");
  frame.out(args.out[RMSNormFwd::kY], y);
  frame.per_row(args.scalar_out[RMSNormFwd::kRstd], rstd, "rstd");
  run(frame, args);
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy,    // [*, normalized dims]
                                        const Tensor& x,     // [*, normalized dims]
                                        const OptTensor& w,  // [normalized dims]
                                        const Tensor& rstd,  // [*]
                                        int64_t dims, double offset, std::array<bool, 2> needed) {
  RECORD_FUNCTION("fusegrad::rms_norm_bwd", {});
  Frame frame("rms_norm backward", x, "input", x.dim() - dims, x.dim());
  RowArgs<RMSNormBwd> args{{{}, given(w) ? offset : 0}};
  Tensor dx, dw;
  frame.in(args.in[RMSNormBwd::kX], x, "input");
  frame.in(args.in[RMSNormBwd::kDy], dy, "gradient");
  args.param[RMSNormBwd::kW] = frame.params(w, "weight");
  frame.per_row(args.scalar_in[RMSNormBwd::kRstd], rstd, "rstd");
  if (needed[0]) frame.out(args.out[RMSNormBwd::kDx], dx = frame.empty_rows());
  if (needed[1]) args.col_out[RMSNormBwd::kDw] = (dw = frame.empty_params(w)).mutable_data_ptr();
  run(frame, args);
  return {dx, dw};
}

}  // namespace fusegrad
