#include "../core/across_cpu.h"
#include "layer_norm.h"

FUSEGRAD_ANY_ROWS(LayerNormFwd)
FUSEGRAD_ANY_ROWS(LayerNormBwd)
