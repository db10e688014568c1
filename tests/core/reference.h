// What any driver must compute, in the plainest way: one row after the other, one column after the other, in double.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "../../csrc/core/row_op.h"

namespace fusegrad::test {

template <class Op>
constexpr bool is_row_op = std::is_base_of_v<RowOp, Op>;
template <class Op>
using Args = std::conditional_t<is_row_op<Op>, RowArgs<Op>, MapArgs<Op>>;

inline double& element(const View& v, const Extent& e, int64_t r, int64_t c) {
  return static_cast<double*>(v.data)[e.offset(v, r) + c * v.col];
}

// The columns are dealt to many sums, so that merge() is used, a wrong identity counts, and rounding errors stay below a driver's.
template <class Sum, class Op, class Row, class In, class At>
void sweep(const Op& op, Row& row, const In& in, const At& at) {
  constexpr int parts = 64;
  Sum sum[parts];
  for (int64_t c = 0; c < at.args.extent.cols; ++c) {
    auto column = in(c);
    op.add(sum[c % parts], row, column);
  }
  for (int i = 1; i < parts; ++i) sum[0].merge(sum[i]);
  if (op.template needs<Sum>(row)) op.finish(row, sum[0], at);
}
template <class... Sum, class... Rest>
void sweeps(List<Sum...>, Rest&&... rest) {
  (sweep<Sum>(rest...), ...);
}

// T is what map() rounds to where it rounds on the way.
template <class T = double, class Op>
void reference(const RowArgs<Op>& args) {
  const Op& op = args.op;
  const Extent& e = args.extent;
  const auto column_sum = [&](int i) { return static_cast<double*>(args.col_out[i]); };
  for (int i = 0; i < Op::col_out; ++i)
    if (column_sum(i)) std::fill_n(column_sum(i), args.sets * e.cols, 0.0);
  for (int64_t r = 0; r < e.rows; ++r) {
    const At<Op, double, double> at{args, r};
    const auto in = [&](int64_t c) {
      In<Op, double> in{};
      in.col = c;
      for (int i = 0; i < Op::in; ++i) in.x[i] = at.x(i, c);
      for (int i = 0; i < Op::params; ++i) in.p[i] = at.p(i, c);
      return in;
    };
    typename Op::template Row<double> row{};
    op.begin(row, at);
    const bool skip = op.skip(row);
    if (!skip) sweeps(typename Op::template Sweeps<double>{}, op, row, in, at);
    if constexpr (Op::out + Op::col_out > 0)
      for (int64_t c = 0; c < e.cols; ++c) {
        Out<Op, double> out{};
        auto column = in(c);
        if (!skip) keep_again<double>(op, row, column), op.template map<T>(row, column, out);
        for (int i = 0; i < Op::out; ++i)
          if (args.out[i].data) element(args.out[i], e, r, c) = out.y[i];
        for (int i = 0; i < Op::col_out; ++i)
          if (column_sum(i)) column_sum(i)[args.set(r) * e.cols + c] += out.col[i];
      }
  }
}

template <class T = double, class Op>
void reference(const MapArgs<Op>& args) {
  const Extent& e = args.extent;
  Op op = args.op;
  op.begin();
  for (int64_t r = 0; r < e.rows; ++r)
    for (int64_t c = 0; c < e.cols; ++c) {
      In<Op, double> in{};
      Out<Op, double> out{};
      for (int i = 0; i < Op::in; ++i) in.x[i] = element(args.in[i], e, r, c);
      in.number = e.offset(args.number, r) + c * args.number.col, in.apart = args.number.col;
      op.map(in, out);
      for (int i = 0; i < Op::out; ++i)
        if (args.out[i].data) element(args.out[i], e, r, c) = out.y[i];
    }
}

// Numbers in [low, high), the same ones in every run and with every standard library.
inline double uniform(double low, double high) {
  static std::mt19937_64 engine(2024);
  return low + (high - low) * double(engine() >> 11) * 0x1p-53;
}
inline int64_t below(int64_t n) { return int64_t(uniform(0, double(n))); }

// What is never empty even for no rows or no columns: an empty one stands for an operand that is not given or not asked for.
using Values = std::vector<double>;
inline Values values(int64_t n, double low, double high) {
  Values v(std::max<int64_t>(1, n));
  for (double& a : v) a = uniform(low, high);
  return v;
}

// The numbers of a numbered op's rows are so far apart that those of the third one pass 2^32.
constexpr int64_t kRowsApart = (int64_t(1) << 31) - 20;

// All operands of a call, dense. They start given and random; a per-row value of which there is only one stands for all rows.
template <class Op>
struct Operands {
  Op op;
  int64_t rows, cols, sets;  // the last: of parameters and of sums over the rows
  Values in[at_least_one(Op::in)], param[at_least_one(Op::params)], scalar_in[at_least_one(Op::scalar_in)];
  Values out[at_least_one(Op::out)], col_out[at_least_one(Op::col_out)], scalar_out[at_least_one(Op::scalar_out)];
  std::vector<int64_t> index[at_least_one(Op::index)];
  double noise = 1;  // how many times the usual error a result may have

  Operands(const Op& op, int64_t rows, int64_t cols, int64_t sets = 1) : op(op), rows(rows), cols(cols), sets(sets) {
    for (auto& v : in) v = values(rows * cols, -2, 2);
    for (auto& v : param) v = values(sets * cols, 0.25, 2);
    for (auto& v : scalar_in) v = values(rows, 0.5, 2);
    for (auto& v : out) v = values(rows * cols, 0, 1);
    for (auto& v : col_out) v = values(sets * cols, 0, 1);
    for (auto& v : scalar_out) v = values(rows, 0, 1);
    for (auto& v : index)
      for (double a : values(rows, 0, double(cols))) v.push_back(int64_t(a));
  }

  template <class T = double>
  void run() {
    Args<Op> args{};
    args.op = op;
    args.extent.rows = rows, args.extent.cols = cols, args.extent.dims = 1, args.extent.size[0] = rows;
    const auto lend = [](View& view, auto& v, int64_t row) {
      if (!v.empty()) view.data = v.data(), view.stride[0] = row;
    };
    for (int i = 0; i < Op::in; ++i) lend(args.in[i], in[i], cols);
    for (int i = 0; i < Op::out; ++i) lend(args.out[i], out[i], cols);
    if constexpr (!is_row_op<Op>) args.number.stride[0] = kRowsApart;
    if constexpr (is_row_op<Op>) {
      args.sets = sets;
      for (int i = 0; i < Op::index; ++i) lend(args.index[i], index[i], index[i].size() > 1);
      for (int i = 0; i < Op::scalar_in; ++i) lend(args.scalar_in[i], scalar_in[i], scalar_in[i].size() > 1);
      for (int i = 0; i < Op::scalar_out; ++i) lend(args.scalar_out[i], scalar_out[i], 1);
      for (int i = 0; i < Op::params; ++i) args.param[i] = param[i].empty() ? nullptr : param[i].data();
      for (int i = 0; i < Op::col_out; ++i) args.col_out[i] = col_out[i].empty() ? nullptr : col_out[i].data();
    }
    reference<T>(args);
  }
};

}  // namespace fusegrad::test
