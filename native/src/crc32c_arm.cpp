// CRC-32C with the CRC extension of ARMv8. Compiled with -march=armv8-a+crc; runs only where the processor says it has it.

#include "crc32c_kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_CRC32) && !defined(__ARM_BIG_ENDIAN)
#include <arm_acle.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "crc32c_interleaved.h"

namespace ckpt::crc32c {
namespace {

struct Arm {
  static uint64_t word(uint64_t state, uint64_t word) { return __crc32cd(static_cast<uint32_t>(state), word); }
  static uint32_t byte(uint32_t state, unsigned char byte) { return __crc32cb(state, byte); }
};

bool has_crc() {
#if defined(__linux__)
  constexpr unsigned long kHwcapCrc32 = 1ul << 7;  // HWCAP_CRC32 of the Linux ABI for AArch64
  return (getauxval(AT_HWCAP) & kHwcapCrc32) != 0;
#elif defined(__APPLE__)
  return true;  // every 64-bit Apple processor that runs Python has it
#else
  return false;
#endif
}

}  // namespace

Update arm_kernel() { return has_crc() ? update_interleaved<Arm> : nullptr; }

}  // namespace ckpt::crc32c
#else
namespace ckpt::crc32c {
Update arm_kernel() { return nullptr; }
}  // namespace ckpt::crc32c
#endif
