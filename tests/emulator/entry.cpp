// What the emulated extension has besides the host functions, for ctypes.
#include <cuda_runtime.h>

extern "C" __attribute__((visibility("default"))) void fusegrad_emulator_seed(uint64_t seed) {
  emulator::seed = seed;
  emulator::launches = 0;
}
