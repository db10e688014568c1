#include "../core/rows_cuda.cuh"
#include "l2_norm.h"

FUSEGRAD_ROWS(NormFwd)
FUSEGRAD_ROWS(NormBwd)
FUSEGRAD_ROWS(NormalizeFwd)
FUSEGRAD_ROWS(NormalizeBwd)
