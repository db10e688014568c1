#include "../core/map_cuda.cuh"
#include "pointwise.h"

FUSEGRAD_MAP(ScaleFwd)
FUSEGRAD_MAP(ExpFwd)
FUSEGRAD_MAP(ExpBwd)
FUSEGRAD_MAP(CubeFwd)
FUSEGRAD_MAP(CubeBwd)
