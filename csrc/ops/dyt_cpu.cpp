#include "../core/rows_cpu.h"
#include "dyt.h"

FUSEGRAD_ROWS(DyTFwd)
FUSEGRAD_ROWS(DyTBwd)
