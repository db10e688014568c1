#include "dyt.h"

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {

Tensor dyt_fwd(const Tensor& x,      // [*, columns' dims]
               const Tensor& alpha,  // []
               const OptTensor& w,   // [columns' dims]
               const OptTensor& b,   // [columns' dims]
               int64_t dims) {
  RECORD_FUNCTION("fusegrad::dyt_fwd", {});
  using F = DyTFwd;
  Frame frame("dyt", x, "input", x.dim() - dims, x.dim());
  RowArgs<F> args{{{}, given(b)}};
  Tensor y = frame.empty_rows();
  frame.in(args.in[F::kX], x, "input");
  frame.per_row(args.scalar_in[F::kAlpha], alpha, "alpha");
  args.param[F::kW] = frame.params(w, "weight");
  args.param[F::kB] = frame.params(b, "bias");
  frame.out(args.out[F::kY], y);
  run(frame, args);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dyt_bwd(const Tensor& dy,     // [*, columns' dims]
                                                   const Tensor& x,      // [*, columns' dims]
                                                   const Tensor& alpha,  // []
                                                   const OptTensor& w,   // [columns' dims]
                                                   const OptTensor& b,   // [columns' dims]
                                                   int64_t dims, std::array<bool, 4> needed) {
  RECORD_FUNCTION("fusegrad::dyt_bwd", {});
  using B = DyTBwd;
  Frame frame("dyt backward", x, "input", x.dim() - dims, x.dim());
  RowArgs<B> args{};
  Tensor dx, dalpha, dw, db;
  frame.in(args.in[B::kX], x, "input");
  frame.in(args.in[B::kDy], dy, "gradient");
  frame.per_row(args.scalar_in[B::kAlpha], alpha, "alpha");
  args.param[B::kW] = frame.params(w, "weight");
  frame.params(b, "bias");  // for its type
  if (needed[0]) frame.out(args.out[B::kDx], dx = frame.empty_rows());
  if (needed[1])
    args.col_out[B::kDAlpha] = (dalpha = at::empty({frame.cols()}, x.options().dtype(frame.wide()))).mutable_data_ptr();
  if (needed[2]) args.col_out[B::kDw] = (dw = frame.empty_params(w)).mutable_data_ptr();
  if (needed[3]) args.col_out[B::kDb] = (db = frame.empty_params(b)).mutable_data_ptr();
  run(frame, args);
  if (needed[1]) dalpha = std::get<0>(loss_total("dyt backward", dalpha, dalpha, {}, 0, false, false)).to(alpha.scalar_type());
  return {dx, dalpha, dw, db};
}

}  // namespace fusegrad
