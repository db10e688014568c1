#include "add_norm.h"

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
namespace {

template <class F>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Frame& frame, RowArgs<F>& args, const Tensor& x, const Tensor& residual,
                                                   const OptTensor& seed, double p) {
  Tensor y = frame.empty_rows(), sum = frame.empty_rows(), mean, rstd = frame.empty_per_row();
  if ((args.op.drops = given(seed))) args.op.dropout = dropout_of(frame, *seed, p);
  frame.in(args.in[F::kInput], x, "input");
  frame.in(args.in[F::kResidual], residual, "residual");
  frame.out(args.out[F::kY], y);
  frame.out(args.out[F::kSum], sum);
  frame.per_row(args.scalar_out[F::kRstd], rstd, "rstd");
  if constexpr (F::scalar_out == 2) frame.per_row(args.scalar_out[F::kMean], mean = frame.empty_per_row(), "mean");
  run(frame, args);
  return {y, sum, mean, rstd};
}

struct Given {
  const Tensor& dy;
  const OptTensor& dsum;
  const Tensor& sum;
  const OptTensor &w, &b, &seed, &mean;
  const Tensor& rstd;
  double p;
  const std::array<bool, 4>& needed;
};

template <class B>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Frame frame, RowArgs<B> args, const Given& g) {
  Tensor dx, dresidual, dw, db;
  frame.in(args.in[B::kX], g.sum, "sum");
  frame.in(args.in[B::kDy], g.dy, "gradient");
  args.param[B::kW] = frame.params(g.w, "weight");
  frame.params(g.b, "bias");  // for its type
  frame.per_row(args.scalar_in[B::kRstd], g.rstd, "rstd");
  if constexpr (B::scalar_in == 2) frame.per_row(args.scalar_in[B::kMean], *g.mean, "mean");
  const bool drops = given(g.seed);
  if (g.needed[1] || (g.needed[0] && !drops)) frame.out(args.out[B::kDx], dresidual = frame.empty_rows());
  if constexpr (B::in == 3) {
    args.op.with_dsum = given(g.dsum);
    frame.in(args.in[B::kDSum], given(g.dsum) ? *g.dsum : g.dy, "gradient of the sum");
    if ((args.op.drops = drops)) args.op.dropout = dropout_of(frame, *g.seed, g.p);
    if (g.needed[0] && drops) frame.out(args.out[B::kDInput], dx = frame.empty_rows());
  }
  if (g.needed[2]) args.col_out[B::kDw] = (dw = frame.empty_params(g.w)).mutable_data_ptr();
  if constexpr (B::col_out == 2)
    if (g.needed[3]) args.col_out[B::kDb] = (db = frame.empty_params(g.b)).mutable_data_ptr();
  run(frame, args);
  return {dx, dresidual, dw, db};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_fwd(const Tensor& x,         // [*, normalized dims]
                                                        const Tensor& residual,  // [*, normalized dims]
                                                        const OptTensor& w,      // [normalized dims]
                                                        const OptTensor& b,      // [normalized dims]
                                                        const OptTensor& seed,   // [], of a dropout
                                                        int64_t dims, double eps, double offset, bool cast_first, double p,
                                                        bool rms) {  // else layer norm
  RECORD_FUNCTION("fusegrad::add_norm_fwd", {});
  Frame frame(rms ? "add_rms_norm" : "add_layer_norm", x, "input", x.dim() - dims, x.dim());
  const void *const weight = frame.params(w, "weight"), *const bias = frame.params(b, "bias");
  if (rms) {
    RowArgs<AddRMSNormFwd> args{};
    static_cast<RMSNormFwd&>(args.op) = {{}, eps, given(w) ? offset : 0, cast_first};
    args.param[AddRMSNormFwd::kW] = weight;
    return forward(frame, args, x, residual, seed, p);
  }
  RowArgs<AddLayerNormFwd> args{};
  static_cast<LayerNormFwd&>(args.op) = {{}, eps, given(b)};
  args.param[AddLayerNormFwd::kW] = weight;
  args.param[AddLayerNormFwd::kB] = bias;
  return forward(frame, args, x, residual, seed, p);
}

// The gradient of input is that of residual, and not given, where nothing is dropped.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_bwd(const Tensor& dy,       // [*, normalized dims]
                                                        const OptTensor& dsum,  // [*, normalized dims]
                                                        const Tensor& sum,      // [*, normalized dims]
                                                        const OptTensor& w,     // [normalized dims]
                                                        const OptTensor& b,     // [normalized dims]
                                                        const OptTensor& seed,  // []
                                                        const OptTensor& mean,  // [*], of a layer norm
                                                        const Tensor& rstd,     // [*]
                                                        int64_t dims, double offset, double p, std::array<bool, 4> needed) {
  RECORD_FUNCTION("fusegrad::add_norm_bwd", {});
  const Given g{dy, dsum, sum, w, b, seed, mean, rstd, p, needed};
  const bool rms = !given(mean), as_plain = !given(dsum) && !given(seed);
  const Frame frame(rms ? "add_rms_norm backward" : "add_layer_norm backward", sum, "sum", sum.dim() - dims, sum.dim());
  if (!rms) return as_plain ? backward(frame, RowArgs<LayerNormBwd>{}, g) : backward(frame, RowArgs<AddLayerNormBwd>{}, g);
  const RMSNormBwd op{{}, given(w) ? offset : 0};
  return as_plain ? backward(frame, RowArgs<RMSNormBwd>{op}, g) : backward(frame, RowArgs<AddRMSNormBwd>{{op}}, g);
}

}  // namespace fusegrad
