#include "swiglu.h"

#include "../host/pool.h"
#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
Tensor swiglu_fwd(const Tensor& gate,   // [*], or [*, 2 n, *] with both halves if up is not given
                  const OptTensor& up,  // [*]
                  int64_t dim) {
  RECORD_FUNCTION("fusegrad::swiglu_fwd", {});
  const bool packed = !given(up);
  Frame frame = Frame::flat("swiglu", gate, packed ? "input" : "gate", dim, packed ? 2 : 1);
  MapArgs<SwiGLUFwd> args{};
  at::DimVector sizes(gate.sizes());
  if (packed) sizes[dim] /= 2;
  Tensor y = packed ? pool::empty(sizes, gate) : empty_as(gate);
  frame.out(args.out[SwiGLUFwd::kY], y);
  frame.in(args.in[SwiGLUFwd::kG], gate, "gate", packed ? 0 : -1);
  frame.in(args.in[SwiGLUFwd::kU], packed ? gate : *up, "up", packed ? 1 : -1);
  run(frame, args);
  return y;
}

std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& dy,     // [*]
                                      const Tensor& gate,   // [*], or [*, 2 n, *]
                                      const OptTensor& up,  // [*]
                                      int64_t dim, std::array<bool, 2> needed) {
  RECORD_FUNCTION("fusegrad::swiglu_bwd", {});
  const bool packed = !given(up);
  Frame frame = Frame::flat("swiglu backward", gate, packed ? "input" : "gate", dim, packed ? 2 : 1);
  MapArgs<SwiGLUBwd> args{};
  Tensor dgate, dup;
  if (needed[0]) {
    dgate = packed ? pool::empty(gate.sizes(), gate) : empty_as(gate);
    frame.out(args.out[SwiGLUBwd::kDg], dgate, packed ? 0 : -1);
    if (packed) frame.out(args.out[SwiGLUBwd::kDu], dgate, 1);
  }
  if (needed[1] && !packed) frame.out(args.out[SwiGLUBwd::kDu], dup = empty_as(gate));
  frame.in(args.in[SwiGLUBwd::kG], gate, "gate", packed ? 0 : -1);
  frame.in(args.in[SwiGLUBwd::kU], packed ? gate : *up, "up", packed ? 1 : -1);
  frame.in(args.in[SwiGLUBwd::kDy], dy, "gradient");
  run(frame, args);
  return {dgate, dup};
}

}  // namespace fusegrad
