// The one way to start a kernel. What it runs is a program: a struct with an Args, the largest block it can be given
// (kMaxThreads), and a static run(const Args&) that every thread of the grid executes.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

// Shared memory is declared by these two, so that the emulator (tests/emulator) can watch over it.
#ifndef FUSEGRAD_SHARED
#define FUSEGRAD_SHARED(type, name, count) __shared__ type name[count]
#define FUSEGRAD_DYNAMIC_SHARED(type, name)                                                                                        \
  extern __shared__ __align__(16) unsigned char dynamic_[];                                                                        \
  type* const name = reinterpret_cast<type*>(dynamic_)
#endif

namespace fusegrad {
namespace {

// An error is taken back from the runtime, so that it does not turn up in a later call of somebody else.
template <class What>
void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  const std::string what = __PRETTY_FUNCTION__;  // "... [with What = <name>; ...]"
  const size_t name = what.find("What = ") + 7;
  throw std::runtime_error(what.substr(name, what.find_first_of(";]", name) - name) + ": " + cudaGetErrorString(error));
}

template <class Program>
__global__ void __launch_bounds__(Program::kMaxThreads, 1) kernel(const __grid_constant__ typename Program::Args args) {
  Program::run(args);
}

template <class Program>
void launch(int64_t blocks, int threads, void* stream, const typename Program::Args& args, size_t shared = 0) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda<Program>(cudaLaunchKernelEx(&config, kernel<Program>, args));
}

// Of the current device; asking costs more than a launch, so that the answer is kept.
inline int multiprocessors() {
  struct Multiprocessors;
  static std::atomic<int> known[64];
  int device = 0, count = 0;
  check_cuda<Multiprocessors>(cudaGetDevice(&device));
  if (device < 64 && (count = known[device].load(std::memory_order_relaxed))) return count;
  check_cuda<Multiprocessors>(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  if (device < 64) known[device].store(count, std::memory_order_relaxed);
  return count;
}

}  // namespace
}  // namespace fusegrad
