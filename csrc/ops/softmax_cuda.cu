#include "../core/rows_cuda.cuh"
#include "softmax.h"

FUSEGRAD_ROWS(SoftmaxFwd)
FUSEGRAD_ROWS(SoftmaxBwd)
