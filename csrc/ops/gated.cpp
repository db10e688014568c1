#include "gated.h"

#include "../host/pool.h"
#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
namespace {

// The ops of the family, in the order of their numbers in python/fusegrad/ops/gated.py.
struct Unit {
  const char *name, *backward;
  Act act;
  bool gate_first;  // of the halves of a packed input
};
constexpr Unit kUnits[] = {
    {"swiglu", "swiglu backward", Act::silu, true},
    {"geglu", "geglu backward", Act::gelu, true},
    {"geglu_tanh", "geglu_tanh backward", Act::gelu_tanh, true},
    {"reglu", "reglu backward", Act::relu, true},
    {"glu", "glu backward", Act::sigmoid, false},
};

const Unit& unit(int64_t number) { return kUnits[checked_number("gated: unit", number, std::size(kUnits))]; }

template <Act act>
using Constant = std::integral_constant<Act, act>;

template <class F>
void with_activation(Act act, const F& f) {
  switch (act) {
    case Act::gelu: return f(Constant<Act::gelu>{});
    case Act::gelu_tanh: return f(Constant<Act::gelu_tanh>{});
    case Act::relu: return f(Constant<Act::relu>{});
    case Act::sigmoid: return f(Constant<Act::sigmoid>{});
    default: return f(Constant<Act::silu>{});
  }
}

}  // namespace

Tensor gated_fwd(const Tensor& gate,   // [*], or [*, 2 n, *] with both halves if up is not given
                 const OptTensor& up,  // [*]
                 int64_t dim, int64_t number) {
  RECORD_FUNCTION("fusegrad::gated_fwd", {});
  const Unit& u = unit(number);
  const bool packed = !given(up);
  Frame frame = Frame::flat(u.name, gate, packed ? "input" : "gate", dim, packed ? 2 : 1);
  at::DimVector sizes(gate.sizes());
  if (packed) sizes[dim] /= 2;
  Tensor y = packed ? pool::empty(sizes, gate) : empty_as(gate);
  with_activation(u.act, [&](auto act) {
    using F = GatedFwd<act>;
    MapArgs<F> args{};
    frame.out(args.out[F::kY], y);
    frame.in(args.in[F::kG], gate, "gate", packed ? !u.gate_first : -1);
    frame.in(args.in[F::kU], packed ? gate : *up, "up", packed ? u.gate_first : -1);
    run(frame, args);
  });
  return y;
}

std::tuple<Tensor, Tensor> gated_bwd(const Tensor& dy,     // [*]
                                     const Tensor& gate,   // [*], or [*, 2 n, *]
                                     const OptTensor& up,  // [*]
                                     int64_t dim, int64_t number, std::array<bool, 2> needed) {
  RECORD_FUNCTION("fusegrad::gated_bwd", {});
  const Unit& u = unit(number);
  const bool packed = !given(up);
  Frame frame = Frame::flat(u.backward, gate, packed ? "input" : "gate", dim, packed ? 2 : 1);
  Tensor dgate, dup;
  with_activation(u.act, [&](auto act) {
    using B = GatedBwd<act>;
    MapArgs<B> args{};
    if (needed[0]) {
      dgate = packed ? pool::empty(gate.sizes(), gate) : empty_as(gate);
      frame.out(args.out[B::kDg], dgate, packed ? !u.gate_first : -1);
      if (packed) frame.out(args.out[B::kDu], dgate, u.gate_first);
    }
    if (needed[1] && !packed) frame.out(args.out[B::kDu], dup = empty_as(gate));
    frame.in(args.in[B::kG], gate, "gate", packed ? !u.gate_first : -1);
    frame.in(args.in[B::kU], packed ? gate : *up, "up", packed ? u.gate_first : -1);
    frame.in(args.in[B::kDy], dy, "gradient");
    run(frame, args);
  });
  return {dgate, dup};
}

}  // namespace fusegrad
