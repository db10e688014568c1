#include "../core/map_cpu.h"
#include "swiglu.h"

FUSEGRAD_MAP(SwiGLUFwd)
FUSEGRAD_MAP(SwiGLUBwd)
