#include "add_norm.h"

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
namespace {

template <class F>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Frame& frame, RowArgs<F>& args, const Tensor& x, const Tensor& residual) {
  Tensor y = frame.empty_rows(), sum = frame.empty_rows(), mean, rstd = frame.empty_per_row();
  frame.in(args.in[F::kInput], x, "input");
  frame.in(args.in[F::kResidual], residual, "residual");
  frame.out(args.out[F::kY], y);
  frame.out(args.out[F::kSum], sum);
  frame.per_row(args.scalar_out[F::kRstd], rstd, "rstd");
  if constexpr (F::scalar_out == 2) frame.per_row(args.scalar_out[F::kMean], mean = frame.empty_per_row(), "mean");
  run(frame, args);
  return {y, sum, mean, rstd};
}

struct Saved {
  const Tensor& sum;
  const OptTensor &w, &b, &mean;
  const Tensor& rstd;
};

template <class B>
std::tuple<Tensor, Tensor, Tensor> backward(Frame frame, B op, const Tensor& dy, const OptTensor& dsum, const Saved& saved,
                                            const std::array<bool, 3>& needed) {
  RowArgs<B> args{op};
  Tensor dx, dw, db;
  frame.in(args.in[B::kX], saved.sum, "sum");
  frame.in(args.in[B::kDy], dy, "gradient");
  if constexpr (B::in == 3) frame.in(args.in[B::kDSum], *dsum, "gradient of the sum");
  args.param[B::kW] = frame.params(saved.w, "weight");
  frame.params(saved.b, "bias");  // for its type
  frame.per_row(args.scalar_in[B::kRstd], saved.rstd, "rstd");
  if constexpr (B::scalar_in == 2) frame.per_row(args.scalar_in[B::kMean], *saved.mean, "mean");
  if (needed[0]) frame.out(args.out[B::kDx], dx = frame.empty_rows());
  if (needed[1]) args.col_out[B::kDw] = (dw = frame.empty_params(saved.w)).mutable_data_ptr();
  if constexpr (B::col_out == 2)
    if (needed[2]) args.col_out[B::kDb] = (db = frame.empty_params(saved.b)).mutable_data_ptr();
  run(frame, args);
  return {dx, dw, db};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_fwd(const Tensor& x,         // [*, normalized dims]
                                                        const Tensor& residual,  // [*, normalized dims]
                                                        const OptTensor& w,      // [normalized dims]
                                                        const OptTensor& b,      // [normalized dims]
                                                        int64_t dims, double eps, double offset, bool cast_first,
                                                        bool rms) {  // else layer norm
  RECORD_FUNCTION("fusegrad::add_norm_fwd", {});
  Frame frame(rms ? "add_rms_norm" : "add_layer_norm", x, "input", x.dim() - dims, x.dim());
  const void *const weight = frame.params(w, "weight"), *const bias = frame.params(b, "bias");
  if (rms) {
    RowArgs<AddRMSNormFwd> args{};
    static_cast<RMSNormFwd&>(args.op) = {{}, eps, given(w) ? offset : 0, cast_first};
    args.param[AddRMSNormFwd::kW] = weight;
    return forward(frame, args, x, residual);
  }
  RowArgs<AddLayerNormFwd> args{};
  static_cast<LayerNormFwd&>(args.op) = {{}, eps, given(b)};
  args.param[AddLayerNormFwd::kW] = weight;
  args.param[AddLayerNormFwd::kB] = bias;
  return forward(frame, args, x, residual);
}

std::tuple<Tensor, Tensor, Tensor> add_norm_bwd(const Tensor& dy,       // [*, normalized dims]
                                                const OptTensor& dsum,  // [*, normalized dims]
                                                const Tensor& sum,      // [*, normalized dims]
                                                const OptTensor& w,     // [normalized dims]
                                                const OptTensor& b,     // [normalized dims]
                                                const OptTensor& mean,  // [*], of a layer norm
                                                const Tensor& rstd,     // [*]
                                                int64_t dims, double offset, std::array<bool, 3> needed) {
  RECORD_FUNCTION("fusegrad::add_norm_bwd", {});
  const Saved saved{sum, w, b, mean, rstd};
  const bool rms = !given(mean), alone = !given(dsum);
  const Frame frame(rms ? "add_rms_norm backward" : "add_layer_norm backward", sum, "sum", sum.dim() - dims, sum.dim());
  if (!rms && alone) return backward(frame, LayerNormBwd{}, dy, dsum, saved, needed);
  if (!rms) return backward(frame, AddLayerNormBwd{}, dy, dsum, saved, needed);
  const RMSNormBwd op{{}, given(w) ? offset : 0};
  return alone ? backward(frame, op, dy, dsum, saved, needed) : backward(frame, AddRMSNormBwd{{op}}, dy, dsum, saved, needed);
}

}  // namespace fusegrad
