// The coders: each makes the targets of one tile from its sources, and gives the same bytes as the others.
#ifndef CKPT_ERASURE_KERNELS_H
#define CKPT_ERASURE_KERNELS_H

#include <cstdint>

#include "ckpt_core.h"
#include "crc32c_kernels.h"

namespace ckpt::erasure {

constexpr int kTableBytes = 32;  // that ISA-L keeps per coefficient

// What stays the same from tile to tile. At least one source and one target.
struct Rows {
  int num_sources;
  int num_targets;
  bool add;
  uint8_t coefficients[CKPT_CODE_TARGETS_MAX * CKPT_CODE_SOURCES_MAX];  // [num_targets, num_sources]
  alignas(64) uint8_t tables[CKPT_CODE_TARGETS_MAX * CKPT_CODE_SOURCES_MAX * kTableBytes];

  bool all_ones() const;
};

struct Coder {
  void (*prepare)(Rows* rows);  // once `coefficients` are set
  void (*encode)(const Rows& rows, uint8_t* const* sources, uint8_t* const* targets, int64_t nbytes);  // > 0, an int
  crc32c::Update sum;  // faster than our own kernels for up to an int of bytes, or null
};

const Coder* portable_coder();
const Coder* isal_coder();  // null when it is neither linked nor found
const Coder* coder_of(ckpt_coder coder);

}  // namespace ckpt::erasure

#endif
