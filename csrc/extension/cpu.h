// The CPU kernels and the host functions of an op that is loaded by fusegrad.extension, all in one file: it is compiled for the one
// CPU that it will run on, so that no capability's code has to be kept from another's. The host code is compiled into each
// extension (a few seconds) rather than taken from fusegrad._C: a Python module is nothing that every platform can link to, and an
// extension would break with each new build of it. The price is a pool of memory (host/pool.h) for each.
#pragma once

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "../core/map_cpu.h"
#include "../core/rows_cpu.h"
#include "../fusegrad.h"
#include "../host/pool.h"
#include "../host/run.h"

#define FUSEGRAD_KERNELS(Op) FUSEGRAD_KERNELS_BY(Op, FUSEGRAD_VARIANT, RowsOnCpu, MapOnCpu)

namespace fusegrad::extension {
namespace {

template <class Op, size_t... i>
constexpr bool takes(std::index_sequence<i...>) {
  return requires { Op{{}, (void(i), std::declval<double&>())...}; };  // no double becomes a float in braces
}
template <class Op>
constexpr int kOptions = std::is_empty_v<Op> ? 0 : sizeof(Op) / sizeof(double);
template <class Op>
constexpr bool only_doubles =
    std::is_empty_v<Op> || (sizeof(Op) % sizeof(double) == 0 && takes<Op>(std::make_index_sequence<kOptions<Op>>()));
template <class Op>
constexpr bool plain = Op::mixed == 0 && Op::index == 0 && Op::sums == 0 && !Op::numbered;

// E says what the extension is: Forward, Backward, the names of both, and those of the reference's arguments.
template <class E>
struct Extension {
  using Fwd = typename E::Forward;
  using Bwd = typename E::Backward;
  using Options = at::ArrayRef<double>;
  static constexpr bool rows = is_row_op<Fwd>;
  static constexpr int tensors = Fwd::in + Fwd::params;
  using Arguments = std::array<OptTensor, tensors>;

  static_assert(std::is_base_of_v<MapOp, Fwd> && std::is_base_of_v<MapOp, Bwd>, "the functors must derive from MapOp or RowOp");
  static_assert(rows == is_row_op<Bwd>, "forward and backward must both be map ops, or both row ops");
  static_assert(plain<Fwd> && plain<Bwd>, "mixed, index, sums and numbered are not for extensions");
  static_assert(Fwd::in > 0 && Fwd::out > 0, "the forward must have in and out of at least 1");
  static_assert(Bwd::in == Fwd::in + Fwd::out, "the backward's in must be the forward's in + out: its inputs, then the gradients");
  static_assert(Bwd::out == Fwd::in, "the backward's out must be the forward's in: a gradient of each input");
  static_assert(rows || Fwd::params + Bwd::params == 0, "params are for row ops");
  static_assert(Bwd::params == Fwd::params, "the backward's params must be the forward's");
  static_assert(Bwd::col_out == Fwd::params, "the backward's col_out must be the forward's params: a gradient of each");
  static_assert(Bwd::wide_cols == 0, "wide_cols is not for extensions");
  static_assert(Bwd::scalar_in == Fwd::scalar_out,
                "the backward's scalar_in must be the forward's scalar_out: what is kept of a row");
  static_assert(Fwd::scalar_in + Fwd::col_out + Bwd::scalar_out == 0,
                "the forward has no scalar_in and col_out, the backward no scalar_out");
  static_assert(only_doubles<Fwd> && only_doubles<Bwd>, "the fields of the functors must be double");
  static_assert(kOptions<Fwd> == kOptions<Bwd>, "the functors must have the same fields");
  static_assert(std::size(E::arguments) == tensors + kOptions<Fwd>,
                "the reference must take in + params tensors, then a number for each field of the functors");

  static Frame frame_of(const char* op, const Tensor& x) {
    if (!rows) return Frame::flat(op, x, E::arguments[0]);
    TORCH_CHECK(x.dim() > 0, op, ": ", E::arguments[0], " must have at least one dimension, got none");
    return Frame(op, x, E::arguments[0], x.dim() - 1, x.dim());
  }

  // The tensors that are given, by their numbers: what the dispatcher does to arguments (negative bits) it does to a list of
  // tensors, but not to one that has gaps.
  static Arguments arguments(const char* op, at::TensorList given, at::IntArrayRef numbers) {
    Arguments all;
    TORCH_CHECK(given.size() == numbers.size(), op, ": takes a number for each tensor, got ", given.size(), " and ",
                numbers.size());
    for (size_t i = 0; i < given.size(); ++i) {
      TORCH_CHECK_INDEX(numbers[i] >= 0 && numbers[i] < tensors, op, ": numbers must be in [0, ", tensors, "), got ", numbers[i]);
      all[numbers[i]] = given[i];
    }
    for (int i = 0; i < Fwd::in; ++i) TORCH_CHECK(all[i], op, ": ", E::arguments[i], " must be a Tensor, got None");
    return all;
  }

  template <class Op>
  static ArgsOf<Op> args_of(const char* op, Options options) {
    TORCH_CHECK(int64_t(options.size()) == kOptions<Op>, op, ": takes ", kOptions<Op>, " options, got ", options.size());
    ArgsOf<Op> args{};
    if constexpr (kOptions<Op> > 0) std::memcpy(static_cast<void*>(&args.op), options.data(), sizeof(Op));
    return args;
  }

  template <class Op>
  static void read(Frame& frame, ArgsOf<Op>& args, const Arguments& all) {
    for (int i = 0; i < Fwd::in; ++i) frame.in(args.in[i], *all[i], E::arguments[i]);
    if constexpr (rows)
      for (int i = 0; i < Fwd::params; ++i) args.param[i] = frame.params(all[Fwd::in + i], E::arguments[Fwd::in + i]);
  }

  static Tensor empty(const Frame& frame) { return rows ? frame.empty_rows() : empty_as(frame.main()); }

  // The results, then what is kept of each row.
  static std::vector<Tensor> forward(at::TensorList given, at::IntArrayRef numbers, Options options) {
    const Arguments all = arguments(E::name, given, numbers);
    auto args = args_of<Fwd>(E::name, options);
    Frame frame = frame_of(E::name, *all[0]);
    std::vector<Tensor> results;
    for (int i = 0; i < Fwd::out; ++i) frame.out(args.out[i], results.emplace_back(empty(frame)));
    read<Fwd>(frame, args, all);
    if constexpr (rows)
      for (int i = 0; i < Fwd::scalar_out; ++i)
        frame.per_row(args.scalar_out[i], results.emplace_back(frame.empty_per_row()), "kept");
    run(frame, args);
    return results;
  }

  // Of the tensors whose numbers are in `needed`, in that order.
  static std::vector<Tensor> backward(at::TensorList grads, at::TensorList given, at::IntArrayRef numbers, at::TensorList kept,
                                      Options options, at::IntArrayRef needed) {
    const char* const op = E::backward_name;
    const Arguments all = arguments(op, given, numbers);
    auto args = args_of<Bwd>(op, options);
    TORCH_CHECK(int64_t(grads.size()) == Fwd::out && int64_t(kept.size()) == Fwd::scalar_out, op, ": takes ", Fwd::out,
                " gradients and ", Fwd::scalar_out, " kept tensors, got ", grads.size(), " and ", kept.size());
    Frame frame = frame_of(op, *all[0]);
    std::vector<Tensor> results;
    for (const int64_t i : needed) {
      TORCH_CHECK_INDEX(i >= 0 && i < tensors, op, ": needed must be in [0, ", tensors, "), got ", i);
      if (i < Fwd::in) {
        frame.out(args.out[i], results.emplace_back(empty(frame)));
      } else if constexpr (rows) {
        results.push_back(frame.empty_params(all[i]));
        args.col_out[i - Fwd::in] = results.back().mutable_data_ptr();
      }
    }
    if (results.empty()) return results;
    read<Bwd>(frame, args, all);
    for (int i = 0; i < Fwd::out; ++i) frame.in(args.in[Fwd::in + i], grads[i], "gradient");
    if constexpr (rows)
      for (int i = 0; i < Fwd::scalar_out; ++i) frame.per_row(args.scalar_in[i], kept[i], "kept");
    run(frame, args);
    return results;
  }

  static void define(torch::Library& m) {
    const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
    m.def("forward(Tensor[] tensors, int[] numbers, float[] options) -> Tensor[]", tags);
    m.def("backward(Tensor[] grads, Tensor[] tensors, int[] numbers, Tensor[] kept, float[] options, int[] needed) -> Tensor[]",
          tags);
    // rows, in, params, out, kept of a row
    m.def("layout() -> int[]", [] { return std::vector<int64_t>{rows, Fwd::in, Fwd::params, Fwd::out, Fwd::scalar_out}; });
    m.def("pool_clear() -> ()", [] { pool::clear(); });
    m.def("pool_kept() -> int", [] { return pool::kept(); });
  }
  static void implement(torch::Library& m) {
    m.impl("forward", &forward);
    m.impl("backward", &backward);
  }
  // As csrc/bindings.cpp: an error where somebody differentiates a kernel.
  static void no_derivative(torch::Library& m) {
    for (const char* name : {"forward", "backward"}) m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
};

}  // namespace
}  // namespace fusegrad::extension

#define FUSEGRAD_EXTENSION(library, E)                                                                                             \
  TORCH_LIBRARY(library, m) { fusegrad::extension::Extension<E>::define(m); }                                                      \
  TORCH_LIBRARY_IMPL(library, CPU, m) { fusegrad::extension::Extension<E>::implement(m); }                                         \
  TORCH_LIBRARY_IMPL(library, CUDA, m) { fusegrad::extension::Extension<E>::implement(m); }                                        \
  TORCH_LIBRARY_IMPL(library, Autograd, m) { fusegrad::extension::Extension<E>::no_derivative(m); }

#include "../host/pool.cpp"
#include "../host/view.cpp"
