// The loops of merging for AVX2. Compiled with -mavx2; runs only where the processor says that it has it.
#if defined(__AVX2__) && defined(__x86_64__)
#define CKPT_LOOPS_NAME compiled_avx2_loops
#include "merge_loops.h"

namespace ckpt::merge {
const Loops* avx2_loops() { return __builtin_cpu_supports("avx2") ? compiled_avx2_loops() : nullptr; }
}  // namespace ckpt::merge
#else
#include "merge_kernels.h"

namespace ckpt::merge {
const Loops* avx2_loops() { return nullptr; }
}  // namespace ckpt::merge
#endif
