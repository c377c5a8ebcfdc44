// ckpt_write_at with the system call passed in, so that tests can hand in one that fails.
#ifndef CKPT_WRITE_AT_H
#define CKPT_WRITE_AT_H

#include <cstddef>
#include <cstdint>

#include "ckpt_core.h"

namespace ckpt {

using Pwrite = int64_t (*)(int fd, const void* data, size_t nbytes, int64_t offset);  // as pwrite(2), errno included

ckpt_status write_at(int fd, const void* data, int64_t nbytes, int64_t offset, int64_t slice_bytes, int32_t in_flight,
                     Pwrite pwrite, int32_t* direct, int32_t* error);

}  // namespace ckpt

#endif
