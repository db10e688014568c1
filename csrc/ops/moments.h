// Mean and variance by two sweeps: the second one is about the mean that the first one found, rounded as it is, and also says by
// how much that was off. No digit is lost to a mean that is large beside the deviations, if what it lost when it was rounded
// itself is taken from each deviation too.
#pragma once

#include "../core/row_op.h"

namespace fusegrad {

template <class A>
struct Mean {
  A n{0}, nx{0};  // of the items, and of items times value
  FUSEGRAD_FN void merge(const Mean& o) { n = n + o.n, nx = nx + o.nx; }
};

template <class A>
struct Spread {
  A d{0}, dd{0};  // of d = x - mean
  FUSEGRAD_FN void merge(const Spread& o) { d = d + o.d, dd = dd + o.dd; }

  FUSEGRAD_FN void add(A x, A mean) {
    const A delta = x - mean;
    d = d + delta;
    dd = fma(delta, delta, dd);
  }
  // Of n items: corrects the mean, which is then mean + lost, and returns the sum of the squares about it. No infinity is taken
  // from another one.
  FUSEGRAD_FN A about(A& mean, A& lost, A n) const {
    const A off = d / n, excess = d * off, found = mean + off;
    lost = off - (found - mean);
    mean = found;
    return excess < dd ? dd - excess : dd;
  }
};

}  // namespace fusegrad
