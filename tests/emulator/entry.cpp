// What the emulated extension has besides the host functions, for ctypes.
#include <cuda_runtime.h>

#define ENTRY extern "C" __attribute__((visibility("default")))

ENTRY void fusegrad_emulator_seed(uint64_t seed) {
  emulator::seed = seed;
  emulator::launches = 0;
}
ENTRY uint64_t fusegrad_emulator_launches() { return emulator::launches; }
ENTRY void fusegrad_emulator_fail_next() { emulator::fail_next = true; }
ENTRY int fusegrad_emulator_last_error() { return emulator::last_error; }
