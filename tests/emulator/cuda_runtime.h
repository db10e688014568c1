// An emulator of CUDA's execution model: put first on the include path, it lets a C++ compiler build a .cu file as it is, and runs
// its kernels on the CPU. Each CUDA thread is a fibre; the fibres of a block run one at a time and give way only where threads
// meet (barriers, shuffles, votes, atomics). Which one goes on is drawn from a seed, so that an order a kernel relies on without
// having asked for it turns up as a wrong result, or as one of these errors (a std::runtime_error from the launch):
//
//   divergent barrier     threads exit, or wait elsewhere, while others of the block or of the mask wait for them
//   bad shuffle           from a lane that takes no part
//   race                  two threads touch an element of shared memory, one of them writing, with no barrier between
//   uninitialised read    of shared memory that no thread of the block has written
//   out of bounds         of shared memory (of other memory: AddressSanitizer, which knows the fibres)
//   misaligned access     of a vector type
//
// What a kernel must do for it: declare shared memory with FUSEGRAD_SHARED or FUSEGRAD_DYNAMIC_SHARED, launch with
// cudaLaunchKernelEx. Not emulated: anything asynchronous, clusters, tensor cores, textures, the memory model between blocks.
//
// FUSEGRAD_EMULATOR_SEED (or emulator::seed) chooses the order, FUSEGRAD_EMULATOR_THREADS the number of CPU threads for blocks.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Where the running fibre is.
inline constinit thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim, gridDim;

namespace emulator {

inline uint64_t environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtoull(text, nullptr, 10) : otherwise;
}
inline std::atomic<uint64_t> seed{environment("FUSEGRAD_EMULATOR_SEED", 0)};
inline std::atomic<uint64_t> launches{0};
inline std::atomic<bool> fail_next{false};  // the next launch, as if the device had refused it
constexpr int kMultiprocessors = 2;

// A context: registers and stack of a fibre, or of the CPU thread that runs the fibres.
#if defined(__x86_64__)
struct Context {
  void* sp = nullptr;
};
// Saves what a function must save for its caller, and goes on where `to` was saved. swapcontext makes two system calls instead.
__attribute__((naked, noinline)) inline void swap(Context*, const Context*) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void start(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size);
  top[-1] = nullptr;  // the entry never returns
  top[-2] = reinterpret_cast<void*>(entry);
  std::fill(top - 8, top - 2, nullptr);
  context.sp = top - 8;
}
#else
struct Context {
  ucontext_t registers;
};
inline void swap(Context* from, const Context* to) { swapcontext(&from->registers, &to->registers); }
inline void start(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = size;
  makecontext(&context.registers, entry, 0);
}
#endif

// No power of two, or the tops of all stacks share a few cache lines: a third of the time of a shuffle.
constexpr size_t kStack = (128 << 10) + 17 * 64;
constexpr unsigned kMaxThreads = 1024;

// Stacks for the threads of a block, kept for the next launch.
class Stacks {
 public:
  Stacks() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (kept().empty()) {
      constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* const p = mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, flags, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      base_ = static_cast<char*>(p);
    } else {
      base_ = kept().back();
      kept().pop_back();
    }
  }
  ~Stacks() {
    const std::lock_guard<std::mutex> lock(mutex());
    kept().push_back(base_);
  }
  char* operator[](unsigned i) const { return base_ + i * kStack; }

 private:
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static std::vector<char*>& kept() {
    static std::vector<char*> k;
    return k;
  }
  char* base_;
};

// A place in the source where threads wait for each other.
struct Place {
  const char* what = nullptr;
  const char* file = nullptr;
  int line = 0;
  unsigned mask = 0;

  bool operator==(const Place& o) const { return line == o.line && mask == o.mask && same(what, o.what) && same(file, o.file); }
  static bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }
  std::string text() const {
    const char* const slash = std::strrchr(file, '/');
    return std::string(what) + " (" + (slash ? slash + 1 : file) + ":" + std::to_string(line) + ")";
  }
};

inline std::string triple(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

struct Fibre {
  Context context;
  void* fake_stack = nullptr;  // AddressSanitizer's
  char* stack = nullptr;
  unsigned number = 0;
  uint3 index{};
  Place waits;
  uint64_t value = 0, result = 0;
  int source = 0;
  uint32_t warp_epoch = 0;
  bool exited = false;

  unsigned lane() const { return number % 32; }
  std::string text() const { return "thread " + triple(index); }
};

// Who touched an element of shared memory last.
struct Touch {
  uint32_t epoch = 0, warp_epoch = 0;
  int thread = -1;
};
struct Shadow {
  Touch write, read, read_before;
};

class Block {
 public:
  Block(const std::string& kernel, dim3 grid, dim3 block, size_t dynamic_bytes)
      : dynamic(dynamic_bytes),
        dynamic_shadow(dynamic_bytes),
        kernel_(kernel),
        fibres_(block.x * block.y * block.z),
        warps_((fibres_.size() + 31) / 32) {
    gridDim = grid, blockDim = block;
  }

  template <class Body>
  void run(uint3 block, uint64_t order, const Body& body) {
    static std::atomic<uint64_t> blocks{0};
    serial = ++blocks;
    epoch = 1;
    random_ = order * 0x9e3779b97f4a7c15u + 1;
    block_ = block;
    at_barrier_ = exited_ = 0;
    body_ = [](const void* p) { (*static_cast<const Body*>(p))(); };
    body_data_ = &body;
    std::fill(dynamic.begin(), dynamic.end(), char(0xff));
    std::fill(dynamic_shadow.begin(), dynamic_shadow.end(), Shadow());
    std::fill(warps_.begin(), warps_.end(), 0u);
    ready_.clear();
    for (unsigned i = 0; i < fibres_.size(); ++i) {
      Fibre& f = fibres_[i] = Fibre();
      f.stack = stacks_[i];
      f.number = i;
      f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
#if defined(__SANITIZE_ADDRESS__)
      ASAN_UNPOISON_MEMORY_REGION(f.stack, kStack);
#endif
      start(f.context, f.stack, kStack, entry);
      ready_.push_back(i);
    }
    current() = this;
    while (!ready_.empty()) {
      const size_t pick = (next_random() & 0xffffffff) * ready_.size() >> 32;  // a division would cost as much as the switch
      const unsigned i = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      resume(fibres_[i]);
      if (error_) break;
    }
    current() = nullptr;
    if (!error_ && exited_ < fibres_.size()) stuck();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }
  Fibre& me() { return *running_; }
  Fibre& fibre(unsigned i) { return fibres_[i]; }

  // Reports from inside a kernel; the block stops where it is.
  [[noreturn]] void fail(const std::string& text) {
    error_ = describe(text, me().text());
    suspend();
    std::abort();
  }

  void give_way() {
    ready_.push_back(me().number);
    suspend();
  }

  // Returns how many threads said yes.
  unsigned barrier(const Place& place, bool yes) {
    Fibre& f = me();
    f.waits = place;
    if (exited_) missing(place, *std::find_if(fibres_.begin(), fibres_.end(), [](const Fibre& o) { return o.exited; }));
    if (at_barrier_ && !(fibres_[first_at_barrier_].waits == place)) elsewhere(place, fibres_[first_at_barrier_]);
    if (!at_barrier_) first_at_barrier_ = f.number, votes_ = 0;
    votes_ += yes;
    if (++at_barrier_ == fibres_.size()) {
      at_barrier_ = 0;
      ++epoch;
      for (Fibre& o : fibres_) {
        o.result = votes_;
        o.waits = Place();
        ready_.push_back(o.number);
      }
    }
    suspend();
    return f.result;
  }

  // The lanes of the mask meet. Each gets the value of its source lane, or, where that is -1, one bit from each lane.
  uint64_t meet(const Place& place, uint64_t value, int source) {
    Fibre& f = me();
    const unsigned first = f.number / 32 * 32, mask = place.mask;
    unsigned& waiting = warps_[f.number / 32];
    f.waits = place, f.value = value, f.source = source;
    if (!(mask >> f.lane() & 1)) fail(place.text() + " with a mask that leaves out the calling lane");
    if (fibres_.size() - first < 32 && mask >> (fibres_.size() - first))
      fail("divergent barrier: " + place.text() + " waits for lanes that the block has not");
    for (unsigned l = 0; exited_ && l < 32; ++l)
      if (mask >> l & 1 && fibres_[first + l].exited) missing(place, fibres_[first + l]);
    waiting |= 1u << f.lane();
    if ((waiting & mask) == mask) {
      unsigned votes = 0;
      for (unsigned l = 0; l < 32; ++l) {
        if (!(mask >> l & 1)) continue;
        const Fibre& o = fibres_[first + l];
        if (!(o.waits == place)) elsewhere(place, o);
        if (o.source >= 0 && !(mask >> o.source & 1))
          fail("bad shuffle: " + place.text() + " reads lane " + std::to_string(o.source) + ", which takes no part");
        votes |= unsigned(o.value != 0) << l;
      }
      for (unsigned l = 0; l < 32; ++l) {
        if (!(mask >> l & 1)) continue;
        Fibre& o = fibres_[first + l];
        o.result = o.source < 0 ? votes : fibres_[first + o.source].value;
        ++o.warp_epoch;
        ready_.push_back(o.number);
      }
      waiting &= ~mask;
      for (unsigned l = 0; l < 32; ++l)
        if (mask >> l & 1) fibres_[first + l].waits = Place();
    }
    suspend();
    return f.result;
  }

  void touch(const char* name, size_t i, Shadow& s, bool write) {
    const Fibre& f = me();
    const auto element = [&] { return std::string(name) + "[" + std::to_string(i) + "]"; };
    const auto clashes = [&](const Touch& t) {
      if (t.thread < 0 || t.epoch != epoch || t.thread == int(f.number)) return false;
      return t.thread / 32 != int(f.number) / 32 || t.warp_epoch == f.warp_epoch;
    };
    if (!write && s.write.thread < 0) fail("uninitialised read of shared memory " + element());
    for (const Touch* t : {&s.write, &s.read, &s.read_before})
      if ((write || t == &s.write) && clashes(*t))
        fail("race on shared memory " + element() + ": " + (write ? "writes" : "reads") + " what " + fibres_[t->thread].text() +
             (t == &s.write ? " wrote" : " read") + ", with no barrier between");
    const Touch now{epoch, f.warp_epoch, int(f.number)};
    if (write) {
      s.write = now;
    } else {
      if (s.read.thread != now.thread) s.read_before = s.read;
      s.read = now;
    }
  }

  uint64_t serial = 0;
  uint32_t epoch = 0;  // barriers passed
  std::vector<char> dynamic;
  std::vector<Shadow> dynamic_shadow;

 private:
  std::exception_ptr describe(const std::string& text, const std::string& who) const {
    return std::make_exception_ptr(
        std::runtime_error("emulator: " + text + "; kernel " + kernel_ + ", block " + triple(block_) + ", " + who));
  }

  [[noreturn]] void missing(const Place& place, const Fibre& o) {
    fail("divergent barrier: waits at " + place.text() + ", but " + o.text() + " has exited");
  }

  [[noreturn]] void elsewhere(const Place& place, const Fibre& o) { fail(apart(place, o)); }
  static std::string apart(const Place& place, const Fibre& o) {
    return "divergent barrier: waits at " + place.text() + ", but " + o.text() + " at " + o.waits.text();
  }

  void stuck() {
    const Fibre* first = nullptr;
    for (const Fibre& f : fibres_) {
      if (f.exited) continue;
      if (!first) first = &f;
      if (f.waits == first->waits) continue;
      error_ = describe(apart(f.waits, *first), f.text());
      return;
    }
    error_ = describe("divergent barrier: waits at " + first->waits.text() + " for threads that never come", first->text());
  }

  static void entry() {
    Block& b = *current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &b.bottom_, &b.size_);
#endif
    try {
      b.body_(b.body_data_);
    } catch (...) {
      b.error_ = std::current_exception();
    }
    Fibre& f = b.me();
    f.exited = true;
    ++b.exited_;
    if (b.at_barrier_) {
      const Fibre& o = b.fibres_[b.first_at_barrier_];
      b.fail("divergent barrier: exits, but " + o.text() + " waits at " + o.waits.text());
    }
    const unsigned first = f.number / 32 * 32;
    for (unsigned l = 0; l < 32; ++l)
      if (b.warps_[f.number / 32] >> l & 1 && b.fibres_[first + l].waits.mask >> f.lane() & 1)
        b.fail("divergent barrier: exits, but " + b.fibres_[first + l].text() + " waits at " + b.fibres_[first + l].waits.text());
    b.suspend(true);
  }

  void resume(Fibre& f) {
    running_ = &f;
    threadIdx = f.index, blockIdx = block_;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, f.stack, kStack);
#endif
    swap(&scheduler_, &f.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
  __attribute__((noinline)) void suspend([[maybe_unused]] bool for_good = false) {
    Fibre& f = me();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &f.fake_stack, bottom_, size_);
#endif
    swap(&f.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
  }

  uint64_t next_random() {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return random_ >> 16;
  }

  std::string kernel_;
  Stacks stacks_;
  std::vector<Fibre> fibres_;
  std::vector<unsigned> ready_;
  std::vector<unsigned> warps_;  // lanes that wait for others of their warp
  Fibre* running_ = nullptr;
  Context scheduler_;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  uint3 block_{};
  uint64_t random_ = 1;
  unsigned at_barrier_ = 0, first_at_barrier_ = 0, votes_ = 0, exited_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* body_data_ = nullptr;
  std::exception_ptr error_;
};

inline Block& block() { return *Block::current(); }

// Shared memory. It begins as NaNs.
template <class T>
class Shared {
 public:
  class Element {
   public:
    Element(const Shared& of, size_t i) : of_(of), i_(i) {}
    Element(const Element&) = default;
    operator T() const {
      touch(false);
      return of_.data_[i_];
    }
    const Element& operator=(const T& value) const {
      touch(true);
      of_.data_[i_] = value;
      return *this;
    }
    const Element& operator=(const Element& o) const { return *this = T(o); }
    const Element& operator+=(const T& value) const { return *this = T(T(*this) + value); }

   private:
    void touch(bool write) const { block().touch(of_.name_, i_, of_.shadow_[i_ * of_.step_], write); }
    const Shared& of_;
    size_t i_;
  };

  Shared(const char* name, T* data, size_t count, Shadow* shadow, size_t step)
      : name_(name), data_(data), count_(count), shadow_(shadow), step_(step) {}
  Element operator[](int64_t i) const {
    if (i < 0 || size_t(i) >= count_)
      block().fail("out of bounds: shared memory " + std::string(name_) + "[" + std::to_string(i) + "] of " +
                   std::to_string(count_));
    return Element(*this, size_t(i));
  }

 private:
  const char* name_;
  T* data_;
  size_t count_;
  Shadow* shadow_;
  size_t step_;
};

template <class T, size_t count>
struct Storage {
  alignas(16) T data[count];
  Shadow shadow[count];
  uint64_t serial = 0;

  Shared<T> open(const char* name) {
    if (serial != block().serial) {
      serial = block().serial;
      std::memset(static_cast<void*>(data), 0xff, sizeof(data));
      std::fill_n(shadow, count, Shadow());
    }
    return {name, data, count, shadow, 1};
  }
};
// One for each place that declares shared memory and each CPU thread: blocks run one at a time on it.
template <class T, size_t count, class Site>
Storage<T, count>& storage() {
  static thread_local Storage<T, count> s;
  return s;
}
template <class T>
Shared<T> dynamic_shared(const char* name) {
  Block& b = block();
  return {name, reinterpret_cast<T*>(b.dynamic.data()), b.dynamic.size() / sizeof(T), b.dynamic_shadow.data(), sizeof(T)};
}

inline void check_aligned(const void* p, size_t bytes) {
  asm volatile("" : "+r"(p));  // the compiler takes the alignment of a type for granted
  if (reinterpret_cast<uintptr_t>(p) % bytes && Block::current())
    block().fail("misaligned access of " + std::to_string(bytes) + " bytes");
}

template <class T, class Lane>
T shuffle(const char* what, unsigned mask, T value, int width, const char* file, int line, const Lane& from) {
  static_assert(sizeof(T) <= 8, "");
  Block& b = block();
  const int lane = b.me().lane(), base = lane / width * width, source = from(lane, base);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = b.meet({what, file, line, mask}, bits, source < base || source >= base + width ? lane : source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// A name for messages: the type of the program that the arguments belong to, or of the arguments.
template <class... Params>
std::string kernel_name() {
  std::string s = __PRETTY_FUNCTION__;
  const size_t open = s.find("Params = {") + 10;
  s = s.substr(open, s.find('}', s.rfind("::Args") == std::string::npos ? open : s.rfind("::Args")) - open);
  if (s.ends_with("::Args")) s.resize(s.size() - 6);
  for (const char* noise : {"fusegrad::", "{anonymous}::", "c10::"})
    for (size_t at; (at = s.find(noise)) != std::string::npos;) s.erase(at, std::strlen(noise));
  return s;
}

template <class Body>
void run_grid(const std::string& kernel, dim3 grid, dim3 block, size_t dynamic_bytes, const Body& body) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, threads = block.x * block.y * block.z;
  const uint64_t start = seed.load() * 1000003 + launches++;
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  uint64_t random = start * 0x9e3779b97f4a7c15u + 1;
  for (uint64_t i = blocks; i > 1; --i) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    std::swap(order[i - 1], order[(random >> 16) % i]);
  }
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    try {
      Block b(kernel, grid, block, dynamic_bytes);
      for (uint64_t i; (i = next++) < blocks;) {
        const unsigned n = order[i];
        b.run({n % grid.x, n / grid.x % grid.y, n / (grid.x * grid.y)}, start * 31 + n, body);
      }
    } catch (...) {
      next = blocks;
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  // A CPU thread costs more than a few small blocks.
  static const uint64_t most = environment("FUSEGRAD_EMULATOR_THREADS", std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> helpers;
  for (uint64_t t = 1; t < std::min({most, blocks, blocks * threads / 2048}); ++t) helpers.emplace_back(work);
  const auto was = std::make_tuple(threadIdx, blockIdx, blockDim, gridDim);
  work();
  std::tie(threadIdx, blockIdx, blockDim, gridDim) = was;
  for (auto& t : helpers) t.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace emulator

#define FUSEGRAD_SHARED(type, name, count)                                                                                         \
  struct name##_site {};                                                                                                           \
  const auto name = ::emulator::storage<type, size_t(count), name##_site>().open(#name)
#define FUSEGRAD_DYNAMIC_SHARED(type, name) const auto name = ::emulator::dynamic_shared<type>(#name)

// Vector types: every copy checks the alignment.
#define EMULATED_VECTOR(name, scalar, bytes, ...)                                                                                  \
  struct alignas(bytes) name {                                                                                                     \
    scalar __VA_ARGS__;                                                                                                            \
    name() = default;                                                                                                              \
    name(const name& o) { *this = o; }                                                                                             \
    name& operator=(const name& o) {                                                                                               \
      emulator::check_aligned(this, bytes), emulator::check_aligned(&o, bytes);                                                    \
      std::memcpy(static_cast<void*>(this), static_cast<const void*>(&o), bytes);                                                  \
      return *this;                                                                                                                \
    }                                                                                                                              \
  };
EMULATED_VECTOR(uint2, unsigned, 8, x, y)
EMULATED_VECTOR(uint4, unsigned, 16, x, y, z, w)
EMULATED_VECTOR(float2, float, 8, x, y)
EMULATED_VECTOR(float4, float, 16, x, y, z, w)
EMULATED_VECTOR(double2, double, 16, x, y)
#undef EMULATED_VECTOR

template <class T>
T __ldg(const T* p) {
  emulator::check_aligned(p, alignof(T));
  return *p;
}

#define EMULATED_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(EMULATED_PLACE) { emulator::block().barrier({"__syncthreads", file, line, 0}, false); }
inline int __syncthreads_count(int yes, EMULATED_PLACE) {
  return emulator::block().barrier({"__syncthreads_count", file, line, 0}, yes);
}
inline int __syncthreads_or(int yes, EMULATED_PLACE) {
  return emulator::block().barrier({"__syncthreads_or", file, line, 0}, yes) > 0;
}
inline int __syncthreads_and(int yes, EMULATED_PLACE) {
  return emulator::block().barrier({"__syncthreads_and", file, line, 0}, yes) == blockDim.x * blockDim.y * blockDim.z;
}
inline void __syncwarp(unsigned mask = ~0u, EMULATED_PLACE) { emulator::block().meet({"__syncwarp", file, line, mask}, 0, -1); }
inline unsigned __ballot_sync(unsigned mask, int yes, EMULATED_PLACE) {
  return emulator::block().meet({"__ballot_sync", file, line, mask}, yes != 0, -1);
}
inline int __any_sync(unsigned mask, int yes, EMULATED_PLACE) {
  return emulator::block().meet({"__any_sync", file, line, mask}, yes != 0, -1) != 0;
}
inline int __all_sync(unsigned mask, int yes, EMULATED_PLACE) {
  return emulator::block().meet({"__all_sync", file, line, mask}, yes != 0, -1) == mask;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATED_PLACE) {
  return emulator::shuffle("__shfl_sync", mask, value, width, file, line, [=](int, int base) { return base + lane % width; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATED_PLACE) {
  return emulator::shuffle("__shfl_xor_sync", mask, value, width, file, line, [=](int me, int) { return me ^ bits; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATED_PLACE) {
  return emulator::shuffle("__shfl_down_sync", mask, value, width, file, line, [=](int me, int) { return me + int(by); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATED_PLACE) {
  return emulator::shuffle("__shfl_up_sync", mask, value, width, file, line, [=](int me, int) { return me - int(by); });
}
#undef EMULATED_PLACE

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() {}

// Blocks run on several CPU threads, so that these are atomic indeed.
namespace emulator {
template <class T, class F>
T update(T* p, const F& f) {
  block().give_way();
  T old, made;
  __atomic_load(p, &old, __ATOMIC_SEQ_CST);
  do made = f(old);
  while (!__atomic_compare_exchange(p, &old, &made, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}
}  // namespace emulator
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return emulator::update(p, [=](T old) { return T(old + v); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return emulator::update(p, [=](T old) { return old < v ? v : old; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return emulator::update(p, [=](T old) { return v < old ? v : old; });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return emulator::update(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return emulator::update(p, [=](T old) { return old == expected ? v : old; });
}

// The host's side of it.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
namespace emulator {
inline thread_local cudaError_t last_error = cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = emulator::kMultiprocessors;
  return cudaSuccess;
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const dim3 g = config->gridDim, b = config->blockDim;
  if (g.x - 1 > 0x7ffffffe || g.y - 1 > 65534 || g.z - 1 > 65534 || uint64_t(b.x) * b.y * b.z - 1 > 1023 || b.z > 64 ||
      config->dynamicSmemBytes > 48 << 10 || emulator::fail_next.exchange(false))
    return emulator::last_error = cudaErrorInvalidConfiguration;
  emulator::run_grid(emulator::kernel_name<Params...>(), g, b, config->dynamicSmemBytes, [&] { kernel(args...); });
  return cudaSuccess;
}
