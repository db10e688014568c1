#include "../core/across_cuda.cuh"
#include "layer_norm.h"

FUSEGRAD_ANY_ROWS(LayerNormFwd)
FUSEGRAD_ANY_ROWS(LayerNormBwd)
