#include "../core/rows_cpu.h"
#include "rms_norm.h"

FUSEGRAD_ROWS(RMSNormFwd)
FUSEGRAD_ROWS(RMSNormBwd)
