#include "../core/rows_cpu.h"
#include "cross_entropy.h"

FUSEGRAD_ROWS(CrossEntropyFwd)
FUSEGRAD_ROWS(CrossEntropyBwd)
FUSEGRAD_ROWS(LossTotal)
