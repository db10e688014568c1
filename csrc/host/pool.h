// Memory for results. The system hands out fresh memory page by page, at its first touch and filled with zeros, which takes several
// times as long as the kernel that fills it: clone() of a float32 tensor of 4096 x 2048 took 1.4 ms into memory that was in place
// and 10 to 47 ms into fresh memory. malloc gives blocks of 32 MB and more back at once, and torch keeps none for the CPU. So large
// CPU results come from a pool that keeps what was freed for the next call, within FUSEGRAD_CPU_POOL_MB (default: 512, or a
// sixteenth of the machine's memory if that is less; 0: no pool).
#pragma once

#include <ATen/core/Tensor.h>

namespace fusegrad::pool {

// On the device and of the type of `like`.
at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like);
at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, const at::Tensor& like);

// Gives back to the system what the pool keeps.
void clear();
// Bytes that it keeps.
int64_t kept();

}  // namespace fusegrad::pool
