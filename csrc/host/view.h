// From tensors to views: the only place where a Tensor becomes a pointer. Handing a tensor to a Frame is the check.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../core/row_op.h"

namespace fusegrad {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline bool given(const OptTensor& t) { return t.has_value() && t->defined(); }

// For the result of a map op: dense, in the order of `like`'s memory as far as a view can follow it.
Tensor empty_as(const Tensor& like);
int64_t step_as(const Tensor& like, int64_t dim);  // the stride that its dimension will have; 1 if that has one element

// How one call sees its tensors: dimensions [first, last) of the main tensor are the columns, the others number the rows.
class Frame {
 public:
  Frame(const char* op, const Tensor& main, const char* name, int64_t first, int64_t last);
  // Without columns, for map ops. `parts` > 1: the frame is one of so many equal parts of the main tensor along `dim`.
  static Frame flat(const char* op, const Tensor& main, const char* name, int64_t dim = 0, int64_t parts = 1);

  // A tensor of the frame's shape and the main tensor's type; with part >= 0, that part of a tensor of the main one's shape.
  void in(View& view, const Tensor& tensor, const char* name, int part = -1);
  // A tensor of the frame's shape and any type of the kernels', or bool. One that is not given may be passed.
  void mixed(View& view, const OptTensor& tensor, const char* name);
  // As in() for a tensor that was made by empty_rows() or, in a map op or one of any rows, empty_as().
  void out(View& view, const Tensor& tensor, int part = -1);
  // No memory: an offset in the view is the number of an element in the order of the main tensor's indices. For map ops.
  void numbers(View& view);
  // One value per row, or a single one for all rows: of the main tensor's type, or of its accumulate type.
  void per_row(View& view, const Tensor& tensor, const char* name);
  void labels(View& view, const Tensor& tensor, const char* name);
  // One value per column, of the main tensor's type, or float with 16-bit rows; the last so many of the rows' dimensions, just
  // before the columns, number sets of them. Null if not given.
  const void* params(const OptTensor& tensor, const char* name, int sets = 0);

  Tensor empty_rows() const;     // the main tensor's shape, the columns of a row next to each other
  Tensor empty_per_row() const;  // the shape of the rows, of the accumulate type
  Tensor empty_per_row(at::ScalarType type) const;
  Tensor empty_params(const OptTensor& like) const;  // of the type and shape of the parameter, else the main tensor's type

  // Joins the dimensions that every view walks as one, and fills in the extent of the call. In a map op the innermost dimension
  // of the first output becomes the columns, or, without an output, that of the order in which elements are numbered.
  void finish(Extent& extent);

  const char* op() const { return op_; }
  const Tensor& main() const { return main_; }
  at::ScalarType wide() const { return main_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
  DType type() const { return type_; }
  DType param_type() const { return param_type_; }
  int64_t cols() const { return cols_; }

 private:
  struct Entry {
    View* view;
    Tensor tensor;          // kept alive until the kernel has been launched
    at::DimVector strides;  // of the rows' dimensions
    bool out = false;
    int64_t start = 0;
  };
  Entry& add(View& view, const Tensor& tensor, int part);
  void set_strides(Entry& entry);
  void check(const Tensor& tensor, const char* name) const;
  bool try_join(Extent& extent);

  const char* op_;
  Tensor main_;
  int64_t first_, last_, cols_ = 1;
  int64_t dim_ = 0;
  bool flat_ = false;
  at::DimVector sizes_, row_sizes_;
  DType type_, param_type_;
  c10::SmallVector<Entry, 8> entries_;
  c10::SmallVector<Tensor, 2> kept_;
};

// A number that stands for a name, from anybody who calls torch.ops.
inline int64_t checked_number(const char* what, int64_t number, int64_t count) {
  TORCH_CHECK_INDEX(number >= 0 && number < count, what, " must be in [0, ", count, "), got ", number);
  return number;
}

}  // namespace fusegrad
