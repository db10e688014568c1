// Cross entropy of the logits z = x w^T + b, which exist for one chunk of tokens at a time:
//
//   for each chunk c:   z = x_c w^T + b;   loss, top, log_sum of each token (cross_entropy.h);   z <- dz
//                       dx_c = dz w;   dw += dz^T x_c;   db += sum(dz)
//
// Where the loss is one number, its gradient is known up to a factor, and the forward may make it while the logits are there, that
// of the sum: three products of matrices, as many as with the logits kept. (What a mean divides by comes with the factor: a dz of
// float16 that was divided by thousands of tokens before would be 0.) Else the backward makes the logits again, which is a fourth
// one, and nothing of the size of w waits for it. Where a 16-bit dw would be summed in float32 beside it, it goes along the classes
// instead, if they are more than twice the tokens (it is dx that waits in float32 then, beside a copy of x):
//
//   for each block of classes c:   z_c = x w_c^T + b_c;   z_c <- dz_c;   dw_c = dz_c^T x;   db_c = sum(dz_c);   dx += dz_c w_c
//
// Products are summed and stored in float32 (float64 for float64), so that the error of dw does not grow with the number of
// chunks, and results are rounded once. 16-bit factors stay as they are where a product of them can be float32: on CUDA, and for
// bfloat16 on a CPU with matrix instructions (AMX) and torch's MKL. There dz is multiplied as the sum of three numbers of bfloat16,
// which has all its bits; on CUDA it is rounded to the type of the factors. Other CPUs multiply float32 copies, as torch's products
// of 16-bit matrices round the logits; and so is what lies beside a float32 weight.
//
// Memory beyond x, w and the gradients, with A = 4 bytes (8 for float64), T tokens, H features, C classes, n tokens per chunk:
// A n C for the logits, half as much for a dz of 16 bits + 2 A n H for a chunk's dx and a copy of its x + 32 MB at most for a part
// of w of another type or layout (as much as the logits, but 1 MB at least) + A per token and value; and the forward's gradients, A
// (T H + C H + C), until the backward has turned them into results. Of a backward that makes the logits again: A C H for a dw of 16
// bits; or along the classes 2 A T H for dx and the copy of x instead of the chunk's, and as much as for a part of w for that of
// dw.
#include "cross_entropy.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../host/pool.h"
#include "../host/run.h"
#include "ops.h"

// Of the MKL within torch, where there is one (oneAPI MKL reference, cblas_gemm_bf16bf16f32): torch has no call for such a product.
extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(int layout, int trans_a, int trans_b, int m, int n, int k, float alpha,
                                                             const void* a, int lda, const void* b, int ldb, float beta, float* c,
                                                             int ldc);

namespace fusegrad {
namespace {

constexpr const char* kOp = "linear_cross_entropy";
constexpr int64_t kLogits = 64 << 20;  // bytes of logits at a time, unless the caller says how many tokens
constexpr int64_t kPart = 32 << 20;    // bytes of weight that are copied at a time: as many as of logits, within these limits
constexpr int64_t kLeastPart = 1 << 20;
constexpr int64_t kAligned = 64;  // classes in a block are a multiple of it, for products of matrices and for vectors

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / std::max<int64_t>(1, b); }

// wish > 0: so many; wish < 0: what torch calls "aspect_ratio:-wish", logits as large as x / -wish, roughly; 0: ours.
int64_t tokens_per_chunk(int64_t tokens, int64_t classes, int64_t features, int64_t wish, int64_t item) {
  int64_t n = wish;
  if (wish < 0) {
    n = 1;
    while (n < up(tokens, up(classes, features))) n *= 2;
    n /= -wish;
  } else if (wish == 0) {
    n = std::max<int64_t>(1, kLogits / std::max<int64_t>(1, classes * item));
    n = up(tokens, up(tokens, n));  // of one size
  }
  return std::clamp<int64_t>(n, 1, std::max<int64_t>(1, tokens));
}

// Whether the CPU multiplies them as bfloat16 into float32: three to four times as fast as their float32 copies (512 x 512 x
// 32000). Without AMX MKL does it by other instructions, which may be slower.
bool multiplies_bfloat16(const Tensor& x, const Tensor& w) {
#if defined(__x86_64__)
  static const bool can = [] {
    unsigned a, b, c, d = 0;
    return cblas_gemm_bf16bf16f32 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  }();
  const auto fits = [](const Tensor& t) {
    return t.scalar_type() == at::kBFloat16 && t.numel() && std::max(t.size(0), t.size(1)) <= std::numeric_limits<int>::max();
  };
  return can && fits(x) && fits(w);
#else
  return false;
#endif
}

void multiply_bfloat16(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  constexpr int kRowMajor = 101, kAsIs = 111, kTransposed = 112;
  const auto by_rows = [](const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1; };
  const auto trans = [&](const Tensor& t) { return by_rows(t) ? kAsIs : kTransposed; };
  const auto stride = [&](const Tensor& t) {
    return int(by_rows(t) ? std::max(t.stride(0), t.size(1)) : std::max(t.stride(1), t.size(0)));
  };
  cblas_gemm_bf16bf16f32(kRowMajor, trans(a), trans(b), int(out.size(0)), int(out.size(1)), int(a.size(1)), 1, a.const_data_ptr(),
                         stride(a), b.const_data_ptr(), stride(b), add ? 1 : 0, out.data_ptr<float>(), stride(out));
}

// Takes `rounded` from the values that it is of, and makes it what is left of them, rounded.
void to_rest(const Tensor& rounded, const Tensor& values) {
  auto* const y = reinterpret_cast<uint16_t*>(rounded.data_ptr<at::BFloat16>());  // as bits, which every compiler takes in vectors
  float* const x = values.data_ptr<float>();
  at::parallel_for(0, values.numel(), 32768, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const float rest = x[i] - c10::detail::f32_from_bits(y[i]);
      x[i] = std::isfinite(rest) ? rest : 0;
      y[i] = c10::detail::round_to_nearest_even(x[i]);
    }
  });
}

// out = a b, or out + a b, summed in out's type.
void multiply(Tensor out, const Tensor& a, const Tensor& b, bool add) {
  const auto wide = out.scalar_type();
  if (a.scalar_type() != wide && a.is_cpu())
    multiply_bfloat16(out, a, b, add);
  else if (a.scalar_type() == wide)
    add ? at::addmm_out(out, out, a, b) : at::mm_out(out, a, b);
  else
    add ? at::addmm_out(out, out, a, b, wide) : at::mm_out(out, a, b, wide);
}

// The logits of a chunk of tokens, and what their gradient means for x, w and b. By classes: of a block of them, and all tokens.
class Head {
 public:
  Head(const Tensor& x, const Tensor& w, const Tensor& target, const OptTensor& b, int64_t ignore_index, int64_t wish,
       bool by_classes = false)
      : x_(x), w_(w), target_(target), ignore_index_(ignore_index) {
    Frame frame(kOp, x, "input", 1, 2);  // checks, and knows the types
    View labels;
    frame.labels(labels, target, "target");
    check(w, "linear_weight");
    if (given(b)) check(*b, "linear_bias");
    TORCH_CHECK(w.dim() == 2 && w.size(1) == x.size(1), kOp, ": linear_weight must have shape [C, ", x.size(1), "] (input is ",
                x.sizes(), "), got ", w.sizes());
    wide_ = frame.wide();
    factor_ = (x.is_cpu() ? multiplies_bfloat16(x, w) : w.scalar_type() == x.scalar_type()) ? x.scalar_type() : wide_;
    const int64_t item = x.element_size() == 8 ? 8 : 4, row = std::max<int64_t>(1, x.size(1) * item);
    chunk_ = tokens_per_chunk(tokens(), classes(), x.size(1), wish, item), block_ = std::max<int64_t>(1, classes());
    // Few logits at a time mean that memory is short.
    const int64_t part = std::clamp<int64_t>(std::clamp(chunk_ * block_ * item, kLeastPart, kPart) / row, 1, block_);
    if (by_classes) {
      block_ = std::clamp<int64_t>(chunk_ * block_ / tokens(), 1, part), chunk_ = tokens();
      if (block_ > kAligned) block_ -= block_ % kAligned;
    }
    const Tensor like = at::empty({0}, x.options().dtype(wide_));
    logits_ = pool::empty({chunk_ * block_}, like);
    if (given(b)) b_ = b->to(wide_);
    if (w.scalar_type() != factor_ || !w.is_contiguous()) part_ = at::empty({part, x.size(1)}, x.options().dtype(factor_));
  }

  int64_t tokens() const { return x_.size(0); }
  int64_t classes() const { return w_.size(0); }
  int64_t chunk() const { return chunk_; }
  int64_t block() const { return block_; }
  at::TensorOptions wide() const { return x_.options().dtype(wide_); }
  Tensor gradient(const Tensor& like) const { return pool::empty(like.sizes(), logits_.narrow(0, 0, 0)); }

  // The logits of the tokens from `first` on and the classes from `c` on, to be overwritten by their gradient.
  Tensor logits(int64_t first, int64_t c = 0) {
    if (first != first_ || !x_chunk_.defined()) take(first);
    c_ = c, m_ = std::min(block_, classes() - c);
    Tensor z = here();
    if (b_.defined()) z.copy_(b_.narrow(0, c_, m_).expand_as(z));
    for_parts([&](int64_t c, const Tensor& w) { multiply(z.narrow(1, c, w.size(0)), x_chunk_, w.t(), b_.defined()); });
    return z;
  }

  // From the gradient that those logits were overwritten by. What is narrower than its sums is rounded, so that it has to be all of
  // it: all classes are here for such a dx, all tokens for such a dw.
  void backward(const Tensor& dx, const Tensor& dw, const Tensor& db) {
    Tensor wide_dz = here(), dz = wide_dz.to(factor_);
    const auto part = [](const Tensor& t, int64_t from, int64_t n) { return t.defined() ? t.narrow(0, from, n) : t; };
    const auto sums = [&](const Tensor& to, Tensor& beside) {
      if (!to.defined() || to.scalar_type() == wide_) return to;
      if (!beside.defined()) beside = gradient(to);
      return beside.narrow(0, 0, to.size(0));
    };
    const Tensor dx_n = part(dx, first_, n_), dw_m = part(dw, c_, m_), dx_sum = sums(dx_n, dx_sum_), dw_sum = sums(dw_m, dw_sum_);
    const auto multiply_by = [&](bool rest) {
      if (dx.defined())
        for_parts([&](int64_t c, const Tensor& w) { multiply(dx_sum, dz.narrow(1, c, w.size(0)), w, rest || c_ + c > 0); });
      if (dw.defined()) multiply(dw_sum, dz.t(), x_chunk_, rest || first_ > 0);
    };
    if (db.defined()) part(db, c_, m_).add_(at::sum(wide_dz, 0));
    if (dx.defined() && classes() == 0) dx_sum.zero_();
    multiply_by(false);
    for (int rest = 1; rest < 3 && x_.is_cpu() && factor_ != wide_; ++rest) {
      to_rest(dz, wide_dz);
      multiply_by(true);
    }
    if (!dx_sum.is_same(dx_n)) dx_n.copy_(dx_sum);
    if (!dw_sum.is_same(dw_m)) dw_m.copy_(dw_sum);
  }

 private:
  const Tensor &x_, &w_, &target_;
  const int64_t ignore_index_;
  at::ScalarType wide_, factor_;
  int64_t chunk_, block_, first_ = 0, n_ = 0, c_ = 0, m_ = 0;  // tokens and classes at a time; what is here now
  Tensor logits_, x_chunk_, x_copy_, dx_sum_, dw_sum_, part_, b_;

  Tensor here() const { return logits_.narrow(0, 0, n_ * m_).view({n_, m_}); }

  void take(int64_t first) {
    first_ = first, n_ = std::min(chunk_, tokens() - first);
    x_chunk_ = x_.narrow(0, first, n_);
    // What an ignored token holds must not reach dw, not even times 0. On CUDA to look for one would be to wait.
    const Tensor ignored = target_.narrow(0, first, n_).eq(ignore_index_);
    const bool ignores = !x_.is_cpu() || ignored.any().item<bool>();
    if (ignores || x_.scalar_type() != factor_ || !x_chunk_.is_contiguous()) {
      if (!x_copy_.defined()) x_copy_ = pool::empty({chunk_, x_.size(1)}, at::empty({0}, x_.options().dtype(factor_)));
      x_chunk_ = x_copy_.narrow(0, 0, n_).copy_(x_chunk_);
      if (ignores) x_chunk_.masked_fill_(ignored.unsqueeze(1), 0);
    }
  }

  void check(const Tensor& t, const char* name) const {
    TORCH_CHECK(t.layout() == at::kStrided && t.device() == x_.device(), kOp, ": ", name, " must be a dense tensor on ",
                x_.device(), ", where the first argument is, got a tensor of layout ", t.layout(), " on ", t.device());
    TORCH_CHECK_TYPE(t.scalar_type() == x_.scalar_type() || (t.scalar_type() == at::kFloat && x_.element_size() == 2), kOp, ": ",
                     name, " must be ", x_.scalar_type(), x_.element_size() == 2 ? " or Float" : "", ", got ", t.scalar_type());
  }

  // f(number of the first class here, weight of the classes from there on) for the parts of w that can be multiplied as they are.
  template <class F>
  void for_parts(const F& f) {
    if (!part_.defined()) return f(0, w_.narrow(0, c_, m_));
    for (int64_t c = 0; c < m_; c += part_.size(0)) {
      const Tensor part = part_.narrow(0, 0, std::min(part_.size(0), m_ - c));
      f(c, part.copy_(w_.narrow(0, c_ + c, part.size(0))));
    }
  }
};

// grad times the factor, or that of each row, as it was asked for: rounded once, in pieces where it must be.
Tensor scaled(const Tensor& grad, const Tensor& factor, at::ScalarType type) {
  Tensor result = pool::empty(grad.sizes(), at::empty({0}, grad.options().dtype(type)));
  if (grad.scalar_type() == type) return at::mul_out(result, grad, factor);
  const int64_t piece = std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, grad.stride(0)));  // rows
  for (int64_t i = 0; i < grad.size(0); i += piece) {
    const int64_t n = std::min(piece, grad.size(0) - i);
    result.narrow(0, i, n).copy_(at::mul(grad.narrow(0, i, n), factor.dim() ? factor.narrow(0, i, n) : factor));
  }
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd(
    const Tensor& x,                // [N, H]
    const Tensor& w,                // [C, H]
    const Tensor& target,           // [N]
    const OptTensor& b,             // [C]
    const OptTensor& class_weight,  // [C]
    const OptTensor& num_items,     // []
    int64_t ignore_index, double smoothing, double z_loss, double softcap, double scale, bool reduce, bool mean, double items,
    bool empty_is_zero, bool wide, bool return_lse,
    int64_t chunk,                 // tokens at a time; see tokens_per_chunk
    std::array<bool, 3> needed) {  // with `reduce`: the gradients of x, w and b to make now
  RECORD_FUNCTION("fusegrad::linear_cross_entropy_fwd", {});
  const c10::OptionalDeviceGuard device(x.device());
  const Quiet quiet;
  Head head(x, w, target, b, ignore_index, chunk);
  check_labels(kOp, target, head.classes(), ignore_index);
  const CrossEntropyOptions options{ignore_index, smoothing, z_loss, softcap, scale};
  const OptTensor cw = given(class_weight) ? OptTensor(class_weight->to(head.wide())) : OptTensor();
  const auto per_token = [&](bool wanted) { return wanted ? at::empty({head.tokens()}, head.wide()) : Tensor(); };
  const bool grads = reduce && (needed[0] || needed[1] || needed[2]);
  LossRows rows{per_token(true), per_token(true), per_token(true), per_token(reduce), per_token(return_lse)};
  Tensor dx, dw, db;
  LossGrads of_sum;
  if (grads) {
    of_sum.loss = at::ones({}, head.wide());
    if (needed[0]) dx = head.gradient(x);
    if (needed[1]) dw = head.tokens() ? head.gradient(w) : head.gradient(w).zero_();
    if (needed[2]) db = at::zeros({head.classes()}, head.wide());
  }
  for (int64_t first = 0; first < head.tokens(); first += head.chunk()) {
    const Tensor z = head.logits(first), t = target.narrow(0, first, z.size(0));
    const auto part = [&](const Tensor& v) { return v.defined() ? v.narrow(0, first, z.size(0)) : v; };
    const LossRows here{part(rows.loss), part(rows.top), part(rows.log_sum), part(rows.weight), part(rows.lse)};
    loss_rows(kOp, z, t, cw, options, here);
    if (!grads) continue;
    loss_rows_backward(kOp, z, t, cw, options, here, of_sum, z);
    head.backward(dx, dw, db);
  }
  Tensor divisor;
  if (reduce) std::tie(rows.loss, divisor) = loss_total(kOp, rows.loss, rows.weight, num_items, items, mean, empty_is_zero);
  const auto out_type = wide ? head.wide().dtype().toScalarType() : x.scalar_type();
  if (grads) rows.top = rows.log_sum = Tensor();  // have done their work
  return {rows.loss.to(out_type), return_lse ? rows.lse.to(out_type) : rows.lse, rows.top, rows.log_sum, divisor, dx, dw, db};
}

LinearGrads linear_cross_entropy_bwd(const OptTensor& dloss,         // [] or [N]
                                     const OptTensor& dlse,          // [N]
                                     const Tensor& x,                // [N, H]
                                     const Tensor& w,                // [C, H]
                                     const Tensor& target,           // [N]
                                     const OptTensor& b,             // [C]
                                     const OptTensor& class_weight,  // [C]
                                     const OptTensor& top,           // [N]
                                     const OptTensor& log_sum,       // [N]
                                     const OptTensor& divisor,       // []
                                     const OptTensor& dx,            // [N, H] of the sum, if the forward made them
                                     const OptTensor& dw,            // [C, H]
                                     const OptTensor& db,            // [C]
                                     int64_t ignore_index, double smoothing, double z_loss, double softcap, double scale,
                                     int64_t chunk, std::array<bool, 3> needed) {
  RECORD_FUNCTION("fusegrad::linear_cross_entropy_bwd", {});
  const c10::OptionalDeviceGuard device(x.device());
  const Quiet quiet;
  const auto b_type = given(b) ? b->scalar_type() : x.scalar_type();
  if (!given(top)) {
    const auto sums = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    // An ignored token has no gradient, whatever that of the loss is: it is infinite for the mean of no token over many processes.
    const Tensor kept = target.ne(ignore_index), g = given(divisor) ? dloss->to(sums).div(divisor->to(sums)) : dloss->to(sums);
    const Tensor of_tokens = at::where(kept, g, 0).unsqueeze(1), of_sums = at::where(kept.any(), g, 0);
    const auto result = [&](bool wanted, const OptTensor& grad, const Tensor& factor, at::ScalarType type) {
      return wanted ? scaled(*grad, factor, type) : Tensor();
    };
    return {result(needed[0], dx, of_tokens, x.scalar_type()), result(needed[1], dw, of_sums, w.scalar_type()),
            result(needed[2], db, of_sums, b_type)};
  }
  // Along the classes dx is summed, and each row of dw is whole at once.
  const int64_t tokens = x.size(0), classes = w.size(0);
  const bool by_classes = needed[1] && w.element_size() == 2 && tokens > 0 && 2 * tokens < classes;
  Head head(x, w, target, b, ignore_index, chunk, by_classes);
  const CrossEntropyOptions options{ignore_index, smoothing, z_loss, softcap, scale};
  const OptTensor cw = given(class_weight) ? OptTensor(class_weight->to(head.wide())) : OptTensor();
  Tensor x_grad, w_grad, b_grad;
  if (needed[0]) x_grad = by_classes ? head.gradient(x) : pool::empty(x.sizes(), x);
  if (needed[1]) w_grad = by_classes ? pool::empty(w.sizes(), w) : head.gradient(w);
  if (needed[1] && tokens == 0) w_grad.zero_();
  if (needed[2]) b_grad = at::zeros({classes}, head.wide());
  for (int64_t first = 0; first < tokens; first += head.chunk()) {
    int64_t c = 0;
    do {  // once without classes, too: dx is 0
      const Tensor z = head.logits(first, c);
      const auto part = [&](const OptTensor& v) { return given(v) && v->dim() ? v->narrow(0, first, z.size(0)) : v; };
      const auto wide = [&](const OptTensor& v) { return given(v) ? OptTensor(part(v)->to(head.wide())) : v; };
      const LossRows saved{{}, *part(top), *part(log_sum), {}, {}};
      loss_rows_backward(kOp, z, *part(target), cw, options, saved, {wide(dloss), wide(dlse), wide(divisor)}, z, {c, classes});
      head.backward(x_grad, w_grad, b_grad);
    } while ((c += head.block()) < classes);
  }
  const auto as = [](const Tensor& t, at::ScalarType type) { return t.defined() ? t.to(type) : t; };
  return {as(x_grad, x.scalar_type()), as(w_grad, w.scalar_type()), as(b_grad, b_type)};
}

}  // namespace fusegrad
