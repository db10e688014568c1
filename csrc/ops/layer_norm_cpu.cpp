#include "../core/rows_cpu.h"
#include "layer_norm.h"

FUSEGRAD_ROWS(LayerNormFwd)
FUSEGRAD_ROWS(LayerNormBwd)
