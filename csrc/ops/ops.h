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

Tensor dyt_fwd(const Tensor& x, const Tensor& alpha, const OptTensor& w, const OptTensor& b, int64_t dims);
std::tuple<Tensor, Tensor, Tensor, Tensor> dyt_bwd(const Tensor& dy, const Tensor& x, const Tensor& alpha, const OptTensor& w,
                                                   const OptTensor& b, int64_t dims, std::array<bool, 4> needed);

Tensor l2_norm_fwd(const Tensor& x, int64_t dim, double eps, bool divide);
Tensor l2_norm_bwd(const Tensor& dy, const Tensor& x, int64_t dim, double eps, bool divide);

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

Tensor dropout_fwd(const Tensor& x, const OptTensor& bias, const OptTensor& residual, const Tensor& seed, double p);
std::tuple<Tensor, Tensor> dropout_bwd(const Tensor& dy, const OptTensor& bias, const Tensor& seed, double p,
                                       std::array<bool, 2> needed);
Tensor dropout_mask(const Tensor& seed, c10::SymIntArrayRef sizes, double p);

}  // namespace fusegrad
