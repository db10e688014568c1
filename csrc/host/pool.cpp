#include "pool.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <deque>
#include <mutex>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fusegrad::pool {
namespace {

constexpr size_t kPage = 2u << 20;   // a large page
constexpr size_t kLeast = 4u << 20;  // malloc recycles smaller blocks well enough

struct Block {
  void* data;
  size_t size;
};

void give_back(Block* block) {
  std::free(block->data);
  delete block;
}

class Pool final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive every static object.
  static Pool& instance() {
    static Pool* const pool = [] {
      Pool* const made = new Pool;
#if defined(__linux__)
      // A fork while another thread holds the mutex (a DataLoader's, say) would leave it locked in the child for good.
      pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
#endif
      return made;
    }();
    return *pool;
  }

  bool takes(const at::Tensor& like, size_t nbytes) const { return nbytes >= kLeast && limit_ > 0 && like.is_cpu(); }

  c10::DataPtr allocate(size_t nbytes) override {
    Block* const block = nbytes ? reuse(nbytes) : nullptr;
    Block* const taken = block ? block : fresh(nbytes);
    c10::profiledCPUMemoryReporter().New(taken->data, nbytes);
    return {taken->data, taken, &take_back, c10::DeviceType::CPU};
  }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink_to(0);
  }
  size_t kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

 private:
  Pool() {
#if defined(__linux__)
    limit_ = std::min(limit_, size_t(sysconf(_SC_PHYS_PAGES)) / 16 * size_t(sysconf(_SC_PAGE_SIZE)));
#endif
    const char* megabytes = std::getenv("FUSEGRAD_CPU_POOL_MB");
    if (!megabytes || !*megabytes) return;
    char* end = nullptr;
    const long wish = std::strtol(megabytes, &end, 10);
    TORCH_CHECK_VALUE(*end == 0 && wish >= 0, "fusegrad: FUSEGRAD_CPU_POOL_MB must be a number of megabytes, got ", megabytes);
    limit_ = size_t(wish) << 20;
  }

  static Block* fresh(size_t nbytes) {
    const size_t size = (std::max<size_t>(nbytes, 1) + kPage - 1) / kPage * kPage;
    void* data = nullptr;
    TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(&data, kPage, size) == 0, "fusegrad: not enough memory for a result of ",
                     nbytes, " bytes");
#if defined(__linux__)
    madvise(data, size, MADV_HUGEPAGE);  // a wish: no matter if refused
#endif
    return new Block{data, size};
  }

  // The smallest block that is large enough, and at most a quarter too large; of several the one freed last, which caches may hold.
  Block* reuse(size_t nbytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      const size_t size = (*it)->size;
      if (size >= nbytes && size <= std::max(nbytes + nbytes / 4, nbytes + kPage) && (best == free_.end() || size <= (*best)->size))
        best = it;
    }
    if (best == free_.end()) return nullptr;
    Block* const block = *best;
    free_.erase(best);
    kept_ -= block->size;
    return block;
  }

  static void take_back(void* context) {
    Block* const block = static_cast<Block*>(context);
    c10::profiledCPUMemoryReporter().Delete(block->data);
    Pool& pool = instance();
    if (block->size > pool.limit_) return give_back(block);
    const std::lock_guard<std::mutex> lock(pool.mutex_);
    pool.shrink_to(pool.limit_ - block->size);
    pool.free_.push_back(block);
    pool.kept_ += block->size;
  }

  // The oldest ones go first.
  void shrink_to(size_t limit) {
    for (; kept_ > limit; free_.pop_front()) {
      kept_ -= free_.front()->size;
      give_back(free_.front());
    }
  }

  std::mutex mutex_;
  std::deque<Block*> free_;
  size_t kept_ = 0, limit_ = size_t(512) << 20;
};

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) {
  Pool& pool = Pool::instance();
  const auto type = like.scalar_type();
  if (!pool.takes(like, at::detail::computeStorageNbytesContiguous(sizes, like.element_size())))
    return at::empty(sizes, like.options());
  return at::Tensor(at::detail::empty_generic(sizes, &pool, c10::DispatchKeySet(c10::DispatchKey::CPU), type, std::nullopt));
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, const at::Tensor& like) {
  Pool& pool = Pool::instance();
  const auto type = like.scalar_type();
  if (!pool.takes(like, at::detail::computeStorageNbytes(sizes, strides, like.element_size())))
    return at::empty_strided(sizes, strides, like.options());
  return at::Tensor(at::detail::empty_strided_generic(sizes, strides, &pool, c10::DispatchKeySet(c10::DispatchKey::CPU), type));
}

void clear() { Pool::instance().clear(); }
int64_t kept() { return int64_t(Pool::instance().kept()); }

}  // namespace fusegrad::pool
