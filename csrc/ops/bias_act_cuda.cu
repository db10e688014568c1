#include "../core/map_cuda.cuh"
#include "../core/rows_cuda.cuh"
#include "bias_act.h"

FUSEGRAD_MAP(ActFwd)
FUSEGRAD_MAP(ActBwd)
FUSEGRAD_ROWS(BiasActFwd)
FUSEGRAD_ROWS(BiasActBwd)
FUSEGRAD_ROWS(RowBiasActBwd)
