// CRC-32C with the crc32 instruction of SSE 4.2. Compiled with -msse4.2; runs only where the processor says that it has it.

#include "crc32c_kernels.h"

#if defined(__SSE4_2__) && defined(__x86_64__)
#include <nmmintrin.h>

#include "crc32c_interleaved.h"

namespace ckpt::crc32c {
namespace {

struct Sse42 {
  static uint64_t word(uint64_t state, uint64_t word) { return _mm_crc32_u64(state, word); }
  static uint32_t byte(uint32_t state, unsigned char byte) { return _mm_crc32_u8(state, byte); }
};

}  // namespace

Update sse42_kernel() { return __builtin_cpu_supports("sse4.2") ? update_interleaved<Sse42> : nullptr; }

}  // namespace ckpt::crc32c
#else
namespace ckpt::crc32c {
Update sse42_kernel() { return nullptr; }
}  // namespace ckpt::crc32c
#endif
