#include "../core/map_cuda.cuh"
#include "losses.h"

FUSEGRAD_MAP(LossesFwd)
FUSEGRAD_MAP(LossesBwd)
