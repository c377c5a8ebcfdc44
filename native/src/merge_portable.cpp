// The loops of merging for any processor of the architecture.
#define CKPT_LOOPS_NAME portable_loops
#include "merge_loops.h"
