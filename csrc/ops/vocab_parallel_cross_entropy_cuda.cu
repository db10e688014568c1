#include "../core/rows_cuda.cuh"
#include "vocab_parallel_cross_entropy.h"

FUSEGRAD_ROWS(VocabParallelCrossEntropyFwd)
