#include "view.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <numeric>

#include "pool.h"

namespace fusegrad {
namespace {

DType dtype(const char* op, const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kDouble: return DType::f64;
    case at::kFloat: return DType::f32;
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    default: TORCH_CHECK_TYPE(false, op, ": ", name, " must be float64, float32, float16 or bfloat16, got ", t.scalar_type());
  }
}

const Tensor& dense(const char* op, const Tensor& t, const char* name) {
  TORCH_CHECK(t.layout() == at::kStrided && !t.is_nested() && !t.is_quantized() && t.has_storage(), op, ": ", name,
              " must be a dense tensor, got ",
              t.is_nested()      ? "a nested"
              : t.is_quantized() ? "a quantized"
                                 : "a",
              " tensor of layout ", t.layout());
  return t;
}

// The step from one column to the next if there is one for all of them, else false.
bool column_stride(at::IntArrayRef sizes, at::IntArrayRef strides, int64_t first, int64_t last, int64_t& step) {
  int64_t expected = -1;
  step = 1;
  for (int64_t d = last - 1; d >= first; --d) {
    if (sizes[d] == 1) continue;
    if (expected < 0)
      step = strides[d];
    else if (strides[d] != expected)
      return false;
    expected = strides[d] * sizes[d];
  }
  return true;
}

}  // namespace

Tensor empty_as(const Tensor& like) {
  if (like.dim() > kMaxDims) return pool::empty(like.sizes(), like);
  if (like.is_non_overlapping_and_dense()) return pool::empty_strided(like.sizes(), like.strides(), like);
  return pool::empty_strided(like.sizes(), at::infer_dense_strides(like.sizes(), like.strides()), like);
}

int64_t step_as(const Tensor& like, int64_t dim) {
  if (like.size(dim) <= 1) return 1;
  if (like.dim() > kMaxDims) return c10::multiply_integers(like.sizes().slice(dim + 1));
  return like.is_non_overlapping_and_dense() ? like.stride(dim) : at::infer_dense_strides(like.sizes(), like.strides())[dim];
}

Frame::Frame(const char* op, const Tensor& main, const char* name, int64_t first, int64_t last)
    : op_(op), main_(dense(op, main, name)), first_(first), last_(last), sizes_(main.sizes()) {
  type_ = param_type_ = dtype(op, main, name);
  TORCH_CHECK_INDEX(0 <= first && first <= last && last <= main.dim(), op, ": ", name, " must have dimensions ", first, " to ",
                    last, ", got ", main.sizes());
  for (int64_t d = 0; d < main.dim(); ++d) {
    if (d >= first && d < last)
      cols_ *= sizes_[d];
    else
      row_sizes_.push_back(sizes_[d]);
  }
}

Frame Frame::flat(const char* op, const Tensor& main, const char* name, int64_t dim, int64_t parts) {
  Frame frame(op, main, name, main.dim(), main.dim());
  frame.flat_ = true;
  if (parts > 1) {
    TORCH_CHECK(0 <= dim && dim < main.dim() && main.size(dim) % parts == 0, op, ": ", name, " must have a size that ", parts,
                " divides in dimension ", dim, ", got ", main.sizes());
    frame.dim_ = dim;
    frame.row_sizes_[dim] = frame.sizes_[dim] /= parts;
  }
  return frame;
}

void Frame::check(const Tensor& tensor, const char* name) const {
  TORCH_CHECK(dense(op_, tensor, name).device() == main_.device(), op_, ": ", name, " must be on ", main_.device(),
              ", where the first argument is, got a tensor on ", tensor.device());
}

Frame::Entry& Frame::add(View& view, const Tensor& tensor, int part) {
  entries_.push_back({&view, tensor, {}});
  Entry& entry = entries_.back();
  if (part > 0) entry.start = part * sizes_[dim_];
  set_strides(entry);
  return entry;
}

void Frame::set_strides(Entry& entry) {
  if (!column_stride(sizes_, entry.tensor.strides(), first_, last_, entry.view->col)) {
    entry.tensor = entry.tensor.contiguous();
    entry.view->col = 1;
  }
  entry.strides.clear();
  for (int64_t d = 0; d < entry.tensor.dim(); ++d)
    if (d < first_ || d >= last_) entry.strides.push_back(entry.tensor.stride(d));
}

void Frame::in(View& view, const Tensor& tensor, const char* name, int part) {
  check(tensor, name);
  const auto sizes = part < 0 ? at::IntArrayRef(sizes_) : main_.sizes();
  TORCH_CHECK(tensor.sizes() == sizes, op_, ": ", name, " must have shape ", sizes, ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == main_.scalar_type(), op_, ": ", name, " must be ", main_.scalar_type(), ", got ",
                   tensor.scalar_type());
  add(view, tensor, part);
}

void Frame::mixed(View& view, const OptTensor& tensor, const char* name) {
  if (!given(tensor)) return;
  check(*tensor, name);
  TORCH_CHECK(tensor->sizes() == at::IntArrayRef(sizes_), op_, ": ", name, " must have shape ", at::IntArrayRef(sizes_), ", got ",
              tensor->sizes());
  view.type = tensor->scalar_type() == at::kBool ? DType::boolean : dtype(op_, *tensor, name);
  add(view, *tensor, -1);
}

void Frame::out(View& view, const Tensor& tensor, int part) { add(view, tensor, part).out = true; }

void Frame::numbers(View& view) {
  at::DimVector strides(sizes_.size());
  int64_t step = 1;
  for (int64_t d = int64_t(sizes_.size()) - 1; d >= 0; --d) strides[d] = step, step *= std::max<int64_t>(sizes_[d], 1);
  entries_.push_back({&view, Tensor(), strides});
}

void Frame::per_row(View& view, const Tensor& tensor, const char* name) {
  check(tensor, name);
  view.wide = tensor.scalar_type() == wide();
  TORCH_CHECK_TYPE(view.wide || tensor.scalar_type() == main_.scalar_type(), op_, ": ", name, " must be ", wide(), ", got ",
                   tensor.scalar_type());
  TORCH_CHECK(tensor.dim() == 0 || tensor.sizes() == at::IntArrayRef(row_sizes_), op_, ": ", name, " must have shape ",
              at::IntArrayRef(row_sizes_), ", got ", tensor.sizes());
  entries_.push_back({&view, tensor, at::DimVector(row_sizes_.size(), 0)});
  if (tensor.dim() > 0) entries_.back().strides = tensor.strides();
}

void Frame::labels(View& view, const Tensor& tensor, const char* name) {
  check(tensor, name);
  TORCH_CHECK(tensor.scalar_type() == at::kLong, op_, ": ", name, " must be int64, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == at::IntArrayRef(row_sizes_), op_, ": ", name, " must have shape ",
                    at::IntArrayRef(row_sizes_), " (one class per item of input ", main_.sizes(), "), got ", tensor.sizes());
  entries_.push_back({&view, tensor, at::DimVector(tensor.strides())});
}

const void* Frame::params(const OptTensor& tensor, const char* name, int sets) {
  if (!given(tensor)) return nullptr;
  check(*tensor, name);
  const auto sizes = main_.sizes().slice(first_ - sets, last_ - first_ + sets);
  TORCH_CHECK(tensor->sizes() == sizes, op_, ": ", name, " must have shape ", sizes, " (input is ", main_.sizes(), "), got ",
              tensor->sizes());
  param_type_ = dtype(op_, *tensor, name);
  TORCH_CHECK_TYPE(kept_.empty() || kept_.back().scalar_type() == tensor->scalar_type(), op_, ": ", name, " must be ",
                   kept_.back().scalar_type(), " as the parameters before it, got ", tensor->scalar_type());
  TORCH_CHECK_TYPE(param_type_ == type_ || (param_type_ == DType::f32 && type_ >= DType::f16), op_, ": ", name, " must be ",
                   main_.scalar_type(), type_ >= DType::f16 ? " or Float" : "", ", got ", tensor->scalar_type());
  kept_.push_back(tensor->contiguous());
  return kept_.back().const_data_ptr();
}

Tensor Frame::empty_rows() const {
  if (last_ == main_.dim()) return pool::empty(sizes_, main_);
  // Memory order: the rows' dimensions, then the columns'.
  at::DimVector strides(sizes_.size());
  int64_t step = 1;
  const auto lay = [&](int64_t d) { strides[d] = step, step *= std::max<int64_t>(sizes_[d], 1); };
  for (int64_t d = last_ - 1; d >= first_; --d) lay(d);
  for (int64_t d = main_.dim() - 1; d >= 0; --d)
    if (d < first_ || d >= last_) lay(d);
  return pool::empty_strided(sizes_, strides, main_);
}

Tensor Frame::empty_per_row() const { return empty_per_row(wide()); }
Tensor Frame::empty_per_row(at::ScalarType type) const { return at::empty(row_sizes_, main_.options().dtype(type)); }

Tensor Frame::empty_params(const OptTensor& like) const {
  const auto options = given(like) ? main_.options().dtype(like->scalar_type()) : main_.options();
  return at::empty(main_.sizes().slice(first_, last_ - first_), options);
}

bool Frame::try_join(Extent& extent) {
  const int64_t n = int64_t(row_sizes_.size());
  at::DimVector order(n), sizes;
  std::iota(order.begin(), order.end(), 0);
  // A map op may walk in any order: that of its first output's memory. Rows keep the order of their numbers, so that the sums
  // over them are the same bits in any layout.
  const auto first_out = std::find_if(entries_.begin(), entries_.end(), [](const Entry& e) { return e.out; });
  if (flat_ && first_out != entries_.end()) {
    const at::DimVector& strides = first_out->strides;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  }
  int dims = 0;
  c10::SmallVector<at::DimVector, 8> joined(entries_.size());
  for (int64_t d : order) {
    const int64_t size = row_sizes_[d];
    if (size == 1) continue;
    bool with_last = dims > 0;
    for (size_t i = 0; with_last && i < entries_.size(); ++i) with_last = joined[i].back() == entries_[i].strides[d] * size;
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (!with_last) joined[i].push_back(0);
      joined[i].back() = entries_[i].strides[d];
    }
    if (with_last) {
      sizes.back() *= size;
    } else {
      sizes.push_back(size);
      ++dims;
    }
  }
  if (dims == 0) {
    sizes.push_back(1);
    for (auto& strides : joined) strides.push_back(flat_ ? 1 : 0);
    dims = 1;
  }
  extent.cols = cols_;
  // An output whose neighbours are apart (halves of a packed dimension of 2) has its rows one element long.
  bool dense = flat_;
  for (size_t i = 0; i < entries_.size(); ++i) dense = dense && (!entries_[i].out || joined[i].back() == 1);
  if (dense) {
    extent.cols = sizes.back();
    sizes.pop_back();
    for (size_t i = 0; i < entries_.size(); ++i) {
      entries_[i].view->col = joined[i].back();
      joined[i].pop_back();
    }
    --dims;
  }
  if (dims > kMaxDims) return false;
  extent.dims = dims;
  extent.rows = 1;
  for (int d = 0; d < dims; ++d) {
    extent.size[d] = sizes[d];
    extent.rows *= sizes[d];
    for (size_t i = 0; i < entries_.size(); ++i) entries_[i].view->stride[d] = joined[i][d];
  }
  return true;
}

void Frame::finish(Extent& extent) {
  if (!try_join(extent)) {
    // More dimensions than a view can walk: rare enough for a copy. Between dense tensors all dimensions join but one or two.
    for (auto& entry : entries_) {
      if (entry.out || !entry.tensor.defined() || entry.tensor.dim() == 0) continue;
      entry.tensor = entry.tensor.contiguous();
      if (entry.tensor.dim() == int64_t(row_sizes_.size()))
        entry.strides = entry.tensor.strides();
      else
        set_strides(entry);
    }
    TORCH_CHECK(try_join(extent), op_, ": input must have at most ", kMaxDims, " dimensions that cannot be joined, got strides ",
                main_.strides());
  }
  for (auto& entry : entries_) {
    if (!entry.tensor.defined()) continue;
    // Outputs are fresh, and a mutable pointer to an input would count as a write to it.
    char* const data = static_cast<char*>(const_cast<void*>(entry.tensor.const_data_ptr()));
    entry.view->data = data + (entry.start ? entry.start * entry.tensor.stride(dim_) * entry.tensor.element_size() : 0);
  }
}

}  // namespace fusegrad
