#include "../core/across_cuda.cuh"
#include "layer_norm_2d.h"

FUSEGRAD_ANY_ROWS(LayerNorm2dFwd)
FUSEGRAD_ANY_ROWS(LayerNorm2dBwd)
