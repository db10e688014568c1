// The row ops that test_drivers.cpp drives, compiled once per variant.
#include "../../csrc/core/rows_cpu.h"
#include "../../csrc/ops/bias_act.h"
#include "../../csrc/ops/cross_entropy.h"
#include "../../csrc/ops/dropout.h"
#include "../../csrc/ops/l2_norm.h"
#include "../../csrc/ops/rms_norm.h"
#include "../../csrc/ops/softmax.h"
#include "../../csrc/ops/vocab_parallel_cross_entropy.h"
#include "in_sets.h"

FUSEGRAD_ROWS(RMSNormFwd)
FUSEGRAD_ROWS(RMSNormBwd)
FUSEGRAD_ROWS(BiasDropoutAddFwd)
FUSEGRAD_ROWS(BiasDropoutAddBwd)
FUSEGRAD_ROWS(CrossEntropyFwd)
FUSEGRAD_ROWS(CrossEntropyBwd)
FUSEGRAD_ROWS(LossTotal)
FUSEGRAD_ROWS(InSets)
FUSEGRAD_ROWS(SoftmaxFwd)
FUSEGRAD_ROWS(NormFwd)
FUSEGRAD_ROWS(NormalizeFwd)
FUSEGRAD_ROWS(VocabParallelCrossEntropyFwd)
#ifndef FUSEGRAD_SANITIZE
FUSEGRAD_ROWS(BiasActFwd)
FUSEGRAD_ROWS(BiasActBwd)
FUSEGRAD_ROWS(RowBiasActBwd)
#endif
