// The public header: what the functors of an op outside of this repository are written with (docs/extension.md). They lie in the
// namespace fusegrad, where the vocabulary of core/numeric.h is, and are called <Name>Fwd and <Name>Bwd.
//
// The backward reads what the forward read and then the gradients of its results, and gives a gradient for each:
//
//   map op (element by element)      x[in]                       ->  y[out]
//     its backward                   x[in], then dy[out]         ->  y: dx[in]
//
//   row op (over the last dimension) x[in], p[params]            ->  y[out], scalar_out values of a row, which are kept
//     its backward                   x[in], dy[out], p[params]   ->  y: dx[in], col: dp[params], with the kept values as scalar_in
//
// Fields are options of type double, the same ones in both, in the order of the reference's arguments.
#pragma once

#include "core/row_op.h"

namespace fusegrad {

template <class Op>
constexpr bool is_row_op = std::is_base_of_v<RowOp, Op>;
template <class Op>
using ArgsOf = std::conditional_t<is_row_op<Op>, RowArgs<Op>, MapArgs<Op>>;

}  // namespace fusegrad

#define FUSEGRAD_KERNELS_BY(Op, variant, Rows, Map)                                                                                \
  namespace fusegrad {                                                                                                             \
  template <>                                                                                                                      \
  const Kernel<ArgsOf<Op>> Kernels<ArgsOf<Op>, variant>::entry = {std::conditional_t<is_row_op<Op>, Rows<Op>, Map<Op>>::launch,    \
                                                                  std::conditional_t<is_row_op<Op>, Rows<Op>, Map<Op>>::slices};   \
  }
