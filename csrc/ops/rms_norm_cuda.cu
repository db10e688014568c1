#include "../core/rows_cuda.cuh"
#include "rms_norm.h"

FUSEGRAD_ROWS(RMSNormFwd)
FUSEGRAD_ROWS(RMSNormBwd)
