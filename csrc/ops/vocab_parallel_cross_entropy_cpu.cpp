#include "../core/rows_cpu.h"
#include "vocab_parallel_cross_entropy.h"

FUSEGRAD_ROWS(VocabParallelCrossEntropyFwd)
