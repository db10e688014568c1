// Kernels with one mistake each, and correct ones: what the emulator must catch, and must leave alone. `planted <name>` prints
// "right", "wrong" or the error.
#include <cstdio>
#include <map>
#include <vector>

#include "../../csrc/core/launch.cuh"

namespace fusegrad {
namespace {

constexpr int kThreads = 96;

struct Mistake {
  static constexpr int kMaxThreads = 1024;
  struct Args {
    const float* x;
    float* y;
    int n;
  };
};

// y[b] = sum of x over block b, by shuffles and shared memory.
struct Sum : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    FUSEGRAD_SHARED(float, parts, 32);
    float sum = a.x[blockIdx.x * blockDim.x + threadIdx.x];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (unsigned w = 1; w < blockDim.x / 32; ++w) sum += parts[w];
      a.y[blockIdx.x] = sum;
    }
  }
};

struct Reverse : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    FUSEGRAD_DYNAMIC_SHARED(float, row);
    const int t = threadIdx.x, n = blockDim.x, base = blockIdx.x * n;
    row[t] = a.x[base + t];
    __syncthreads();
    a.y[base + t] = row[n - 1 - t];
  }
};

// Votes, warp barriers and atomics: y[b] = the number of positive x in block b, added up once by each thread.
struct Votes : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    FUSEGRAD_SHARED(unsigned, bits, 3);
    FUSEGRAD_SHARED(float, swap, kThreads);
    const bool yes = a.x[blockIdx.x * blockDim.x + threadIdx.x] > 0;
    const unsigned ballot = __ballot_sync(~0u, yes);
    swap[threadIdx.x] = yes;
    __syncwarp();
    const bool neighbour = swap[threadIdx.x ^ 1] != 0;
    __syncwarp();
    swap[threadIdx.x] = neighbour;
    if (threadIdx.x % 32 == 0) bits[threadIdx.x / 32] = ballot;
    const int counted = __syncthreads_count(neighbour);
    int sum = 0;
    for (int w = 0; w < 3; ++w) sum += __builtin_popcount(bits[w]);
    atomicAdd(a.y + blockIdx.x, sum == counted ? float(sum) : -1e6f);
  }
};

struct MissingBarrier : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    FUSEGRAD_SHARED(float, row, kThreads);
    const int t = threadIdx.x;
    row[t] = 0;
    __syncthreads();
    row[t] = a.x[t];
    a.y[t] = row[kThreads - 1 - t];
  }
};

// The same by way of global memory, which nobody watches: the order of the threads shows it.
struct MissingBarrierGlobal : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    const int t = threadIdx.x;
    a.y[t] = a.x[t];
    __syncwarp();
    a.y[kThreads + t] = a.y[kThreads - 1 - t];
  }
};

struct MissingSyncwarp : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    FUSEGRAD_SHARED(float, row, kThreads);
    row[threadIdx.x] = a.x[threadIdx.x];
    __syncwarp();
    row[threadIdx.x ^ 1] = 1;
    a.y[threadIdx.x] = row[threadIdx.x];
  }
};

struct DivergentBarrier : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    if (threadIdx.x == 40) return;
    __syncthreads();
    a.y[threadIdx.x] = a.x[threadIdx.x];
  }
};

struct TwoBarriers : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      __syncthreads();
    a.y[threadIdx.x] = a.x[threadIdx.x];
  }
};

struct DivergentShuffle : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    float x = a.x[threadIdx.x];
    if (threadIdx.x % 32 != 7) x += __shfl_xor_sync(~0u, x, 1);
    a.y[threadIdx.x] = x;
  }
};

struct InactiveLane : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    float x = a.x[threadIdx.x];
    if (threadIdx.x % 32 < 16) x += __shfl_sync(0xffffu, x, 20);
    a.y[threadIdx.x] = x;
  }
};

struct OutOfBounds : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) { a.y[a.n + threadIdx.x] = a.x[threadIdx.x]; }
};

struct OutOfBoundsShared : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    FUSEGRAD_SHARED(float, row, kThreads);
    row[threadIdx.x + 1] = a.x[threadIdx.x];
  }
};

struct Race : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    FUSEGRAD_SHARED(float, row, kThreads / 2);
    row[threadIdx.x / 2] = a.x[threadIdx.x];
  }
};

struct Uninitialised : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    FUSEGRAD_SHARED(float, row, kThreads + 1);
    row[threadIdx.x] = a.x[threadIdx.x];
    __syncthreads();
    a.y[threadIdx.x] = row[threadIdx.x + 1];
  }
};

struct Misaligned : Mistake {
  struct Args : Mistake::Args {};
  static __device__ void run(const Args& a) {
    reinterpret_cast<uint4*>(a.y + 1)[threadIdx.x] = __ldg(reinterpret_cast<const uint4*>(a.x) + threadIdx.x);
  }
};

template <class Program>
std::string outcome(int blocks, int threads, int made, float (*expected)(int)) {
  std::vector<float> x(blocks * kThreads), y(2 * blocks * kThreads);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 7) - 3;
  typename Program::Args args{{x.data(), y.data(), int(y.size())}};
  launch<Program>(blocks, threads, nullptr, args, threads * sizeof(float));
  for (int i = 0; i < made; ++i)
    if (y[i] != expected(i)) return "wrong";
  return "right";
}

float x_at(int i) { return float(i % 7) - 3; }
float sum_of(int block) {
  float sum = 0;
  for (int t = 0; t < kThreads; ++t) sum += x_at(block * kThreads + t);
  return sum;
}
float positive_in(int block) {
  int n = 0;
  for (int t = 0; t < kThreads; ++t) n += x_at(block * kThreads + t) > 0;
  return float(n * kThreads);
}
float reversed(int i) { return x_at(i / kThreads * kThreads + kThreads - 1 - i % kThreads); }

float copied_and_reversed(int i) { return i < kThreads ? x_at(i) : reversed(i - kThreads); }

const std::map<std::string, std::string (*)()> kPlanted = {
    {"sum", [] { return outcome<Sum>(50, kThreads, 50, sum_of); }},
    {"reverse", [] { return outcome<Reverse>(50, kThreads, 50 * kThreads, reversed); }},
    {"votes", [] { return outcome<Votes>(9, kThreads, 9, positive_in); }},
    {"missing_barrier", [] { return outcome<MissingBarrier>(1, kThreads, kThreads, reversed); }},
    {"missing_barrier_global", [] { return outcome<MissingBarrierGlobal>(1, kThreads, 2 * kThreads, copied_and_reversed); }},
    {"missing_syncwarp", [] { return outcome<MissingSyncwarp>(1, kThreads, kThreads, [](int) { return 1.f; }); }},
    {"divergent_barrier", [] { return outcome<DivergentBarrier>(1, kThreads, kThreads, x_at); }},
    {"two_barriers", [] { return outcome<TwoBarriers>(1, kThreads, kThreads, x_at); }},
    {"divergent_shuffle", [] { return outcome<DivergentShuffle>(1, kThreads, kThreads, x_at); }},
    {"inactive_lane", [] { return outcome<InactiveLane>(1, kThreads, kThreads, x_at); }},
    {"out_of_bounds", [] { return outcome<OutOfBounds>(1, kThreads, kThreads, x_at); }},
    {"out_of_bounds_shared", [] { return outcome<OutOfBoundsShared>(1, kThreads, 0, x_at); }},
    {"race", [] { return outcome<Race>(1, kThreads, 0, x_at); }},
    {"uninitialised", [] { return outcome<Uninitialised>(1, kThreads, 0, x_at); }},
    {"misaligned", [] { return outcome<Misaligned>(1, 16, 0, x_at); }},
    {"too_many_threads", [] { return outcome<Sum>(1, 2048, 0, x_at); }},
};

}  // namespace
}  // namespace fusegrad

int main(int, char** argv) {
  try {
    std::puts(fusegrad::kPlanted.at(argv[1])().c_str());
  } catch (const std::runtime_error& e) {
    std::puts(e.what());
  }
}
