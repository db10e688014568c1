// The CPU drivers on raw memory, compared with the plain loop of reference.h: an op of each kind, every pair of types, lengths
// around the width of a vector and of a block, columns and rows wherever they may lie, operands that are absent. Each operand has a
// heap block of exactly the elements its view spans, filled with NaN where no element lies, so that a driver that reads beyond or
// between its elements computes NaN, one that writes there is found out, and AddressSanitizer sees any access outside.
//
// usage: test_drivers default|avx2|avx512
#include <ATen/Parallel.h>

#include <cstring>
#include <memory>
#include <string>

#include "../../csrc/ops/bias_act.h"
#include "../../csrc/ops/cross_entropy.h"
#include "../../csrc/ops/dropout.h"
#include "../../csrc/ops/gated.h"
#include "../../csrc/ops/l2_norm.h"
#include "../../csrc/ops/pointwise.h"
#include "../../csrc/ops/rms_norm.h"
#include "../../csrc/ops/softmax.h"
#include "../../csrc/ops/vocab_parallel_cross_entropy.h"
#include "check.h"
#include "in_sets.h"
#include "reference.h"
#include "two_results.h"

namespace fusegrad::test {
namespace {

constexpr int kInt64 = 4;  // beside the numbers of DType
constexpr int64_t kBytes[] = {8, 4, 2, 2, 8};
constexpr double kEps[] = {0x1p-52, 0x1p-23, 0x1p-10, 0x1p-7}, kSmallest[] = {0x1p-1074, 0x1p-149, 0x1p-24, 0x1p-133};
constexpr const char* kTypes[] = {"f64", "f32", "f16", "bf16"};

// How the columns and the rows of an operand lie. The first two are for outputs as well.
enum Layout { kDense, kGaps, kEverySecond, kTransposed, kOneColumn, kOneRow, kLayouts };
constexpr const char* kLayoutNames[] = {"dense", "gaps", "every second", "transposed", "one column", "one row"};

View view_of(Layout layout, const Extent& e, int64_t cols, bool swap) {
  const int64_t last = e.size[e.dims - 1];
  View v;
  v.stride[0] = v.stride[e.dims - 1] = 1;
  if (layout == kTransposed) {  // of two dimensions: [N, C, H] with its columns in the middle
    v.col = last;
    if (e.dims > 1) v.stride[0] = cols * last;
    return v;
  }
  v.col = layout == kEverySecond ? 2 : layout == kOneColumn ? 0 : 1;
  const int64_t row[kLayouts] = {cols, cols + 3, 2 * cols + 1, 0, 1, 0};
  v.stride[0] = v.stride[e.dims - 1] = row[layout];
  if (e.dims > 1) v.stride[swap] = row[layout] * e.size[!swap];
  return v;
}

class Buffer {
 public:
  View view;

  Buffer(int type, const View& view, const Extent& e, int64_t cols) : view(view), type(type), e(e), cols(cols) {
    lead = below(2);  // so that the first element is not always aligned to 16 bytes
    count = e.rows * cols > 0 ? lead + 1 + (cols - 1) * view.col : lead;
    for (int d = 0; d < e.dims && e.rows * cols > 0; ++d) count += (e.size[d] - 1) * view.stride[d];
    memory.reset(new char[count * kBytes[type]]);
    this->view.data = at(0);
    clear();
  }

  void clear() { std::memset(memory.get(), 0xff, count * kBytes[type]); }  // NaN in every type

  // Writes the values and gives back what they have become: rounded, and equal where elements lie on each other.
  template <class V>
  void exchange(V& values) {
    for (int64_t r = 0; r < e.rows; ++r)
      for (int64_t c = 0; c < cols; ++c) set(place(r, c), double(values[r * cols + c]));
    for (int64_t r = 0; r < e.rows; ++r)
      for (int64_t c = 0; c < cols; ++c) values[r * cols + c] = get(place(r, c));
  }

  // want: [rows, cols]; size: what passes on the way to a small difference, too.
  void compare(const Values& want, double eps, double noise, double size, const std::string& what) const {
    double largest = size;
    for (double w : want)
      if (std::isfinite(w)) largest = std::max(largest, std::abs(w));
    std::vector<bool> mine(count);
    for (int64_t r = 0; r < e.rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const double w = want[r * cols + c];
        mine[lead + place(r, c)] = true;
        CHECK_NEAR(get(place(r, c)), w, 2 * eps * std::abs(w) + noise * largest + kSmallest[type], what, " at ", r, ", ", c);
      }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t b = 0; b < kBytes[type] && !mine[i]; ++b)
        CHECK(uint8_t(memory[i * kBytes[type] + b]) == 0xff, what, " writes between its elements, at ", i - lead);
  }

  std::string bytes() const { return {memory.get(), size_t(count * kBytes[type])}; }

 private:
  int type;
  Extent e;
  int64_t cols, lead, count;
  std::unique_ptr<char[]> memory;

  void* at(int64_t i) const { return memory.get() + (lead + i) * kBytes[type]; }
  int64_t place(int64_t r, int64_t c) const { return e.offset(view, r) + c * view.col; }
  double get(int64_t i) const {
    if (type == kInt64) return double(*static_cast<int64_t*>(at(i)));
    double value = 0;
    for_types<false>(DType(type), DType(type), [&](auto t, auto) { value = double(*static_cast<decltype(t)*>(at(i))); });
    return value;
  }
  void set(int64_t i, double value) {
    if (type == kInt64) {
      *static_cast<int64_t*>(at(i)) = int64_t(value);
      return;
    }
    for_types<false>(DType(type), DType(type), [&](auto t, auto) { *static_cast<decltype(t)*>(at(i)) = decltype(t)(value); });
  }
};

template <class Op>
class Case {
 public:
  // The first input lies as told, the others anyhow.
  template <class Adjust>
  Case(const char* name, const Op& op, const Adjust& adjust, DType t, DType p, const Extent& e, Layout first)
      : want(op, e.rows, e.cols, sets_of(e)), e(e), t(t), p(p) {
    adjust(want);
    args.op = op, args.extent = e, args.rows = t;
    what << name << " " << kTypes[int(t)] << (t == p ? "" : " with f32 parameters") << " [" << e.rows << ", " << e.cols << "]"
         << (e.dims > 1 ? " rows in two dimensions" : "") << (want.sets > 1 ? " parameters of " + std::to_string(want.sets) : "")
         << ":";
    for (int i = 0; i < Op::in; ++i) lend(args.in[i], want.in[i], int(t), i == 0 ? first : Layout(below(kLayouts)), e.cols);
    for (int i = 0; i < Op::out; ++i) ask(args.out[i], want.out[i], int(t), e.cols);
    if constexpr (is_row_op<Op>)
      per_row_and_column_operands();
    else
      args.number.stride[e.dims - 1] = kRowsApart, args.number.stride[0] = e.dims > 1 ? kRowsApart * e.size[1] : kRowsApart;
  }

  void run(const Kernel<Args<Op>>& kernel) {
    for_types<false>(t, t, [&](auto rounded_to, auto) { want.template run<decltype(rounded_to)>(); });
    std::unique_ptr<char[]> partial;
    if constexpr (is_row_op<Op>)
      if (args.sums_columns()) {
        args.slices = kernel.slices(args);
        const int64_t bytes = Op::col_out * args.slices * args.sets * e.cols * kBytes[wide()];
        partial.reset(new char[bytes]);
        std::memset(partial.get(), 0xff, bytes);
        args.partial = partial.get();
      }
    std::string bytes[2];
    for (int run = 0; run < 2; ++run) {
      at::set_num_threads(run == 0 ? 1 : 3);
      for (Result& result : results) result.buffer.clear();
      kernel.launch(args, nullptr);
      for (Result& result : results) bytes[run] += result.buffer.bytes();
    }
    CHECK(bytes[0] == bytes[1], what.str(), " not the same bits for any number of threads");
    // Equal terms are rounded alike: the errors of each lane add up along a row, and those of each column over the rows.
    const double noise = want.noise * (64 + double(std::max(e.cols, e.rows)) / 16) * kEps[wide()];
    for (const Result& result : results)
      result.buffer.compare(*result.want, result.eps, noise, result.size,
                            what.str() + ", output " + std::to_string(&result - &results[0]));
  }

 private:
  struct Result {
    Buffer buffer;
    const Values* want;
    double eps;
    double size = 1;  // of the inputs; of a sum over rows of either sign, the square root of their number
  };
  Operands<Op> want;  // and what the driver is given
  Args<Op> args{};
  Extent e;
  DType t, p;
  std::ostringstream what;
  std::vector<Buffer> inputs;
  std::vector<Result> results;

  // Sometimes rows have parameters, or sums, in turns.
  static int64_t sets_of(const Extent& e) {
    const bool many = Op::in_sets && e.rows > 0 && below(2);
    return !many ? 1 : e.rows % 10 == 0 ? 10 : e.rows;
  }

  int wide() const { return int(t == DType::f64 ? DType::f64 : DType::f32); }
  static bool absent() { return below(4) == 0; }

  template <class V>
  void lend(View& view, V& values, int type, Layout layout, int64_t cols) {
    what << " " << kLayoutNames[layout];
    const bool wide = view.wide;
    inputs.emplace_back(type, view_of(layout, e, cols, below(2)), e, cols);
    inputs.back().exchange(values);
    view = inputs.back().view;
    view.wide = wide;
  }
  void ask(View& view, Values& values, int type, int64_t cols) {
    if (absent()) return values.clear();
    const bool wide = view.wide;
    results.push_back({{type, view_of(Layout(below(2)), e, cols, below(2)), e, cols}, &values, type > 1 ? kEps[type] : 0});
    view = results.back().buffer.view;
    view.wide = wide;
  }

  void per_row_and_column_operands() {
    args.params = p;
    for (int i = 0; i < Op::index; ++i) {
      for (auto& label : want.index[i])
        if (below(8) == 0) label = below(2) ? -100 : e.cols;  // ignored, and no class at all
      lend(args.index[i], want.index[i], kInt64, Layout(below(kLayouts)), 1);
    }
    for (int i = 0; i < Op::scalar_in; ++i) {
      if (absent()) {
        want.scalar_in[i].clear();
        continue;
      }
      args.scalar_in[i].wide = below(2);
      lend(args.scalar_in[i], want.scalar_in[i], args.scalar_in[i].wide ? wide() : int(t), Layout(below(kLayouts)), 1);
    }
    for (int i = 0; i < Op::scalar_out; ++i) {
      args.scalar_out[i].wide = below(2);
      ask(args.scalar_out[i], want.scalar_out[i], args.scalar_out[i].wide ? wide() : int(t), 1);
    }
    args.sets = want.sets;
    Extent one;  // what has one value per column is one dense row, or one for each set
    one.rows = one.size[0] = want.sets, one.dims = 1;
    View dense;
    dense.stride[0] = e.cols;
    for (int i = 0; i < Op::params; ++i) {
      if (absent()) {
        want.param[i].clear();
        continue;
      }
      inputs.emplace_back(int(p), dense, one, e.cols);
      inputs.back().exchange(want.param[i]);
      args.param[i] = inputs.back().view.data;
    }
    for (int i = 0; i < Op::col_out; ++i) {
      if (absent()) {
        want.col_out[i].clear();
        continue;
      }
      const int type = i < Op::col_out - Op::wide_cols ? int(p) : wide();
      results.push_back(
          {{type, dense, one, e.cols}, &want.col_out[i], type > 1 ? kEps[type] : 0, std::sqrt(std::max(1.0, double(e.rows)))});
      args.col_out[i] = results.back().buffer.view.data;
    }
  }
};

int64_t cases = 0;

// `adjust` may change the random operands, where a formula is not defined for all of them.
template <Variant variant, class Op, class Adjust = void (*)(Operands<Op>&)>
void drive(const char* name, const Op& op, const Adjust& adjust = [](Operands<Op>&) {}) {
  constexpr std::pair<DType, DType> types[] = {{DType::f64, DType::f64},   {DType::f32, DType::f32}, {DType::f16, DType::f16},
                                               {DType::bf16, DType::bf16}, {DType::f16, DType::f32}, {DType::bf16, DType::f32}};
  for (const auto& [t, p] : types)
    for (int64_t cols : {0, 1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 127, 130, 1000, 4097})
      for (int64_t rows : {0, 1, 3, 17, 70, 1030}) {  // the last: more rows than slices of the sums over them
        if (rows * cols > 70 * 4097 || (t != p && Op::params == 0)) continue;
        const bool large = rows * cols > 16384;  // for more than one thread; takes its time, so not in every layout
        for (int layout = large ? int(below(kLayouts)) : 0; layout < kLayouts; layout += large ? kLayouts : 1) {
          Extent e;
          e.rows = rows, e.cols = cols, e.dims = 1 + int(below(2));
          const int64_t inner = rows % 10 == 0 ? 5 : rows % 3 == 0 ? 3 : 1;
          e.size[0] = e.dims == 1 ? rows : rows / inner, e.size[1] = inner;
          Case<Op>(name, op, adjust, t, p, e, Layout(layout)).run(Kernels<Args<Op>, variant>::entry);
          ++cases;
        }
      }
}

// One line for each path through an op's options. Mixed inputs, sums of map ops and rows across are not among them: the table has
// them.
template <Variant variant>
void drive_all() {
  drive<variant>("RMSNormFwd", RMSNormFwd{{}, 1e-5, 0, false});
  drive<variant>("RMSNormFwd cast_first", RMSNormFwd{{}, 1e-5, 1, true});
  drive<variant>("RMSNormBwd", RMSNormBwd{{}, 1});
  static const int64_t seed = 5;
  drive<variant>("DropoutFwd", DropoutFwd{{}, Dropout(&seed, 0.25)});
  drive<variant>("DropoutFwd of 1", DropoutFwd{{}, Dropout(&seed, 1)});
  drive<variant>("DropoutMask", DropoutMask{{}, Dropout(&seed, 0.75)});
  drive<variant>("BiasDropoutAddFwd", BiasDropoutAddFwd{{}, Dropout(&seed, 0.25)});
  drive<variant>("BiasDropoutAddBwd", BiasDropoutAddBwd{{}, Dropout(&seed, 0.9)});  // few terms: equal ones add up their errors
  drive<variant>("GatedFwd", GatedFwd<Act::silu>{});
#ifndef FUSEGRAD_SANITIZE  // their many functions take minutes to compile there; the others take the same paths of the drivers
  drive<variant>("GatedBwd", GatedBwd<Act::silu>{});
  drive<variant>("cube backward", GradientAt<Act::cube>{});
  for (Act act : {Act::leaky_relu, Act::gelu}) {
    const ScaledAct f{{act, 0.1}, 0.5};
    drive<variant>("ActFwd", ActFwd{{}, f});
    drive<variant>("ActBwd", ActBwd{{}, f});
    drive<variant>("BiasActFwd", BiasActFwd{{{}, f}});
    drive<variant>("BiasActBwd", BiasActBwd{{{}, f}});
    drive<variant>("RowBiasActBwd", RowBiasActBwd{{{}, f}});
  }
#endif
  drive<variant>("ScaleFwd", ScaleFwd{{}, -0.3});
  drive<variant>("exp", ValueOf<Act::exp>{});
  drive<variant>("TwoResults", TwoResults{});
  drive<variant>("CrossEntropyFwd", CrossEntropyFwd{{}, {-100, 0, 0, 0, 1}});
  drive<variant>("CrossEntropyFwd all options", CrossEntropyFwd{{}, {-100, 0.1, 0.01, 3, 0.5}});
  drive<variant>("CrossEntropyBwd", CrossEntropyBwd{{}, {-100, 0, 0, 0, 1}, 0, 5000});
  drive<variant>("CrossEntropyBwd all options", CrossEntropyBwd{{}, {-100, 0.1, 0.01, 3, 0.5}, 1, 5000});
  for (double some : {0.0, 0.1}) {
    VocabParallelCrossEntropyFwd fwd{};
    fwd.o = {-100, some, some, 30 * some, 1 - some};
    fwd.first = 1, fwd.classes = 5000;  // one shard of several
    drive<variant>("VocabParallelCrossEntropyFwd", fwd, [](Operands<VocabParallelCrossEntropyFwd>& o) {
      o.noise = 16;  // below is a plain sum: it has the rounding errors of all columns
    });
  }
  drive<variant>("LossTotal", LossTotal{{}, 0, true, false}, [](Operands<LossTotal>& o) {
    for (double& weight : o.in[LossTotal::kWeight]) weight = std::abs(weight);
  });
  drive<variant>("InSets", InSets{});
  drive<variant>("SoftmaxFwd of logarithms", SoftmaxFwd{{}, SoftmaxKind::log, Mask::none, false, 1, 1});
  drive<variant>("NormFwd", NormFwd{});
  for (double scale : {1.0, 1e30, 1e-30})  // the last two need another sweep in float32
    drive<variant>("NormalizeFwd", NormalizeFwd{{}, 1e-40}, [scale](Operands<NormalizeFwd>& o) {
      for (double& a : o.in[NormalizeFwd::kX]) a *= scale;
    });
}

}  // namespace
}  // namespace fusegrad::test

int main(int argc, char** argv) {
  using namespace fusegrad;
  using namespace fusegrad::test;
  const std::string variant = argc > 1 ? argv[1] : "";
#ifdef FUSEGRAD_HAS_DEFAULT
  if (variant == "default") drive_all<kDefault>();
#endif
#ifdef FUSEGRAD_HAS_AVX2
  if (variant == "avx2") drive_all<kAvx2>();
#endif
#ifdef FUSEGRAD_HAS_AVX512
  if (variant == "avx512") drive_all<kAvx512>();
#endif
  std::cout << cases << " cases. ";
  return result(("test_drivers " + variant).c_str());
}
