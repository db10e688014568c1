#include "../core/map_cuda.cuh"
#include "../core/rows_cuda.cuh"
#include "dropout.h"

FUSEGRAD_MAP(DropoutFwd)
FUSEGRAD_MAP(DropoutMask)
FUSEGRAD_ROWS(BiasDropoutAddFwd)
FUSEGRAD_ROWS(BiasDropoutAddBwd)
