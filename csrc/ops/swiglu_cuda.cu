#include "../core/map_cuda.cuh"
#include "swiglu.h"

FUSEGRAD_MAP(SwiGLUFwd)
FUSEGRAD_MAP(SwiGLUBwd)
