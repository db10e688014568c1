// The names: every host function, once for torch.ops (traced, batched, fake, ... tensors) and once for a direct call.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/extension.h>
#include <torch/library.h>

#include "host/pool.h"
#include "host/run.h"
#include "ops/ops.h"

#define FUSEGRAD_OPS(_)                                                                                                            \
  _(rms_norm_fwd, "(Tensor x, Tensor? w, int dims, float eps, float offset, bool cast_first) -> (Tensor, Tensor)")                 \
  _(rms_norm_bwd, "(Tensor dy, Tensor x, Tensor? w, Tensor rstd, int dims, float offset, bool[2] needed) -> (Tensor, Tensor)")     \
  _(layer_norm_fwd, "(Tensor x, Tensor? w, Tensor? b, int dims, float eps) -> (Tensor, Tensor, Tensor)")                           \
  _(layer_norm_bwd,                                                                                                                \
    "(Tensor dy, Tensor x, Tensor? w, Tensor? b, Tensor mean, Tensor rstd, int dims, bool[3] needed)"                              \
    " -> (Tensor, Tensor, Tensor)")                                                                                                \
  _(add_norm_fwd,                                                                                                                  \
    "(Tensor x, Tensor residual, Tensor? w, Tensor? b, Tensor? seed, int dims, float eps, float offset, bool cast_first,"          \
    " float p, bool rms) -> (Tensor, Tensor, Tensor, Tensor)")                                                                     \
  _(add_norm_bwd,                                                                                                                  \
    "(Tensor dy, Tensor? dsum, Tensor sum, Tensor? w, Tensor? b, Tensor? seed, Tensor? mean, Tensor rstd, int dims,"               \
    " float offset, float p, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)")                                                 \
  _(dyt_fwd, "(Tensor x, Tensor alpha, Tensor? w, Tensor? b, int dims) -> Tensor")                                                 \
  _(dyt_bwd,                                                                                                                       \
    "(Tensor dy, Tensor x, Tensor alpha, Tensor? w, Tensor? b, int dims, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)")     \
  _(l2_norm_fwd, "(Tensor x, int dim, float eps, bool divide) -> Tensor")                                                          \
  _(l2_norm_bwd, "(Tensor dy, Tensor x, int dim, float eps, bool divide) -> Tensor")                                               \
  _(dropout_fwd, "(Tensor x, Tensor? bias, Tensor? residual, Tensor seed, float p) -> Tensor")                                     \
  _(dropout_bwd, "(Tensor dy, Tensor? bias, Tensor seed, float p, bool[2] needed) -> (Tensor, Tensor)")                            \
  _(dropout_mask, "(Tensor seed, SymInt[] sizes, float p) -> Tensor")                                                              \
  _(gated_fwd, "(Tensor gate, Tensor? up, int dim, int number) -> Tensor")                                                         \
  _(gated_bwd, "(Tensor dy, Tensor gate, Tensor? up, int dim, int number, bool[2] needed) -> (Tensor, Tensor)")                    \
  _(bias_act_fwd, "(Tensor x, Tensor? b, int act, float scale, float slope, int dim) -> Tensor")                                   \
  _(bias_act_bwd,                                                                                                                  \
    "(Tensor dy, Tensor x, Tensor? b, int act, float scale, float slope, int dim, bool[2] needed) -> (Tensor, Tensor)")            \
  _(linear_product, "(Tensor x, Tensor w, Tensor? b) -> Tensor")                                                                   \
  _(pointwise_fwd, "(Tensor x, int number, float factor) -> Tensor")                                                               \
  _(pointwise_bwd, "(Tensor dy, Tensor? saved, int number, float factor) -> Tensor")                                               \
  _(rotary_fwd,                                                                                                                    \
    "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, bool normed, float eps,"                     \
    " bool interleaved) -> (Tensor, Tensor, Tensor, Tensor)")                                                                      \
  _(rotary_bwd,                                                                                                                    \
    "(Tensor? dq_out, Tensor? dk_out, Tensor? q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor? q_rstd, Tensor? k_rstd,"   \
    " Tensor cos, Tensor sin, bool interleaved, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)")                              \
  _(cross_entropy_fwd,                                                                                                             \
    "(Tensor x, Tensor target, Tensor? w, Tensor? num_items, int ignore_index, float smoothing, float z_loss,"                     \
    " float softcap, float scale, bool reduce, bool mean, float items, bool empty_is_zero, bool wide, bool return_lse)"            \
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)")                                                                                \
  _(cross_entropy_bwd,                                                                                                             \
    "(Tensor? dloss, Tensor? dlse, Tensor x, Tensor target, Tensor? w, Tensor top, Tensor log_sum,"                                \
    " Tensor? divisor, int ignore_index, float smoothing, float z_loss, float softcap, float scale) -> Tensor")                    \
  _(channel_norm_fwd,                                                                                                              \
    "(Tensor x, Tensor? w, Tensor? b, Tensor? r, Tensor? mean, Tensor? var, int groups, float eps, int activation)"                \
    " -> (Tensor, Tensor)")                                                                                                        \
  _(channel_norm_bwd,                                                                                                              \
    "(Tensor dy, Tensor x, Tensor? w, Tensor? b, Tensor? r, Tensor mean, Tensor var, Tensor? lost, int groups, float eps,"         \
    " int activation, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)")                                                        \
  _(layer_norm_2d_fwd, "(Tensor x, Tensor? w, Tensor? b, float eps) -> (Tensor, Tensor, Tensor)")                                  \
  _(layer_norm_2d_bwd,                                                                                                             \
    "(Tensor dy, Tensor x, Tensor? w, Tensor? b, Tensor mean, Tensor rstd, bool[3] needed) -> (Tensor, Tensor, Tensor)")           \
  _(linear_cross_entropy_fwd,                                                                                                      \
    "(Tensor x, Tensor w, Tensor target, Tensor? b, Tensor? class_weight, Tensor? num_items, int ignore_index, float smoothing,"   \
    " float z_loss, float softcap, float scale, bool reduce, bool mean, float items, bool empty_is_zero, bool wide,"               \
    " bool return_lse, int chunk, bool[3] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")            \
  _(linear_cross_entropy_bwd,                                                                                                      \
    "(Tensor? dloss, Tensor? dlse, Tensor x, Tensor w, Tensor target, Tensor? b, Tensor? class_weight, Tensor? top,"               \
    " Tensor? log_sum, Tensor? divisor, Tensor? dx, Tensor? dw, Tensor? db, int ignore_index, float smoothing, float z_loss,"      \
    " float softcap, float scale, int chunk, bool[3] needed) -> (Tensor, Tensor, Tensor)")                                         \
  _(vocab_parallel_cross_entropy_fwd,                                                                                              \
    "(Tensor x, Tensor target, int first, int classes, int ignore_index, float smoothing,"                                         \
    " float softcap, float scale) -> (Tensor, Tensor, Tensor, Tensor)")                                                            \
  _(vocab_parallel_cross_entropy_bwd,                                                                                              \
    "(Tensor? dloss, Tensor? dlse, Tensor x, Tensor target, Tensor top, Tensor log_sum,"                                           \
    " Tensor? divisor, int first, int classes, int ignore_index, float smoothing, float z_loss, float softcap, float scale)"       \
    " -> Tensor")                                                                                                                  \
  _(softmax_fwd,                                                                                                                   \
    "(Tensor x, Tensor? mask, int dim, float scale, bool causal, int kind, bool statistics) -> (Tensor, Tensor, Tensor)")          \
  _(softmax_bwd, "(Tensor dy, Tensor saved, Tensor? top, Tensor? log_sum, int dim, float scale, int kind) -> Tensor")              \
  _(losses_fwd,                                                                                                                    \
    "(Tensor x, Tensor target, Tensor? w, Tensor? pos, int kind, float a, float b, bool log_target, int reduction, bool wide)"     \
    " -> (Tensor, Tensor)")                                                                                                        \
  _(losses_bwd,                                                                                                                    \
    "(Tensor dloss, Tensor x, Tensor target, Tensor? w, Tensor? pos, Tensor? divisor, int kind, float a, float b,"                 \
    " bool log_target, int reduction, bool[2] needed) -> (Tensor, Tensor)")

// The library of torch.ops; the emulated build (tests/emulator) has its own. In two steps, so that the name is expanded.
#ifndef FUSEGRAD_LIBRARY
#define FUSEGRAD_LIBRARY fusegrad
#endif
#define FUSEGRAD_TORCH_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#define FUSEGRAD_TORCH_LIBRARY_IMPL(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)

namespace fusegrad {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

// A direct call is right for nothing but ordinary tensors with nobody listening. Any other key (a mode, a functorch level, a
// negative bit, a zero tensor, a subclass) asks for something that the dispatcher does. Layouts that no kernel takes pass, so
// that the host function can say so.
const uint64_t kOrdinary =
    DispatchKeySet({c10::BackendComponent::CPUBit, c10::BackendComponent::CUDABit, c10::BackendComponent::MetaBit}).raw_repr() |
    DispatchKeySet({DispatchKey::Dense, DispatchKey::Sparse, DispatchKey::SparseCsr, DispatchKey::Quantized,
                    DispatchKey::NestedTensor, DispatchKey::MkldnnCPU, DispatchKey::AutogradFunctionality,
                    DispatchKey::AutogradOther, DispatchKey::AutogradNestedTensor, DispatchKey::ADInplaceOrView})
        .raw_repr() |
    c10::autocast_dispatch_keyset.raw_repr();
const uint64_t kQuiet = c10::default_included_set.raw_repr() | c10::autocast_dispatch_keyset.raw_repr();

bool ordinary(const Tensor& t) { return (t.unsafeGetTensorImpl()->key_set().raw_repr() & ~kOrdinary) == 0; }
bool ordinary(const OptTensor& t) { return !given(t) || ordinary(*t); }
template <class T>
bool ordinary(const T&) {
  return true;
}
// Meta tensors alone are for the dispatcher; beside a real one they are a mistake that the host function names.
bool not_meta(const Tensor& t) { return !t.is_meta(); }
bool not_meta(const OptTensor& t) { return given(t) && not_meta(*t); }
template <class T>
bool not_meta(const T&) {
  return false;
}
bool quiet() { return (c10::impl::tls_local_dispatch_key_set().included_.raw_repr() & ~kQuiet) == 0; }

template <class F>
struct Gate;
template <class R, class... Args>
struct Gate<R (*)(Args...)> {
  R (*function)(Args...);
  c10::TypedOperatorHandle<R(Args...)> registered;

  R operator()(Args... args) const {
    if (quiet() && (ordinary(args) && ...) && (not_meta(args) || ...)) return function(args...);
    return registered.call(args...);
  }
};

template <class F>
void bind(py::module_& m, const char* name, F function) {
  const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow((std::string(C10_STRINGIZE(FUSEGRAD_LIBRARY) "::") + name).c_str(), "");
  m.def(name, Gate<F>{function, handle.typed<std::remove_pointer_t<F>>()}, py::call_guard<py::gil_scoped_release>());
}

}  // namespace
}  // namespace fusegrad

FUSEGRAD_TORCH_LIBRARY(FUSEGRAD_LIBRARY, m) {
#define FUSEGRAD_DEF(name, schema) m.def(#name schema, {at::Tag::pt2_compliant_tag});
  FUSEGRAD_OPS(FUSEGRAD_DEF)
}
#define FUSEGRAD_IMPL(name, schema) m.impl(#name, &fusegrad::name);
FUSEGRAD_TORCH_LIBRARY_IMPL(FUSEGRAD_LIBRARY, CPU, m){
    FUSEGRAD_OPS(FUSEGRAD_IMPL)} FUSEGRAD_TORCH_LIBRARY_IMPL(FUSEGRAD_LIBRARY, CUDA, m){FUSEGRAD_OPS(FUSEGRAD_IMPL)}
// Whoever differentiates a kernel, and not the Function around it, gets an error instead of no gradient and a warning.
#define FUSEGRAD_NO_DERIVATIVE(name, schema) m.impl(#name, torch::autograd::autogradNotImplementedFallback());
FUSEGRAD_TORCH_LIBRARY_IMPL(FUSEGRAD_LIBRARY, Autograd, m){FUSEGRAD_OPS(FUSEGRAD_NO_DERIVATIVE)}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::register_local_exception_translator([](std::exception_ptr e) {
    try {
      std::rethrow_exception(e);
    } catch (const c10::Error&) {
      torch::translate_exception_to_python(e);
    } catch (const python_error&) {
      torch::translate_exception_to_python(e);
    }
  });
#define FUSEGRAD_BIND(name, schema) fusegrad::bind(m, #name, &fusegrad::name);
  FUSEGRAD_OPS(FUSEGRAD_BIND)
  m.def("cpu_capability", [] { return fusegrad::variant_name(fusegrad::cpu_variant()); });
  m.def("pool_clear", &fusegrad::pool::clear);
  m.def("pool_kept", &fusegrad::pool::kept);
  m.attr("with_cuda") =
#ifdef FUSEGRAD_HAS_CUDA
      true;
#else
      false;
#endif
}
