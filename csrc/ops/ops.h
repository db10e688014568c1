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

std::tuple<Tensor, Tensor> channel_norm_fwd(const Tensor& x, const OptTensor& w, const OptTensor& b, const OptTensor& r,
                                            const OptTensor& mean, const OptTensor& var, int64_t groups, double eps,
                                            int64_t activation);
std::tuple<Tensor, Tensor, Tensor, Tensor> channel_norm_bwd(const Tensor& dy, const Tensor& x, const OptTensor& w,
                                                            const OptTensor& b, const OptTensor& r, const Tensor& mean,
                                                            const Tensor& var, int64_t groups, double eps, int64_t activation,
                                                            bool constant, std::array<bool, 4> needed);

std::tuple<Tensor, Tensor, Tensor> layer_norm_2d_fwd(const Tensor& x, const OptTensor& w, const OptTensor& b, double eps);
std::tuple<Tensor, Tensor, Tensor> layer_norm_2d_bwd(const Tensor& dy, const Tensor& x, const OptTensor& w, const OptTensor& b,
                                                     const Tensor& mean, const Tensor& rstd, std::array<bool, 3> needed);

}  // namespace fusegrad
