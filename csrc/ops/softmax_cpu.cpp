#include "../core/rows_cpu.h"
#include "softmax.h"

FUSEGRAD_ROWS(SoftmaxFwd)
FUSEGRAD_ROWS(SoftmaxBwd)
