#include "bias_act.h"

#include <ATen/ops/sum.h>

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
namespace {

ScaledAct scaled(int64_t number, double scale, double slope) {
  return {{Act(checked_number("bias_act: activation", number, kActs)), slope}, scale};
}

// Whether the dimension of the bias is walked as the columns; else those behind it are, and a row has one bias.
bool by_columns(const Tensor& x, int64_t dim) { return dim == x.dim() - 1 || x.stride(dim) == 1; }

Frame frame_of(const char* op, const Tensor& x, int64_t dim) {
  return by_columns(x, dim) ? Frame(op, x, "input", dim, dim + 1) : Frame(op, x, "input", dim + 1, x.dim());
}

template <class F>
void give_bias(Frame& frame, RowArgs<F>& args, const Tensor& b, int64_t dim) {
  const Tensor& x = frame.main();
  TORCH_CHECK(b.dim() == 1 && b.size(0) == x.size(dim), frame.op(), ": bias must have shape [", x.size(dim), "] (input is ",
              x.sizes(), ", its dimension ", dim, "), got ", b.sizes());
  if (by_columns(x, dim))
    args.param[F::kB] = frame.params(b, "bias");
  else
    frame.per_row(args.scalar_in[F::kRowB], b.expand(x.sizes().slice(0, dim + 1)), "bias");
}

}  // namespace

Tensor bias_act_fwd(const Tensor& x,     // [*, C, *]
                    const OptTensor& b,  // [C]
                    int64_t act, double scale, double slope, int64_t dim) {
  RECORD_FUNCTION("fusegrad::bias_act_fwd", {});
  const ScaledAct f = scaled(act, scale, slope);
  if (!given(b)) {
    Frame frame = Frame::flat("bias_act", x, "input");
    MapArgs<ActFwd> args{{{}, f}};
    Tensor y = empty_as(x);
    frame.out(args.out[ActFwd::kY], y);
    frame.in(args.in[ActFwd::kX], x, "input");
    run(frame, args);
    return y;
  }
  Frame frame = frame_of("bias_act", x, dim);
  RowArgs<BiasActFwd> args{{{{}, f}}};
  Tensor y = frame.empty_rows();
  frame.in(args.in[BiasActFwd::kX], x, "input");
  give_bias(frame, args, *b, dim);
  frame.out(args.out[BiasActFwd::kY], y);
  run(frame, args);
  return y;
}

std::tuple<Tensor, Tensor> bias_act_bwd(const Tensor& dy,    // [*, C, *]
                                        const Tensor& x,     // [*, C, *]
                                        const OptTensor& b,  // [C]
                                        int64_t act, double scale, double slope, int64_t dim, std::array<bool, 2> needed) {
  RECORD_FUNCTION("fusegrad::bias_act_bwd", {});
  const ScaledAct f = scaled(act, scale, slope);
  Tensor dx, db;
  if (!given(b)) {
    if (!needed[0]) return {dx, db};
    Frame frame = Frame::flat("bias_act backward", x, "input");
    MapArgs<ActBwd> args{{{}, f}};
    frame.out(args.out[ActBwd::kDx], dx = empty_as(x));
    frame.in(args.in[ActBwd::kX], x, "input");
    frame.in(args.in[ActBwd::kDy], dy, "gradient");
    run(frame, args);
    return {dx, db};
  }
  Frame frame = frame_of("bias_act backward", x, dim);
  const auto fill = [&](auto& args) {
    using B = std::remove_reference_t<decltype(args.op)>;
    frame.in(args.in[B::kX], x, "input");
    frame.in(args.in[B::kDy], dy, "gradient");
    give_bias(frame, args, *b, dim);
    if (needed[0]) frame.out(args.out[B::kDx], dx = frame.empty_rows());
  };
  if (by_columns(x, dim) || !needed[1]) {
    RowArgs<BiasActBwd> args{{{{}, f}}};
    fill(args);
    if (needed[1]) args.col_out[BiasActBwd::kDb] = (db = frame.empty_params(b)).mutable_data_ptr();
    run(frame, args);
  } else {
    RowArgs<RowBiasActBwd> args{{{{}, f}}};
    fill(args);
    Tensor rows = frame.empty_per_row();
    frame.per_row(args.scalar_out[RowBiasActBwd::kDb], rows, "gradient of bias");
    run(frame, args);
    db = (dim > 0 ? at::sum(rows.flatten(0, dim - 1), 0) : rows).to(b->scalar_type());
  }
  return {dx, db};
}

}  // namespace fusegrad
