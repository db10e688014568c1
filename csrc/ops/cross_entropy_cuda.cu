#include "../core/rows_cuda.cuh"
#include "cross_entropy.h"

FUSEGRAD_ROWS(CrossEntropyFwd)
FUSEGRAD_ROWS(CrossEntropyBwd)
FUSEGRAD_ROWS(LossTotal)
