// The map ops that test_drivers.cpp drives, compiled once per variant.
#include "../../csrc/core/map_cpu.h"
#include "../../csrc/ops/bias_act.h"
#include "../../csrc/ops/dropout.h"
#include "../../csrc/ops/gated.h"
#include "../../csrc/ops/pointwise.h"
#include "two_results.h"

FUSEGRAD_MAP(DropoutFwd)
FUSEGRAD_MAP(DropoutMask)
FUSEGRAD_MAP(GatedFwd<Act::silu>)
FUSEGRAD_MAP(ScaleFwd)
FUSEGRAD_MAP(ValueOf<Act::exp>)
FUSEGRAD_MAP(TwoResults)
#ifndef FUSEGRAD_SANITIZE
FUSEGRAD_MAP(GatedBwd<Act::silu>)
FUSEGRAD_MAP(GradientAt<Act::cube>)
FUSEGRAD_MAP(ActFwd)
FUSEGRAD_MAP(ActBwd)
#endif
