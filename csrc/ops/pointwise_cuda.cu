#include "../core/map_cuda.cuh"
#include "pointwise.h"

FUSEGRAD_MAP(ScaleFwd)
FUSEGRAD_MAP(ValueOf<Act::exp>)
FUSEGRAD_MAP(ExpBwd)
FUSEGRAD_MAP(ValueOf<Act::cube>)
FUSEGRAD_MAP(GradientAt<Act::cube>)
