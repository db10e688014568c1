#include "../core/map_cpu.h"
#include "losses.h"

FUSEGRAD_MAP(LossesFwd)
FUSEGRAD_MAP(LossesBwd)
