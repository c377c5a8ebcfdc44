// The loops of merging for AVX-512. Compiled with -mavx512...; runs only where the processor says that it has all of it.
#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__x86_64__)
#define CKPT_LOOPS_NAME compiled_avx512_loops
#include "merge_loops.h"

namespace ckpt::merge {
const Loops* avx512_loops() {
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return here ? compiled_avx512_loops() : nullptr;
}
}  // namespace ckpt::merge
#else
#include "merge_kernels.h"

namespace ckpt::merge {
const Loops* avx512_loops() { return nullptr; }
}  // namespace ckpt::merge
#endif
