#include "../core/map_cuda.cuh"
#include "gated.h"

FUSEGRAD_MAP(GatedFwd<Act::silu>)
FUSEGRAD_MAP(GatedBwd<Act::silu>)
FUSEGRAD_MAP(GatedFwd<Act::gelu>)
FUSEGRAD_MAP(GatedBwd<Act::gelu>)
FUSEGRAD_MAP(GatedFwd<Act::gelu_tanh>)
FUSEGRAD_MAP(GatedBwd<Act::gelu_tanh>)
FUSEGRAD_MAP(GatedFwd<Act::relu>)
FUSEGRAD_MAP(GatedBwd<Act::relu>)
FUSEGRAD_MAP(GatedFwd<Act::sigmoid>)
FUSEGRAD_MAP(GatedBwd<Act::sigmoid>)
