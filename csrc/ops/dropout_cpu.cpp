#include "../core/map_cpu.h"
#include "../core/rows_cpu.h"
#include "dropout.h"

FUSEGRAD_MAP(DropoutFwd)
FUSEGRAD_MAP(DropoutMask)
FUSEGRAD_ROWS(BiasDropoutAddFwd)
FUSEGRAD_ROWS(BiasDropoutAddBwd)
