#include "../core/across_cpu.h"
#include "layer_norm_2d.h"

FUSEGRAD_ANY_ROWS(LayerNorm2dFwd)
FUSEGRAD_ANY_ROWS(LayerNorm2dBwd)
