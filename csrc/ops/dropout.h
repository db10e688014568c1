// Dropout (Srivastava et al. 2014, JMLR 15), with m = 0 for an element that is dropped and 1 / (1 - p) for one that is kept:
//
//   y = x m                       dx = dy m
//   y = residual + (x + bias) m   dx = dy m      dbias = sum over rows of dy m      dresidual = dy
//
// m is computed from the seed in each direction (core/rng.h) and never stored.
#pragma once

#include "../core/rng.h"
#include "../core/row_op.h"

namespace fusegrad {

// dx of dy is the same map.
struct DropoutFwd : MapOp {
  static constexpr int in = 1, out = 1;
  static constexpr bool numbered = true;
  enum { kX, kY = 0 };
  Dropout dropout;

  FUSEGRAD_FN void begin() { dropout.begin(); }
  template <class A>
  FUSEGRAD_FN void map(const In<DropoutFwd, A>& in, Out<DropoutFwd, A>& out) const {
    out.y[kY] = in.x[kX] * dropout.factor<A>(in.number, in.apart);
  }
};

// 1 for an element that is kept, 0 for one that is not.
struct DropoutMask : MapOp {
  static constexpr int in = 0, out = 1;
  static constexpr bool numbered = true;
  Dropout dropout;

  FUSEGRAD_FN void begin() { dropout.begin(); }
  template <class A>
  FUSEGRAD_FN void map(const In<DropoutMask, A>& in, Out<DropoutMask, A>& out) const {
    const A factor = dropout.factor<A>(in.number, in.apart);
    out.y[0] = select(factor > A(0), A(1), A(0));
  }
};

// What dropout is in a row op: elements are numbered through the rows.
struct DroppedRow {
  Dropout dropout;
  int64_t first;  // number of the row's first element

  template <class At>
  FUSEGRAD_FN void begin(const Dropout& of, const At& at) {
    dropout = of;
    dropout.begin();
    first = at.r * at.args.extent.cols;
  }
  template <class A>
  FUSEGRAD_FN A factor(int64_t col) const {
    return dropout.factor<A>(first + col);
  }
};

struct BiasDropoutAddFwd : RowOp {
  static constexpr int in = 2, params = 1, out = 1;
  static constexpr double absent = 0;
  enum { kX, kResidual, kBias = 0, kY = 0 };
  Dropout dropout;

  template <class S>
  using Row = DroppedRow;
  template <class A>
  using Sweeps = List<>;

  template <class At>
  FUSEGRAD_FN void begin(DroppedRow& row, const At& at) const {
    row.begin(dropout, at);
  }
  template <class T, class A>
  FUSEGRAD_FN void map(const DroppedRow& row, const In<BiasDropoutAddFwd, A>& in, Out<BiasDropoutAddFwd, A>& out) const {
    out.y[kY] = fma(in.x[kX] + in.p[kBias], row.factor<A>(in.col), in.x[kResidual]);
  }
};

struct BiasDropoutAddBwd : RowOp {
  static constexpr int in = 1, params = 1, out = 1, col_out = 1;
  enum { kDy, kBias = 0, kDx = 0, kDbias = 0 };  // of the bias its type
  Dropout dropout;

  template <class S>
  using Row = DroppedRow;
  template <class A>
  using Sweeps = List<>;

  template <class At>
  FUSEGRAD_FN void begin(DroppedRow& row, const At& at) const {
    row.begin(dropout, at);
  }
  template <class T, class A>
  FUSEGRAD_FN void map(const DroppedRow& row, const In<BiasDropoutAddBwd, A>& in, Out<BiasDropoutAddBwd, A>& out) const {
    out.y[kDx] = out.col[kDbias] = in.x[kDy] * row.factor<A>(in.col);
  }
};

}  // namespace fusegrad
