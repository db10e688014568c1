// The host functions of every op, as bindings.cpp registers them. Shapes are given where they are defined.
#pragma once

#include <array>
#include <tuple>

#include "../host/view.h"

namespace fusegrad {

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const OptTensor& w, int64_t dims, double eps, double offset,
                                        bool cast_first);
std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const OptTensor& w, const Tensor& rstd, int64_t dims,
                                        double offset, std::array<bool, 2> needed);

Tensor swiglu_fwd(const Tensor& gate, const OptTensor& up, int64_t dim);
std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& dy, const Tensor& gate, const OptTensor& up, int64_t dim,
                                      std::array<bool, 2> needed);

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

}  // namespace fusegrad
