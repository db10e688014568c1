// Cross entropy whose C classes are cut into shards, one per process, each with the columns [first, first + cols) of the logits.
// Of a row of one shard, after the sweeps of cross_entropy.h:
//
//   top_i = max(z)     mass_i = sum(exp(z - top_i))     below_i = sum(top_i - z)     z_t, where the shard has the label (else 0)
//
// and of all together, by two reductions over the processes (a maximum, then sums):
//
//   top = max(top_i)     log_sum = log sum(mass_i exp(top_i - top))     below = sum(below_i + cols (top - top_i))
//   loss = (1 - smoothing) ((top - z_t) + log_sum) + smoothing / C (below + C log_sum) + z_loss (top + log_sum)^2
//
// The gradient of a shard's logits is that of cross_entropy.h, made by CrossEntropyBwd; it needs no other shard.
#pragma once

#include "cross_entropy.h"

namespace fusegrad {

struct VocabParallelCrossEntropyFwd : CrossEntropyFwd {
  static constexpr int in = 1, params = 1, index = 1, scalar_out = 4;
  enum { kX, kW = 0, kTarget = 0, kTop = 0, kMass, kBelow, kLabel };
  int64_t first, classes;

  template <class S, class At>
  FUSEGRAD_FN void begin(Row<S>& row, const At& at) const {
    const int64_t label = at.index(kTarget);
    const bool known = label >= 0 && label < classes;
    row.target = label - first;
    row.skip = label == o.ignore_index || !known;
    const bool here = !row.skip && row.target >= 0 && row.target < at.args.extent.cols;
    row.z_t = here ? o.z(at.x(kX, row.target)) : S(0);
    if (row.skip) {
      const S value = label == o.ignore_index ? S(0) : std::numeric_limits<S>::quiet_NaN();
      for (int i = 0; i < scalar_out; ++i) at.put(i, value);
    }
  }
  using CrossEntropyFwd::finish;  // of the first sweep
  template <class S, class At>
  FUSEGRAD_FN void finish(Row<S>& row, const Mass<S>& sum, const At& at) const {
    // A shard without a finite logit is no part of the sum; one whose top is NaN makes it NaN.
    const bool empty = row.top == -std::numeric_limits<S>::infinity();
    at.put(kTop, row.top);
    at.put(kMass, empty ? S(0) : sum.e);
    at.put(kBelow, empty ? S(0) : sum.below);
    at.put(kLabel, row.z_t);
  }
};

}  // namespace fusegrad
