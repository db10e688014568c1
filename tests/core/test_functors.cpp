// The formulas of an op of each kind, run one column at a time in double: forward against the formula written down naively in long
// double, backward against central differences of the forward under random cotangents. No tensors, no SIMD, no threads.
#include <functional>
#include <string>

#include "../../csrc/ops/cross_entropy.h"
#include "../../csrc/ops/dropout.h"
#include "../../csrc/ops/gated.h"
#include "../../csrc/ops/rms_norm.h"
#include "../../csrc/ops/vocab_parallel_cross_entropy.h"
#include "check.h"
#include "reference.h"

namespace fusegrad::test {
namespace {

using Real = long double;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();

struct Pair {
  Values& value;
  const Values& gradient;
};

// `run` computes the outputs from the inputs; the gradients of the outputs are given, those of the inputs are what is checked.
void check_gradients(const std::string& what, const std::function<void()>& run, const std::vector<Pair>& outputs,
                     const std::vector<Pair>& inputs) {
  constexpr double step = 1e-5;
  const auto loss = [&] {
    run();
    Real sum = 0;
    for (const auto& [y, dy] : outputs)
      for (size_t i = 0; i < y.size(); ++i) sum += Real(y[i]) * dy[i];
    return sum;
  };
  for (size_t n = 0; n < inputs.size(); ++n) {
    const auto& [x, dx] = inputs[n];
    for (size_t i = 0; i < x.size(); ++i) {
      const double here = x[i];
      const double up = here + step, down = here - step;
      x[i] = up;
      const Real high = loss();
      x[i] = down;
      const Real low = loss();
      x[i] = here;
      const double slope = double((high - low) / (up - down));
      CHECK_NEAR(dx[i], slope, 1e-8 * (1 + std::abs(slope)), what, " gradient of input ", n, " at ", i);
    }
  }
  run();
}

void rms_norm(bool weighted, double offset, bool cast_first) {
  using F = RMSNormFwd;
  using B = RMSNormBwd;
  const std::string what = "rms_norm" + std::string(weighted ? " weight" : "") + " offset " + std::to_string(offset);
  const int64_t rows = 3, cols = 7;
  const double eps = 1e-2;
  Operands<F> f({{}, eps, offset, cast_first}, rows, cols);
  if (!weighted) f.param[F::kW].clear();
  f.run();
  for (int64_t r = 0; r < rows; ++r) {
    const double* x = &f.in[F::kX][r * cols];
    Real mean = 0;
    for (int64_t c = 0; c < cols; ++c) mean += Real(x[c]) * x[c] / cols;
    CHECK_NEAR(f.scalar_out[F::kRstd][r], double(1 / std::sqrt(mean + eps)), 1e-14, what, " rstd of row ", r);
    for (int64_t c = 0; c < cols; ++c) {
      const Real v = (weighted ? f.param[F::kW][c] : 1) + offset;
      CHECK_NEAR(f.out[F::kY][r * cols + c], double(x[c] / std::sqrt(mean + eps) * v), 1e-14, what, " y at ", r, ", ", c);
    }
  }
  Operands<B> b({{}, offset}, rows, cols);
  b.in[B::kX] = f.in[F::kX];
  b.param[B::kW] = f.param[F::kW];
  b.scalar_in[B::kRstd] = f.scalar_out[F::kRstd];
  b.run();
  check_gradients(what, [&] { f.run(); }, {{f.out[F::kY], b.in[B::kDy]}},
                  {{f.in[F::kX], b.out[B::kDx]}, {f.param[F::kW], b.col_out[B::kDw]}});
}

// Without eps, y does not change with the scale of a row and dx scales inversely; powers of two make that exact in every bit.
void rms_norm_scales(double scale) {
  using F = RMSNormFwd;
  using B = RMSNormBwd;
  Operands<F> f({{}, 0, 0, false}, 2, 5);
  Operands<B> b({{}, 0}, 2, 5);
  const auto run = [&] {
    f.run();
    b.in[B::kX] = f.in[F::kX], b.param[B::kW] = f.param[F::kW], b.scalar_in[B::kRstd] = f.scalar_out[F::kRstd];
    b.run();
  };
  run();
  const Values y = f.out[F::kY], dx = b.out[B::kDx];
  for (double& x : f.in[F::kX]) x *= scale;
  run();
  for (size_t i = 0; i < y.size(); ++i) {
    CHECK_NEAR(f.out[F::kY][i], y[i], 0, "rms_norm scaled by ", scale, " y at ", i);
    CHECK_NEAR(b.out[B::kDx][i], dx[i] / scale, 0, "rms_norm scaled by ", scale, " dx at ", i);
  }
}

// A row of zeros gives zeros, and cast_first rounds between the two products.
void rms_norm_peculiar() {
  using F = RMSNormFwd;
  Operands<F> f({{}, 1e-6, 0, true}, 1, 3);
  f.in[F::kX] = {0, 0, 0};
  f.run();
  for (double y : f.out[F::kY]) CHECK_NEAR(y, 0.0, 0, "rms_norm of zeros");
  f.in[F::kX] = {1, 2, 3};
  f.run<BFloat16>();
  for (int i = 0; i < 3; ++i) {
    const double normed = (i + 1) * f.scalar_out[F::kRstd][0];
    CHECK_NEAR(f.out[F::kY][i], double(BFloat16(float(normed))) * f.param[F::kW][i], 0, "rms_norm cast_first in bfloat16");
  }
}

void swiglu() {
  using F = GatedFwd<Act::silu>;
  using B = GatedBwd<Act::silu>;
  Operands<F> f({}, 4, 9);
  for (size_t i = 0; i < f.in[F::kG].size(); ++i) f.in[F::kG][i] *= double(i);  // both tails of the sigmoid, too
  f.run();
  for (size_t i = 0; i < f.out[F::kY].size(); ++i) {
    const Real g = f.in[F::kG][i], y = g / (1 + std::exp(-g)) * f.in[F::kU][i];
    CHECK_NEAR(f.out[F::kY][i], double(y), 1e-14 * (1 + std::abs(double(y))), "swiglu y at ", i);
  }
  Operands<B> b({}, 4, 9);
  b.in[B::kG] = f.in[F::kG];
  b.in[B::kU] = f.in[F::kU];
  b.run();
  check_gradients("swiglu", [&] { f.run(); }, {{f.out[F::kY], b.in[B::kDy]}},
                  {{f.in[F::kG], b.out[B::kDg]}, {f.in[F::kU], b.out[B::kDu]}});

  Operands<B> far({}, 1, 2);  // where exp over- and underflows
  far.in[B::kG] = {-2000, 2000}, far.in[B::kU] = {3, 3}, far.in[B::kDy] = {5, 5};
  far.run();
  for (int i = 0; i < 2; ++i) {
    CHECK_NEAR(far.out[B::kDg][i], i * 15.0, 0, "swiglu far out, dg at ", i);
    CHECK_NEAR(far.out[B::kDu][i], i * 10000.0, 0, "swiglu far out, du at ", i);
  }
}

// Each bit of a number and of the seed decides about each bit of the draw as a coin would, and so do the bits beyond the 32nd: a
// mask does not begin anew there.
void random_bits() {
  constexpr int64_t draws = 4096;
  constexpr double limit = draws / 2 + 6 * 32;  // standard deviation: sqrt(draws) / 2 = 32
  const auto check = [&](const std::string& what, const std::function<std::pair<int32_t, int32_t>(int64_t)>& two) {
    int64_t changed[31] = {};
    for (int64_t i = 0; i < draws; ++i) {
      const auto [a, b] = two(i);
      CHECK(a >= 0 && b >= 0, what, " gives a draw of more than 31 bits");
      for (int bit = 0; bit < 31; ++bit) changed[bit] += (a ^ b) >> bit & 1;
    }
    for (int bit = 0; bit < 31; ++bit)
      CHECK(changed[bit] < limit && draws - changed[bit] < limit, what, " changes bit ", bit, " of the draw ", changed[bit],
            " times of ", draws);
  };
  for (uint64_t seed : {uint64_t(0), uint64_t(1), uint64_t(0x123456789abcdef)}) {
    const Random random(seed);
    const auto at = [](int64_t i) { return i * 1048573 % (int64_t(1) << 33); };
    for (int flip = 0; flip < 40; ++flip) {
      check("bit " + std::to_string(flip) + " of the number",
            [&](int64_t i) { return std::pair(random.draw(at(i)), random.draw(at(i) ^ int64_t(1) << flip)); });
      check("bit " + std::to_string(flip) + " of the seed",
            [&](int64_t i) { return std::pair(random.draw(at(i)), Random(seed ^ uint64_t(1) << flip).draw(at(i))); });
    }
    check("the next number", [&](int64_t i) { return std::pair(random.draw(i), random.draw(i + 1)); });
  }
}

void dropout(double p) {
  const std::string what = "dropout of " + std::to_string(p);
  const int64_t seed = 11, rows = 4, cols = 9;
  const Dropout dropout(&seed, p);
  Operands<DropoutMask> mask({{}, dropout}, rows, cols);
  Operands<DropoutFwd> f({{}, dropout}, rows, cols), b({{}, dropout}, rows, cols);
  mask.run(), f.run();
  for (size_t i = 0; i < f.out[0].size(); ++i)
    CHECK_NEAR(f.out[0][i], mask.out[0][i] > 0 ? f.in[0][i] / (1 - p) : 0.0, 1e-15, what, " y at ", i);
  b.run();  // the derivative is the same map
  check_gradients(what, [&] { f.run(); }, {{f.out[0], b.in[0]}}, {{f.in[0], b.out[0]}});

  using F = BiasDropoutAddFwd;
  using B = BiasDropoutAddBwd;
  Operands<F> add({{}, dropout}, rows, cols);
  Operands<B> back({{}, dropout}, rows, cols);
  add.run(), back.run();
  for (size_t i = 0; i < add.out[0].size(); ++i) {
    Dropout here = dropout;
    here.begin();
    const double factor = here.factor<double>(int64_t(i));
    CHECK_NEAR(add.out[F::kY][i], add.in[F::kResidual][i] + (add.in[F::kX][i] + add.param[F::kBias][i % cols]) * factor, 1e-14,
               what, " with bias and residual, y at ", i);
  }
  check_gradients(what + " with bias and residual", [&] { add.run(); }, {{add.out[F::kY], back.in[B::kDy]}},
                  {{add.in[F::kX], back.out[B::kDx]}, {add.param[F::kBias], back.col_out[B::kDbias]}});
}

constexpr int64_t kIgnore = -100;
const std::vector<int64_t> kLabels = {0, 4, kIgnore, 2, 4};

enum class Reduce { none, sum, mean_of_items, mean_of_weights };

// The weights of the classes, or none, and their sum as the host function gives it.
template <class Op>
void give_weights(Operands<Op>& operands, const Values& w) {
  operands.param[Op::kW] = w;
  operands.scalar_in[Op::kWeightSum].clear();
  if (w.empty()) return;
  operands.scalar_in[Op::kWeightSum] = {0};
  for (double a : w) operands.scalar_in[Op::kWeightSum][0] += a;
}

void cross_entropy(const CrossEntropyOptions& o, bool weighted, bool needs_loss, bool needs_lse, Reduce reduce) {
  using F = CrossEntropyFwd;
  using B = CrossEntropyBwd;
  const int64_t rows = int64_t(kLabels.size()), cols = 6;
  std::ostringstream name;
  name << "cross_entropy smoothing " << o.smoothing << " z_loss " << o.z_loss << " softcap " << o.softcap << " scale " << o.scale
       << (weighted ? " weight" : "") << (needs_loss ? " dloss" : "") << (needs_lse ? " dlse" : "") << " reduce " << int(reduce);
  const std::string what = name.str();

  Operands<F> f({{}, o}, rows, cols);
  f.index[F::kTarget] = kLabels;
  give_weights(f, weighted ? values(cols, 0.25, 2) : Values());
  f.run();
  const auto weight = [&](int64_t c) { return Real(weighted ? f.param[F::kW][c] : 1); };
  for (int64_t r = 0; r < rows; ++r) {
    Real loss = 0, lse = 0, w = 0;
    if (kLabels[r] != kIgnore) {
      std::vector<Real> z(cols);
      Real sum = 0;
      for (int64_t c = 0; c < cols; ++c) {
        z[c] = f.in[F::kX][r * cols + c] * Real(o.scale);
        if (o.softcap > 0) z[c] = o.softcap * std::tanh(z[c] / o.softcap);
        sum += std::exp(z[c]);
      }
      lse = std::log(sum), w = weight(kLabels[r]);
      loss = (1 - Real(o.smoothing)) * w * (lse - z[kLabels[r]]) + o.z_loss * lse * lse;
      for (int64_t c = 0; c < cols; ++c) loss += Real(o.smoothing) / cols * weight(c) * (lse - z[c]);
    }
    CHECK_NEAR(f.scalar_out[F::kLoss][r], double(loss), 1e-13, what, " loss of row ", r);
    CHECK_NEAR(f.scalar_out[F::kLse][r], double(lse), 1e-14, what, " lse of row ", r);
    CHECK_NEAR(f.scalar_out[F::kTop][r] + f.scalar_out[F::kLogSum][r], double(lse), 1e-14, what, " top + log_sum of row ", r);
    CHECK_NEAR(f.scalar_out[F::kWeight][r], double(w), 0, what, " weight of row ", r);
  }

  Operands<LossTotal> total({{}, reduce == Reduce::mean_of_items ? 4.0 : 0.0, reduce != Reduce::sum, false}, 1, rows);
  total.scalar_in[LossTotal::kItems].clear();
  const auto run = [&] {
    f.run();
    total.in[LossTotal::kLoss] = f.scalar_out[F::kLoss], total.in[LossTotal::kWeight] = f.scalar_out[F::kWeight];
    total.run();
  };
  run();
  const bool one = reduce != Reduce::none;
  Operands<B> b({{}, o, 0, cols}, rows, cols);
  b.in[B::kX] = f.in[F::kX];
  b.index[B::kTarget] = f.index[F::kTarget];
  b.param[B::kW] = f.param[F::kW];
  b.scalar_in[B::kWeightSum] = f.scalar_in[F::kWeightSum];
  b.scalar_in[B::kTop] = f.scalar_out[F::kTop];
  b.scalar_in[B::kLogSum] = f.scalar_out[F::kLogSum];
  b.scalar_in[B::kDivisor] = one ? total.scalar_out[LossTotal::kDivisor] : Values();
  Values dloss = values(one ? 1 : rows, 0.5, 2), dlse = values(rows, -2, 2);
  b.scalar_in[B::kDLoss] = needs_loss ? dloss : Values();
  b.scalar_in[B::kDLse] = needs_lse ? dlse : Values();
  b.scalar_in[B::kLabelWeight].clear();
  b.run();
  if (!needs_loss) dloss.assign(dloss.size(), 0);
  if (!needs_lse) dlse.assign(dlse.size(), 0);
  Values& loss = one ? total.scalar_out[LossTotal::kTotal] : f.scalar_out[F::kLoss];
  check_gradients(what, run, {{loss, dloss}, {f.scalar_out[F::kLse], dlse}}, {{f.in[F::kX], b.out[B::kDx]}});
  for (int64_t c = 0; c < cols; ++c) CHECK_NEAR(b.out[B::kDx][2 * cols + c], 0.0, 0, what, " dx of the ignored row at ", c);

  for (int64_t first = 0; first < cols; first += 2) {  // the same of a block of classes
    Operands<B> block({{}, o, first, cols}, rows, 2);
    block.index[B::kTarget] = kLabels;
    for (int i = 0; i < B::scalar_in; ++i) block.scalar_in[i] = b.scalar_in[i];
    block.param[B::kW].clear();
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < 2; ++c) block.in[B::kX][r * 2 + c] = b.in[B::kX][r * cols + first + c];
      if (weighted) block.scalar_in[B::kLabelWeight].push_back(kLabels[r] == kIgnore ? 0 : f.param[F::kW][kLabels[r]]);
    }
    if (weighted) block.param[B::kW] = {f.param[F::kW][first], f.param[F::kW][first + 1]};
    block.run();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < 2; ++c)
        CHECK_NEAR(block.out[B::kDx][r * 2 + c], b.out[B::kDx][r * cols + first + c], 1e-14, what, " dx of row ", r, " at ", c,
                   " of a block");
  }
}

void cross_entropy_labels(int64_t wrong) {
  using F = CrossEntropyFwd;
  using B = CrossEntropyBwd;
  const CrossEntropyOptions o{kIgnore, 0.1, 0.01, 0, 1};
  Operands<F> f({{}, o}, 3, 4);
  f.index[F::kTarget] = {1, wrong, 3};
  give_weights(f, values(4, 0.25, 2));
  f.run();
  Operands<B> b({{}, o, 0, 4}, 3, 4);
  b.in[B::kX] = f.in[F::kX], b.index[B::kTarget] = f.index[F::kTarget];
  give_weights(b, f.param[F::kW]);
  b.scalar_in[B::kTop] = f.scalar_out[F::kTop], b.scalar_in[B::kLogSum] = f.scalar_out[F::kLogSum];
  b.scalar_in[B::kLabelWeight].clear();
  b.run();
  for (int64_t r = 0; r < 3; ++r) {
    for (int i = 0; i < F::scalar_out; ++i)
      CHECK(std::isnan(f.scalar_out[i][r]) == (r == 1), "cross_entropy label ", wrong, " output ", i, " of row ", r);
    for (int64_t c = 0; c < 4; ++c)
      CHECK(std::isnan(b.out[B::kDx][r * 4 + c]) == (r == 1), "cross_entropy label ", wrong, " dx at ", r, ", ", c);
  }
  for (int64_t first : {0, 2}) {  // and in each block of the classes
    Operands<B> block({{}, o, first, 4}, 3, 2);
    block.index[B::kTarget] = f.index[F::kTarget];
    block.run();
    for (int64_t i = 0; i < 6; ++i)
      CHECK(std::isnan(block.out[B::kDx][i]) == (i / 2 == 1), "cross_entropy label ", wrong, " dx at ", i, " of a block from ",
            first);
  }
}

// Masked, huge and invalid logits.
void cross_entropy_peculiar() {
  using F = CrossEntropyFwd;
  using B = CrossEntropyBwd;
  const CrossEntropyOptions o{kIgnore, 0, 0, 0, 1};
  Operands<F> f({{}, o}, 4, 3);
  f.index[F::kTarget] = {0, 1, 2, 0};
  give_weights(f, {});
  f.in[F::kX] = {1, -kInf, 0.5, 1e15, 1e15 - 0.5, -1e300, 1, 2, kNaN, -kInf, -kInf, 0};
  f.run();
  const Values& loss = f.scalar_out[F::kLoss];
  CHECK_NEAR(loss[0], std::log(1 + std::exp(-0.5)), 1e-15, "cross_entropy with a masked class");
  CHECK_NEAR(loss[1], 0.5 + std::log(1 + std::exp(-0.5)), 1e-15, "cross_entropy of huge logits keeps the digits of log_sum");
  CHECK_NEAR(loss[2], kNaN, 0, "cross_entropy of NaN");
  CHECK_NEAR(loss[3], kInf, 0, "cross_entropy of a masked label");
  Operands<B> b({{}, o, 0, 3}, 2, 3);
  b.in[B::kX].assign(f.in[F::kX].begin(), f.in[F::kX].begin() + 6), b.index[B::kTarget] = {0, 1};
  give_weights(b, {});
  b.scalar_in[B::kTop] = f.scalar_out[F::kTop], b.scalar_in[B::kLogSum] = f.scalar_out[F::kLogSum];
  b.scalar_in[B::kDLoss] = {1}, b.scalar_in[B::kDivisor].clear(), b.scalar_in[B::kDLse].clear();
  b.scalar_in[B::kLabelWeight].clear();
  b.run();
  const double p = 1 / (1 + std::exp(-0.5));
  const Values want = {p - 1, 0, 1 - p, p, -p, 0};
  for (size_t i = 0; i < want.size(); ++i) CHECK_NEAR(b.out[B::kDx][i], want[i], 1e-15, "cross_entropy peculiar dx at ", i);
  Operands<B> masked({{}, o, 1, 3}, 1, 1);  // a block without a finite logit
  masked.in[B::kX] = {-kInf}, masked.index[B::kTarget] = {0};
  for (int i = 0; i < B::scalar_in; ++i) masked.scalar_in[i] = b.scalar_in[i];
  masked.run();
  CHECK_NEAR(masked.out[B::kDx][0], 0.0, 0, "cross_entropy dx of a masked block");
}

// The classes in shards: what their sums make of the loss is that of all classes at once. (A shard's gradient: above.)
void vocab_parallel(const CrossEntropyOptions& o) {
  using F = VocabParallelCrossEntropyFwd;
  const int64_t rows = int64_t(kLabels.size()), classes = 6, cols = 2;
  Operands<CrossEntropyFwd> whole({{}, o}, rows, classes);
  whole.index[0] = kLabels;
  give_weights(whole, {});
  whole.in[0][0] = whole.in[0][1] = -kInf;  // a shard without a logit
  whole.run();

  std::vector<Operands<F>> shards;
  for (int64_t first = 0; first < classes; first += cols) {
    F op{};
    op.o = o, op.first = first, op.classes = classes;
    Operands<F>& f = shards.emplace_back(op, rows, cols);
    f.index[0] = kLabels;
    f.param[0].clear();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) f.in[0][r * cols + c] = whole.in[0][r * classes + first + c];
    f.run();
  }
  for (int64_t r = 0; r < rows; ++r) {
    double top = -kInf, mass = 0, below = 0, label = 0;
    for (const auto& f : shards) top = std::max(top, f.scalar_out[F::kTop][r]);
    for (const auto& f : shards) {
      const double apart = top - f.scalar_out[F::kTop][r];
      mass += f.scalar_out[F::kMass][r] * std::exp(-apart), label += f.scalar_out[F::kLabel][r];
      below += f.scalar_out[F::kBelow][r] + double(cols) * apart;
    }
    const double log_sum = kLabels[r] == kIgnore ? 0 : std::log(mass), lse = top + log_sum;
    double loss = (1 - o.smoothing) * ((top - label) + log_sum) + o.z_loss * lse * lse;
    if (o.smoothing != 0 && kLabels[r] != kIgnore) loss += o.smoothing / classes * (below + classes * log_sum);
    CHECK_NEAR(loss, whole.scalar_out[CrossEntropyFwd::kLoss][r], 1e-13, "vocab_parallel loss of row ", r);
    CHECK_NEAR(lse, whole.scalar_out[CrossEntropyFwd::kLse][r], 1e-14, "vocab_parallel lse of row ", r);
  }
}

// num_items is what a tensor says, over the number items; 0 stands for none.
void loss_total(double items, double num_items, bool mean, bool empty_is_zero, const Values& loss, const Values& weight) {
  using L = LossTotal;
  std::ostringstream name;
  name << "LossTotal items " << items << " num_items " << num_items << (mean ? " mean" : " sum")
       << (empty_is_zero ? " empty_is_zero" : "") << " of " << loss.size();
  const int64_t n = int64_t(loss.size());
  Operands<L> f({{}, items, mean, empty_is_zero}, 1, n);
  f.in[L::kLoss] = loss, f.in[L::kWeight] = weight;
  if (n == 0) f.in[L::kLoss] = f.in[L::kWeight] = {0};
  f.scalar_in[L::kItems] = num_items > 0 ? Values{num_items} : Values();
  f.run();
  Real sum = 0, weights = 0;
  for (int64_t i = 0; i < n; ++i) sum += loss[i], weights += weight[i];
  const bool zero = weights == 0 && empty_is_zero;
  const Real over = num_items > 0 ? Real(num_items) : items > 0 ? Real(items) : weights;
  const Real total = zero ? 0 : mean ? sum / over : sum;
  CHECK_NEAR(f.scalar_out[L::kTotal][0], double(total), 1e-14, name.str());
  if (zero || std::isnan(double(total))) return;
  // What the backward divides by is what the forward divided by.
  CHECK(f.scalar_out[L::kDivisor][0] > 0, name.str(), " divisor");
  CHECK_NEAR(f.scalar_out[L::kTotal][0] * f.scalar_out[L::kDivisor][0], double(sum), 1e-13, name.str(), " divisor");
}

template <class S>
void numeric() {
  const S nan = std::numeric_limits<S>::quiet_NaN();
  CHECK(larger(S(1), S(2)) == 2 && larger(S(2), S(1)) == 2 && larger(S(-1), S(-2)) == -1, "larger");
  CHECK(std::isnan(larger(nan, S(1))) && std::isnan(larger(S(1), nan)), "larger of NaN");
  CHECK(select(true, S(1), S(2)) == 1 && select(false, S(1), S(2)) == 2, "select");
  CHECK(fma(S(2), S(3), S(4)) == 10 && square(S(3)) == 9 && rsqrt(S(4)) == S(0.5), "fma, square, rsqrt");
  CHECK(exp(S(0)) == 1 && log(S(1)) == 0 && tanh(S(0)) == 0, "exp, log, tanh");
  CHECK(sigmoid(S(0)) == S(0.5) && sigmoid(S(-2000)) == 0 && sigmoid(S(2000)) == 1, "sigmoid");
  CHECK(rounded<S>(S(0.1)) == S(0.1) && rounded<Half>(S(1 + 0x1p-12)) == 1 && rounded<BFloat16>(S(1 + 0x1p-9)) == 1, "rounded");
  CHECK(lane<S>(0) && !lane<S>(1) && !lane<S>(-1), "lane");
}

void addresses() {
  Extent e;
  e.dims = 3, e.size[0] = 2, e.size[1] = 3, e.size[2] = 5, e.rows = 30;
  View v;
  v.stride[0] = 7, v.stride[1] = 100, v.stride[2] = 1000;
  for (int64_t r = 0; r < e.rows; ++r) CHECK(e.offset(v, r) == r / 15 * 7 + r / 5 % 3 * 100 + r % 5 * 1000, "offset of row ", r);
}

void type_pairs() {
  const auto sizes = [](DType rows, DType params) {
    int64_t found = 0;
    for_types<true>(rows, params, [&](auto t, auto p) { found = int64_t(10 * sizeof(t) + sizeof(p)); });
    return found;
  };
  CHECK(sizes(DType::f64, DType::f64) == 88 && sizes(DType::f32, DType::f32) == 44, "pairs of wide types");
  CHECK(sizes(DType::f16, DType::f16) == 22 && sizes(DType::bf16, DType::bf16) == 22, "pairs of 16-bit types");
  CHECK(sizes(DType::f16, DType::f32) == 24 && sizes(DType::bf16, DType::f32) == 24, "float parameters of 16-bit rows");
}

}  // namespace
}  // namespace fusegrad::test

int main() {
  using namespace fusegrad;
  using namespace fusegrad::test;
  numeric<float>();
  numeric<double>();
  addresses();
  type_pairs();

  for (double offset : {0.0, 1.0})
    for (bool cast_first : {false, true}) {
      rms_norm(true, offset, cast_first);
      rms_norm(false, offset, cast_first);
    }
  rms_norm_scales(0x1p-500);
  rms_norm_scales(0x1p+500);
  rms_norm_peculiar();

  swiglu();
  random_bits();
  for (double p : {0.0, 0.25, 1.0}) dropout(p);

  for (double smoothing : {0.0, 0.1, 1.0})
    for (double z_loss : {0.0, 0.01})
      for (double softcap : {0.0, 1.5})
        for (double scale : {1.0, 0.5})
          for (bool weighted : {false, true}) {
            const CrossEntropyOptions o{kIgnore, smoothing, z_loss, softcap, scale};
            if (!weighted) vocab_parallel(o);
            cross_entropy(o, weighted, true, false, Reduce::none);
            cross_entropy(o, weighted, false, true, Reduce::none);
            cross_entropy(o, weighted, true, true, Reduce::sum);
            cross_entropy(o, weighted, true, true, Reduce::mean_of_items);
            cross_entropy(o, weighted, true, false, Reduce::mean_of_weights);
          }
  for (int64_t wrong : {int64_t(-1), int64_t(4), std::numeric_limits<int64_t>::max()}) cross_entropy_labels(wrong);
  cross_entropy_peculiar();
  for (double items : {0.0, 3.0})
    for (double num_items : {0.0, 5.0})
      for (bool mean : {false, true})
        for (bool empty_is_zero : {false, true}) {
          loss_total(items, num_items, mean, empty_is_zero, {1, 2, 4}, {0.5, 1, 0.25});
          loss_total(items, num_items, mean, empty_is_zero, {0, 0}, {0, 0});
          loss_total(items, num_items, mean, empty_is_zero, {}, {});
        }
  return result("test_functors");
}
