#include "../core/rows_cpu.h"
#include "add_norm.h"

FUSEGRAD_ROWS(AddRMSNormFwd)
FUSEGRAD_ROWS(AddRMSNormBwd)
FUSEGRAD_ROWS(AddLayerNormFwd)
FUSEGRAD_ROWS(AddLayerNormBwd)
