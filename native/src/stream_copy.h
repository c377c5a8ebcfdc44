// Copies that memcpy is slow at: of memory that nobody reads soon, past the processor's caches, and of runs that fit into them. In:
// two ranges that do not overlap. Out: the same bytes, seen by every thread that learns of them afterwards.

#ifndef CKPT_STREAM_COPY_H
#define CKPT_STREAM_COPY_H

#include <cstddef>

namespace ckpt {

constexpr std::size_t kStreamBytesMin = 64 * 1024;  // shorter copies lose more than they gain

// As memcpy.
void stream_copy(std::byte* target, const std::byte* source, std::size_t nbytes);

// As memcpy, into the caches.
void vector_copy(std::byte* target, const std::byte* source, std::size_t nbytes);

}  // namespace ckpt

#endif
