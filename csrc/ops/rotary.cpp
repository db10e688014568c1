#include "rotary.h"

#include <ATen/ops/empty.h>

#include <vector>

#include "../host/pool.h"
#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
namespace {

// One call: tensors [batch..., heads, seq, cols] become views whose rows are [batch..., seq, heads].
struct Call {
  const char* op;
  RotaryArgs args{};
  Tensor main;
  at::DimVector sizes[2];
  std::vector<Tensor> kept;

  Call(const char* op, const Tensor& main, const Tensor& cos, const Tensor& sin, bool interleaved) : op(op), main(main) {
    const Frame frame = checked(main, "q"), table = checked(cos, "cos");
    checked(sin, "sin");
    args.rows = frame.type(), args.table = table.type();
    TORCH_CHECK_TYPE(cos.scalar_type() == sin.scalar_type() &&
                         (args.table == args.rows || (args.table == DType::f32 && args.rows >= DType::f16)),
                     op, ": cos and sin must be ", main.scalar_type(), args.rows >= DType::f16 ? " or Float" : "", ", got ",
                     cos.scalar_type(), " and ", sin.scalar_type());
    const bool batched = cos.dim() == 3 && main.dim() > 3 && (cos.size(0) == 1 || cos.size(0) == main.size(0));
    TORCH_CHECK((cos.dim() == 2 || batched || (cos.dim() == 3 && cos.size(0) == 1)) && cos.size(-2) == main.size(-2) &&
                    cos.size(-1) % 2 == 0 && cos.size(-1) <= main.size(-1) && sin.sizes() == cos.sizes(),
                op, ": cos and sin must be [seq, rot] or [batch, seq, rot] of q ", main.sizes(), ", got ", cos.sizes(), " and ",
                sin.sizes());
    args.cols = main.size(-1), args.rot = cos.size(-1), args.interleaved = interleaved;
    args.positions = main.size(-2);
    for (int64_t d = 0; d < main.dim() - 3; ++d) args.positions *= main.size(d);
  }

  Frame checked(const Tensor& t, const char* name) const {
    TORCH_CHECK(t.device() == main.device(), op, ": ", name, " must be on ", main.device(), ", where q is, got a tensor on ",
                t.device());
    TORCH_CHECK(t.dim() >= 2 && t.dim() <= kMaxDims + 1, op, ": ", name, " must have 2 to ", kMaxDims + 1, " dimensions, got ",
                t.dim());
    return Frame(op, t, name, t.dim() - 1, t.dim());
  }

  // `like` has the shape of the side; null if the side has nothing to do.
  void add(int i, const Tensor& like, const Tensor& cos, const Tensor& sin) {
    RotaryArgs::Side& side = args.side[i];
    bool alike = like.dim() == main.dim();
    for (int64_t d = 0; alike && d < like.dim(); ++d) alike = d == like.dim() - 3 || like.size(d) == main.size(d);
    TORCH_CHECK(alike, op, ": k must have the shape of q ", main.sizes(), ", but for the heads, got ", like.sizes());
    sizes[i] = like.sizes();
    side.heads = like.dim() > 2 ? like.size(-3) : 1;
    side.extent.dims = 0, side.extent.rows = args.positions * side.heads, side.extent.cols = args.cols;
    for (int64_t d = 0; d < like.dim() - 3; ++d) side.extent.size[side.extent.dims++] = like.size(d);
    side.extent.size[side.extent.dims++] = like.size(-2);
    side.extent.size[side.extent.dims++] = side.heads;
    for (const auto& [view, t, name] : {std::tuple(&side.cos, &cos, "cos"), std::tuple(&side.sin, &sin, "sin")}) {
      *view = {};
      view->data = const_cast<void*>(t->const_data_ptr());
      view->stride[side.extent.dims - 2] = t->stride(-2);
      if (t->dim() == 3 && t->size(0) > 1) view->stride[0] = t->stride(0);
      view->col = t->stride(-1);
    }
  }

  void place(int i, View& view, const Tensor& t, const char* name) {
    checked(t, name);
    TORCH_CHECK(t.sizes() == at::IntArrayRef(sizes[i]), op, ": ", name, " must have shape ", at::IntArrayRef(sizes[i]), ", got ",
                t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == main.scalar_type(), op, ": ", name, " must be ", main.scalar_type(), ", got ",
                     t.scalar_type());
    strides(view, t, t.dim() - 1);
    if (t.size(-1) > 1) view.col = t.stride(-1);
  }
  void rstd(int i, View& view, const Tensor& t) {
    TORCH_CHECK(t.sizes() == at::IntArrayRef(sizes[i]).slice(0, sizes[i].size() - 1) && t.scalar_type() == wide() &&
                    t.device() == main.device(),
                op, ": rstd must be ", wide(), " with the rows' shape, got ", t.scalar_type(), " ", t.sizes());
    strides(view, t, t.dim());
  }

  // Null for no weight.
  const void* weight(const OptTensor& w) {
    if (!given(w)) return nullptr;
    TORCH_CHECK(w->dim() == 1 && w->size(0) == main.size(-1) && w->device() == main.device(), op, ": a weight must have shape [",
                main.size(-1), "] and be on ", main.device(), ", got ", w->sizes(), " on ", w->device());
    kept.push_back(w->to(wide()).contiguous());
    return kept.back().const_data_ptr();
  }
  at::ScalarType wide() const { return main.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

  void run() {
    const Frame frame = checked(main, "q");
    const c10::OptionalDeviceGuard guard(main.device());
    const auto& kernel = kernel_for<RotaryArgs>(op, main.device());
    if (args.side[0].extent.rows + args.side[1].extent.rows == 0) {
      if (!args.sums_columns()) return;
      args.positions = 0;  // of no heads there is nothing to look at, and the sums are 0
    }
    Tensor workspace;
    if (args.sums_columns()) {
      args.slices = kernel.slices(args);
      workspace = at::empty({2 * args.slices * args.cols}, main.options().dtype(wide()));
      args.partial = workspace.mutable_data_ptr();
    }
    launch(frame, kernel, args);
  }

 private:
  // n: the dimensions without the columns, of which the last two, heads and seq, change places.
  static void strides(View& view, const Tensor& t, int64_t n) {
    view.data = const_cast<void*>(t.const_data_ptr());
    int64_t k = 0;
    for (int64_t d = 0; d < n - 2; ++d) view.stride[k++] = t.stride(d);
    view.stride[k++] = t.stride(n - 1);
    view.stride[k] = n > 1 ? t.stride(n - 2) : 0;
  }
};

// In the order of `like`'s memory, but with the columns of a row next to each other.
Tensor empty_side(const Tensor& like) {
  return step_as(like, like.dim() - 1) == 1 ? empty_as(like) : pool::empty(like.sizes(), like);
}

const char* name_of(bool normed, bool backward) {
  return normed ? backward ? "qk_norm_rope backward" : "qk_norm_rope" : backward ? "rotary_embedding backward" : "rotary_embedding";
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> rotary_fwd(const Tensor& q,            // [batch..., heads, seq, n]
                                                      const Tensor& k,            // [batch..., kv heads, seq, n]
                                                      const OptTensor& q_weight,  // [n]
                                                      const OptTensor& k_weight,  // [n]
                                                      const Tensor& cos,          // [seq, rot] or [batch, seq, rot]
                                                      const Tensor& sin,          // as cos
                                                      bool normed, double eps, bool interleaved) {
  RECORD_FUNCTION("fusegrad::rotary_fwd", {});
  Call call(name_of(normed, false), q, cos, sin, interleaved);
  call.args.normed = normed, call.args.eps = eps;
  const Tensor* const x[2] = {&q, &k};
  const OptTensor* const w[2] = {&q_weight, &k_weight};
  Tensor y[2], rstd[2];
  for (int i = 0; i < 2; ++i) {
    RotaryArgs::Side& side = call.args.side[i];
    call.add(i, *x[i], cos, sin);
    call.place(i, side.in, *x[i], i ? "k" : "q");
    call.place(i, side.out, y[i] = empty_side(*x[i]), "result");
    side.w = call.weight(*w[i]);
    if (normed)
      call.rstd(i, side.rstd, rstd[i] = at::empty(x[i]->sizes().slice(0, x[i]->dim() - 1), q.options().dtype(call.wide())));
  }
  call.run();
  return {y[0], y[1], rstd[0], rstd[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rotary_bwd(const OptTensor& dq_out,    // [batch..., heads, seq, n]
                                                      const OptTensor& dk_out,    // [batch..., kv heads, seq, n]
                                                      const OptTensor& q,         // of the norm, as the following
                                                      const OptTensor& k,         //
                                                      const OptTensor& q_weight,  // [n]
                                                      const OptTensor& k_weight,  // [n]
                                                      const OptTensor& q_rstd,    // [batch..., heads, seq]
                                                      const OptTensor& k_rstd,    // [batch..., kv heads, seq]
                                                      const Tensor& cos,          // [seq, rot] or [batch, seq, rot]
                                                      const Tensor& sin,          // as cos
                                                      bool interleaved, std::array<bool, 4> needed) {
  RECORD_FUNCTION("fusegrad::rotary_bwd", {});
  const bool normed = given(q_rstd) || given(k_rstd);
  Call call(name_of(normed, true), given(dq_out) ? *dq_out : *dk_out, cos, sin, interleaved);
  call.args.normed = normed, call.args.backward = true;
  const OptTensor* const dy[2] = {&dq_out, &dk_out};
  const OptTensor* const x[2] = {&q, &k};
  const OptTensor* const w[2] = {&q_weight, &k_weight};
  const OptTensor* const rstd[2] = {&q_rstd, &k_rstd};
  Tensor dx[2], dw[2];
  const bool sums = needed[2] || needed[3];  // have the same bits whatever else is asked for: both sides are walked
  for (int i = 0; i < 2; ++i) {
    if (!given(*dy[i]) || !(needed[i] || sums)) continue;
    RotaryArgs::Side& side = call.args.side[i];
    call.add(i, **dy[i], cos, sin);
    call.place(i, side.in, **dy[i], "gradient");
    if (needed[i]) call.place(i, side.out, dx[i] = empty_side(normed ? **x[i] : **dy[i]), "result");
    if (!normed) continue;
    call.place(i, side.x, **x[i], i ? "k" : "q");
    call.rstd(i, side.rstd, **rstd[i]);
    side.w = call.weight(*w[i]);
    if (needed[2 + i]) side.dw = (dw[i] = at::empty({call.args.cols}, call.main.options().dtype(call.wide()))).mutable_data_ptr();
  }
  call.run();
  for (int i = 0; i < 2; ++i)
    if (dw[i].defined()) dw[i] = dw[i].to((*w[i])->scalar_type());
  return {dx[0], dx[1], dw[0], dw[1]};
}

}  // namespace fusegrad
