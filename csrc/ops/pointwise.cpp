#include "pointwise.h"

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
namespace {

// The ops of the family, by number in the order of python/fusegrad/ops/pointwise.py.
enum { kScale, kExp, kCube, kGradReverse };
constexpr const char* kNames[] = {"scale", "exp", "cube", "grad_reverse"};
constexpr const char* kBackward[] = {"scale backward", "exp backward", "cube backward", "grad_reverse backward"};

const char* name(const char* const (&names)[4], int64_t number) { return names[checked_number("pointwise: op", number, 4)]; }

template <class F>
Tensor mapped(const F& op, const char* name, const Tensor& x, const char* x_name, const OptTensor& saved = {}) {
  Frame frame = Frame::flat(name, x, x_name);
  MapArgs<F> args{op};
  Tensor y = empty_as(x);
  frame.out(args.out[0], y);
  frame.in(args.in[0], x, x_name);
  if constexpr (F::in > 1) frame.in(args.in[F::in - 1], saved.value(), "saved tensor");
  run(frame, args);
  return y;
}

}  // namespace

Tensor pointwise_fwd(const Tensor& x,  // [*]
                     int64_t number, double factor) {
  RECORD_FUNCTION("fusegrad::pointwise_fwd", {});
  const char* const op = name(kNames, number);
  if (number == kExp) return mapped(ValueOf<Act::exp>{}, op, x, "input");
  if (number == kCube) return mapped(ValueOf<Act::cube>{}, op, x, "input");
  return mapped(ScaleFwd{{}, factor}, op, x, "input");
}

Tensor pointwise_bwd(const Tensor& dy,        // [*]
                     const OptTensor& saved,  // [*]
                     int64_t number, double factor) {
  RECORD_FUNCTION("fusegrad::pointwise_bwd", {});
  const char* const op = name(kBackward, number);
  if (number == kExp) return mapped(ExpBwd{}, op, dy, "gradient", saved);
  if (number == kCube) return mapped(GradientAt<Act::cube>{}, op, dy, "gradient", saved);
  return mapped(ScaleFwd{{}, factor}, op, dy, "gradient");
}

}  // namespace fusegrad
