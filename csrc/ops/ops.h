// The host functions of every op, as bindings.cpp registers them. Shapes are given where they are defined.
#pragma once

#include <array>
#include <tuple>

#include "../core/rng.h"
#include "../host/view.h"

namespace fusegrad {

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const OptTensor& w, int64_t dims, double eps, double offset,
                                        bool cast_first);
std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const OptTensor& w, const Tensor& rstd, int64_t dims,
                                        double offset, std::array<bool, 2> needed);

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const OptTensor& w, const OptTensor& b, int64_t dims,
                                                  double eps);
std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const OptTensor& w, const OptTensor& b,
                                                  const Tensor& mean, const Tensor& rstd, int64_t dims, std::array<bool, 3> needed);

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_fwd(const Tensor& x, const Tensor& residual, const OptTensor& w,
                                                        const OptTensor& b, const OptTensor& seed, int64_t dims, double eps,
                                                        double offset, bool cast_first, double p, bool rms);
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_bwd(const Tensor& dy, const OptTensor& dsum, const Tensor& sum,
                                                        const OptTensor& w, const OptTensor& b, const OptTensor& seed,
                                                        const OptTensor& mean, const Tensor& rstd, int64_t dims, double offset,
                                                        double p, std::array<bool, 4> needed);
// For the ops that drop on their way.
Dropout dropout_of(const Frame& frame, const Tensor& seed, double p);

Tensor linear_product(const Tensor& x, const Tensor& w, const OptTensor& b);

Tensor dyt_fwd(const Tensor& x, const Tensor& alpha, const OptTensor& w, const OptTensor& b, int64_t dims);
std::tuple<Tensor, Tensor, Tensor, Tensor> dyt_bwd(const Tensor& dy, const Tensor& x, const Tensor& alpha, const OptTensor& w,
                                                   const OptTensor& b, int64_t dims, std::array<bool, 4> needed);

Tensor l2_norm_fwd(const Tensor& x, int64_t dim, double eps, bool divide);
Tensor l2_norm_bwd(const Tensor& dy, const Tensor& x, int64_t dim, double eps, bool divide);

Tensor gated_fwd(const Tensor& gate, const OptTensor& up, int64_t dim, int64_t number);
std::tuple<Tensor, Tensor> gated_bwd(const Tensor& dy, const Tensor& gate, const OptTensor& up, int64_t dim, int64_t number,
                                     std::array<bool, 2> needed);

Tensor bias_act_fwd(const Tensor& x, const OptTensor& b, int64_t act, double scale, double slope, int64_t dim);
std::tuple<Tensor, Tensor> bias_act_bwd(const Tensor& dy, const Tensor& x, const OptTensor& b, int64_t act, double scale,
                                        double slope, int64_t dim, std::array<bool, 2> needed);

Tensor pointwise_fwd(const Tensor& x, int64_t number, double factor);
Tensor pointwise_bwd(const Tensor& dy, const OptTensor& saved, int64_t number, double factor);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd(const Tensor& x, const Tensor& target, const OptTensor& w,
                                                                     const OptTensor& num_items, int64_t ignore_index,
                                                                     double smoothing, double z_loss, double softcap, double scale,
                                                                     bool reduce, bool mean, double items, bool empty_is_zero,
                                                                     bool wide, bool return_lse);
Tensor cross_entropy_bwd(const OptTensor& dloss, const OptTensor& dlse, const Tensor& x, const Tensor& target, const OptTensor& w,
                         const Tensor& top, const Tensor& log_sum, const OptTensor& divisor, int64_t ignore_index, double smoothing,
                         double z_loss, double softcap, double scale);
// Of losses and weights [*] to (total, divisor), both [], by a kernel: see LossTotal. For other ops; not registered.
std::tuple<Tensor, Tensor> loss_total(const char* op, const Tensor& loss, const Tensor& weight, const OptTensor& num_items,
                                      double items, bool mean, bool empty_is_zero);

std::tuple<Tensor, Tensor, Tensor> softmax_fwd(const Tensor& x, const OptTensor& mask, int64_t dim, double scale, bool causal,
                                               int64_t kind, bool statistics);
Tensor softmax_bwd(const Tensor& dy, const Tensor& saved, const OptTensor& top, const OptTensor& log_sum, int64_t dim, double scale,
                   int64_t kind);

std::tuple<Tensor, Tensor> losses_fwd(const Tensor& x, const Tensor& target, const OptTensor& w, const OptTensor& pos, int64_t kind,
                                      double a, double b, bool log_target, int64_t reduction, bool wide);
std::tuple<Tensor, Tensor> losses_bwd(const Tensor& dloss, const Tensor& x, const Tensor& target, const OptTensor& w,
                                      const OptTensor& pos, const OptTensor& divisor, int64_t kind, double a, double b,
                                      bool log_target, int64_t reduction, std::array<bool, 2> needed);

Tensor dropout_fwd(const Tensor& x, const OptTensor& bias, const OptTensor& residual, const Tensor& seed, double p);
std::tuple<Tensor, Tensor> dropout_bwd(const Tensor& dy, const OptTensor& bias, const Tensor& seed, double p,
                                       std::array<bool, 2> needed);
Tensor dropout_mask(const Tensor& seed, c10::SymIntArrayRef sizes, double p);
// The parts of cross entropy that losses around it are made of, on rows of logits x [N, C]. Weight and lse only if defined.
struct CrossEntropyOptions;
struct LossRows {
  Tensor loss, top, log_sum, weight, lse;  // [N], of the accumulate type
};
struct LossGrads {
  OptTensor loss;     // [] or [N]
  OptTensor lse;      // [N]
  OptTensor divisor;  // []
};
// On the CPU a label that is no class is an error; elsewhere to look would be to wait, and the kernel makes the row NaN.
void check_labels(const char* op, const Tensor& target, int64_t classes, int64_t ignore_index);
void loss_rows(const char* op, const Tensor& x, const Tensor& target, const OptTensor& w, const CrossEntropyOptions& options,
               const LossRows& out);
// The columns of logits are the classes [first, first + columns) of so many; of no more than the columns if it says 0.
struct ClassBlock {
  int64_t first = 0, classes = 0;
};
Tensor loss_rows_backward(const char* op, const Tensor& x, const Tensor& target, const OptTensor& w,
                          const CrossEntropyOptions& options, const LossRows& saved, const LossGrads& grads,
                          Tensor dx = {} /* may be x; a new one if undefined */, const ClassBlock& block = {});

using LinearGrads = std::tuple<Tensor, Tensor, Tensor>;
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd(
    const Tensor& x, const Tensor& w, const Tensor& target, const OptTensor& b, const OptTensor& class_weight,
    const OptTensor& num_items, int64_t ignore_index, double smoothing, double z_loss, double softcap, double scale, bool reduce,
    bool mean, double items, bool empty_is_zero, bool wide, bool return_lse, int64_t chunk, std::array<bool, 3> needed);
LinearGrads linear_cross_entropy_bwd(const OptTensor& dloss, const OptTensor& dlse, const Tensor& x, const Tensor& w,
                                     const Tensor& target, const OptTensor& b, const OptTensor& class_weight, const OptTensor& top,
                                     const OptTensor& log_sum, const OptTensor& divisor, const OptTensor& dx, const OptTensor& dw,
                                     const OptTensor& db, int64_t ignore_index, double smoothing, double z_loss, double softcap,
                                     double scale, int64_t chunk, std::array<bool, 3> needed);

std::tuple<Tensor, Tensor, Tensor, Tensor> vocab_parallel_cross_entropy_fwd(const Tensor& x, const Tensor& target, int64_t first,
                                                                            int64_t classes, int64_t ignore_index, double smoothing,
                                                                            double softcap, double scale);
Tensor vocab_parallel_cross_entropy_bwd(const OptTensor& dloss, const OptTensor& dlse, const Tensor& x, const Tensor& target,
                                        const Tensor& top, const Tensor& log_sum, const OptTensor& divisor, int64_t first,
                                        int64_t classes, int64_t ignore_index, double smoothing, double z_loss, double softcap,
                                        double scale);

std::tuple<Tensor, Tensor, Tensor, Tensor> rotary_fwd(const Tensor& q, const Tensor& k, const OptTensor& q_weight,
                                                      const OptTensor& k_weight, const Tensor& cos, const Tensor& sin, bool normed,
                                                      double eps, bool interleaved);
std::tuple<Tensor, Tensor, Tensor, Tensor> rotary_bwd(const OptTensor& dq_out, const OptTensor& dk_out, const OptTensor& q,
                                                      const OptTensor& k, const OptTensor& q_weight, const OptTensor& k_weight,
                                                      const OptTensor& q_rstd, const OptTensor& k_rstd, const Tensor& cos,
                                                      const Tensor& sin, bool interleaved, std::array<bool, 4> needed);
std::tuple<Tensor, Tensor> channel_norm_fwd(const Tensor& x, const OptTensor& w, const OptTensor& b, const OptTensor& r,
                                            const OptTensor& mean, const OptTensor& var, int64_t groups, double eps,
                                            int64_t activation);
std::tuple<Tensor, Tensor, Tensor, Tensor> channel_norm_bwd(const Tensor& dy, const Tensor& x, const OptTensor& w,
                                                            const OptTensor& b, const OptTensor& r, const Tensor& mean,
                                                            const Tensor& var, const OptTensor& lost, int64_t groups, double eps,
                                                            int64_t activation, std::array<bool, 4> needed);

std::tuple<Tensor, Tensor, Tensor> layer_norm_2d_fwd(const Tensor& x, const OptTensor& w, const OptTensor& b, double eps);
std::tuple<Tensor, Tensor, Tensor> layer_norm_2d_bwd(const Tensor& dy, const Tensor& x, const OptTensor& w, const OptTensor& b,
                                                     const Tensor& mean, const Tensor& rstd, std::array<bool, 3> needed);

}  // namespace fusegrad
