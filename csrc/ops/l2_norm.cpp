#include "l2_norm.h"

#include <algorithm>

#include "../host/run.h"
#include "ops.h"

namespace fusegrad {
namespace {

Frame along(const char* op, const Tensor& x, int64_t dim) { return Frame(op, x, "input", dim, std::min(dim + 1, x.dim())); }

}  // namespace

Tensor l2_norm_fwd(const Tensor& x,  // [*, n, *]
                   int64_t dim, double eps,
                   bool divide) {  // x by its norms; else the norms, [*, *]
  RECORD_FUNCTION("fusegrad::l2_norm_fwd", {});
  Frame frame = along(divide ? "normalize" : "norm", x, dim);
  if (divide) {
    RowArgs<NormalizeFwd> args{{{}, eps}};
    Tensor y = frame.empty_rows();
    frame.in(args.in[NormalizeFwd::kX], x, "input");
    frame.out(args.out[NormalizeFwd::kY], y);
    run(frame, args);
    return y;
  }
  RowArgs<NormFwd> args{};
  Tensor norm = frame.empty_per_row(x.scalar_type());
  frame.in(args.in[NormFwd::kX], x, "input");
  frame.per_row(args.scalar_out[NormFwd::kNorm], norm, "norm");
  run(frame, args);
  return norm;
}

Tensor l2_norm_bwd(const Tensor& dy,  // [*, n, *], or of the norms, [*, *]
                   const Tensor& x,   // [*, n, *]
                   int64_t dim, double eps, bool divide) {
  RECORD_FUNCTION("fusegrad::l2_norm_bwd", {});
  Frame frame = along(divide ? "normalize backward" : "norm backward", x, dim);
  Tensor dx = frame.empty_rows();
  if (divide) {
    RowArgs<NormalizeBwd> args{{{}, eps}};
    frame.in(args.in[NormalizeBwd::kX], x, "input");
    frame.in(args.in[NormalizeBwd::kDy], dy, "gradient");
    frame.out(args.out[NormalizeBwd::kDx], dx);
    run(frame, args);
  } else {
    RowArgs<NormBwd> args{};
    frame.in(args.in[NormBwd::kX], x, "input");
    frame.per_row(args.scalar_in[NormBwd::kDNorm], dy, "gradient");
    frame.out(args.out[NormBwd::kDx], dx);
    run(frame, args);
  }
  return dx;
}

}  // namespace fusegrad
