#include "../core/map_cpu.h"
#include "../core/rows_cpu.h"
#include "bias_act.h"

FUSEGRAD_MAP(ActFwd)
FUSEGRAD_MAP(ActBwd)
FUSEGRAD_ROWS(BiasActFwd)
FUSEGRAD_ROWS(BiasActBwd)
FUSEGRAD_ROWS(RowBiasActBwd)
