#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "../host/pool.h"
#include "../host/run.h"
#include "ops.h"

namespace fusegrad {

// x w^T + b, torch's product, into memory of the pool: a fresh result of 32 MB takes longer to be handed out by the system than a
// product with 64 features takes (22 against 12 ms, 32768 x 64 by 64 x 256, one thread).
Tensor linear_product(const Tensor& x,       // [*, in]
                      const Tensor& w,       // [out, in]
                      const OptTensor& b) {  // [out]
  RECORD_FUNCTION("fusegrad::linear_product", {});
  const c10::OptionalDeviceGuard device(x.device());
  const Quiet quiet;
  TORCH_CHECK(x.dim() > 0 && w.dim() == 2, "linear: input must have a dimension and weight two, got ", x.sizes(), " and ",
              w.sizes());
  auto sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  Tensor y = pool::empty(sizes, x);
  const int64_t rows = c10::multiply_integers(sizes.begin(), sizes.end() - 1);
  const Tensor a = x.reshape({rows, x.size(-1)});
  Tensor flat = y.view({rows, w.size(0)});
  given(b) ? at::addmm_out(flat, *b, a, w.t()) : at::mm_out(flat, a, w.t());
  return y;
}

}  // namespace fusegrad
