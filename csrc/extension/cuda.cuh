// The CUDA kernels of an op that is loaded by fusegrad.extension.
#pragma once

#include "../core/map_cuda.cuh"
#include "../core/rows_cuda.cuh"
#include "../fusegrad.h"

#define FUSEGRAD_KERNELS(Op) FUSEGRAD_KERNELS_BY(Op, kCuda, RowsOnCuda, MapOnCuda)
