#include "../core/rows_cuda.cuh"
#include "dyt.h"

FUSEGRAD_ROWS(DyTFwd)
FUSEGRAD_ROWS(DyTBwd)
