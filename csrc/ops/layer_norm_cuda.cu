#include "../core/rows_cuda.cuh"
#include "layer_norm.h"

FUSEGRAD_ROWS(LayerNormFwd)
FUSEGRAD_ROWS(LayerNormBwd)
