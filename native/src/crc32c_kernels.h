// The CRC-32C kernels. Each goes on from a raw register (no inversion before or after) over `nbytes` bytes and returns it.
#ifndef CKPT_CRC32C_KERNELS_H
#define CKPT_CRC32C_KERNELS_H

#include <cstddef>
#include <cstdint>

#include "ckpt_core.h"

namespace ckpt::crc32c {

uint32_t update_table(uint32_t state, const unsigned char* data, size_t nbytes);

using Update = uint32_t (*)(uint32_t, const unsigned char*, size_t);
Update sse42_kernel();  // null when not built or not on this processor
Update arm_kernel();    // null when not built or not on this processor
Update kernel_of(ckpt_kernel kernel);  // null when not there

}  // namespace ckpt::crc32c

#endif
