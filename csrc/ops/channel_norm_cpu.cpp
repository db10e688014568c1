#include "../core/across_cpu.h"
#include "channel_norm.h"

FUSEGRAD_ANY_ROWS(ChannelMoments)
FUSEGRAD_ROWS(ChannelStatistics)
FUSEGRAD_ANY_ROWS(ChannelNormFwd)
FUSEGRAD_ANY_ROWS(ChannelSums)
FUSEGRAD_ROWS(ChannelTotals)
FUSEGRAD_ANY_ROWS(ChannelNormBwd)
FUSEGRAD_ROWS(GroupNormFwd)
FUSEGRAD_ROWS(GroupNormBwd)
