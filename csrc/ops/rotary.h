// Rotary embedding (Su et al. 2021, arXiv:2104.09864) of q and k, in one go, with an RMS norm of each head before it (QK norm,
// Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442) or without. Columns a and b of a row are a pair: a
// and a + rot / 2, or, interleaved, 2 i and 2 i + 1. With z = x, or z = x rstd w and rstd = 1 / sqrt(sum(x^2) / n + eps):
//
//   y_a = z_a cos_a - z_b sin_a      dz_a = dy_a cos_a + dy_b sin_b
//   y_b = z_b cos_b + z_a sin_b      dz_b = dy_b cos_b - dy_a sin_a
//
//   dx = rstd (dz w) - x rstd^3 sum(x dz w) / n      dw = sum over rows of dz x rstd
//
// The columns from rot on are not rotated. Where the tables are of angles, which are equal for both of a pair, the backward is the
// rotation by the opposite angle.
#pragma once

#include "../core/row_op.h"

namespace fusegrad {

struct RotaryFwd {
  template <class A>
  FUSEGRAD_FN static void turn(A& a, A& b, A cos_a, A cos_b, A sin_a, A sin_b) {
    const A z = a;
    a = z * cos_a - b * sin_a;
    b = b * cos_b + z * sin_b;
  }
};
struct RotaryBwd {
  template <class A>
  FUSEGRAD_FN static void turn(A& a, A& b, A cos_a, A cos_b, A sin_a, A sin_b) {
    const A dy = a;
    a = dy * cos_a + b * sin_b;
    b = b * cos_b - dy * sin_a;
  }
};

// Rows are numbered [batch..., seq, heads]: those of one position, which share their angles, are next to each other.
struct RotaryArgs {
  struct Side {  // q, k
    Extent extent;
    int64_t heads;
    View in, out;   // x and y, or dy and dx
    View x, rstd;   // of the norm; x in the backward
    View cos, sin;  // [batch..., seq, heads (stride 0), rot]
    const void* w;  // of Acc<T>; null without a norm
    void* dw;       // of Acc<T>
  };
  Side side[2];
  DType rows, table;
  int64_t positions, cols, rot;
  bool interleaved, backward, normed;
  double eps;
  void* partial = nullptr;  // [2, slices, cols] of Acc<T>
  int64_t slices = 0;

  FUSEGRAD_FN bool sums_columns() const { return side[0].dw || side[1].dw; }
};

}  // namespace fusegrad
