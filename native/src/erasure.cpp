// Make blocks from blocks by a matrix over GF(2^8), tile by tile, and sum both while they are in the processor's cache. In:
// addresses, coefficients. Out: targets and checksums. Never reads beyond the bytes that a source has, and touches nothing
// before all arguments are checked.
//
// A tile ends where a source ends, so that within one every source is there whole or not at all: a source that is not there is
// left out of the rows. This needs no zeros to read and no memory to put them in.

#include <algorithm>
#include <cstring>

#include "ckpt_core.h"
#include "crc32c_kernels.h"
#include "erasure_kernels.h"

namespace ckpt::erasure {

bool Rows::all_ones() const {
  return std::all_of(coefficients, coefficients + num_targets * num_sources, [](uint8_t c) { return c == 1; });
}

const Coder* coder_of(ckpt_coder coder) {
  switch (coder) {
    case CKPT_CODER_AUTO: return coder_of(ckpt_coder_auto());
    case CKPT_CODER_PORTABLE: return portable_coder();
    case CKPT_CODER_ISAL: return isal_coder();
  }
  return nullptr;
}

namespace {

constexpr int64_t kTileAlign = 64;

uint8_t* pointer_to(uint64_t address) { return reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(address)); }

bool has_null(const ckpt_coding& coding) {
  if (!coding.source || !coding.source_bytes) return true;
  return coding.num_targets > 0 && (!coding.target || !coding.coefficients);
}

bool sizes_fit(const ckpt_coding& coding) {
  return coding.num_sources >= 1 && coding.num_sources <= CKPT_CODE_SOURCES_MAX && coding.num_targets >= 0 &&
         coding.num_targets <= CKPT_CODE_TARGETS_MAX && coding.block_bytes >= 0 && coding.tile_bytes >= kTileAlign &&
         coding.tile_bytes <= CKPT_CODE_TILE_BYTES_MAX && coding.tile_bytes % kTileAlign == 0;
}

// Whether `nbytes` at an address are memory at all.
bool is_range(uint64_t address, int64_t nbytes) {
  return nbytes == 0 || (address != 0 && static_cast<uint64_t>(nbytes) <= UINTPTR_MAX - address);
}

bool overlap(uint64_t a, int64_t a_bytes, uint64_t b, int64_t b_bytes) {
  return a_bytes > 0 && b_bytes > 0 && a < b + static_cast<uint64_t>(b_bytes) && b < a + static_cast<uint64_t>(a_bytes);
}

ckpt_status check(const ckpt_coding& coding, int32_t* bad_source, int32_t* bad_target) {
  for (int32_t s = 0; s < coding.num_sources; ++s) {
    const int64_t nbytes = coding.source_bytes[s];
    if (nbytes >= 0 && nbytes <= coding.block_bytes && is_range(coding.source[s], nbytes)) continue;
    *bad_source = s;
    return CKPT_SOURCE_OUT_OF_BOUNDS;
  }
  for (int32_t r = 0; r < coding.num_targets; ++r) {
    *bad_target = r;
    const uint64_t target = coding.target[r];
    if (!is_range(target, coding.block_bytes)) return CKPT_TARGET_OUT_OF_BOUNDS;
    for (int32_t s = 0; s < coding.num_sources; ++s)
      if (overlap(target, coding.block_bytes, coding.source[s], coding.source_bytes[s])) return CKPT_TARGET_OVERLAPS;
    for (int32_t other = 0; other < r; ++other)
      if (overlap(target, coding.block_bytes, coding.target[other], coding.block_bytes)) return CKPT_TARGET_OVERLAPS;
  }
  *bad_target = -1;
  return CKPT_OK;
}

// One call: its rows for the sources that are there in the current tile.
class Run {
 public:
  Run(const Coder& coder, crc32c::Update update, const ckpt_coding& coding, uint32_t* source_crcs, uint32_t* target_crcs)
      : coder_(coder), update_(update), coding_(coding), source_crcs_(source_crcs), target_crcs_(target_crcs) {}

  void all() {
    if (source_crcs_) std::fill_n(source_crcs_, coding_.num_sources, 0u);
    if (target_crcs_) std::fill_n(target_crcs_, coding_.num_targets, 0u);
    int64_t next_end = 0;  // the tile at which some source ends and the rows change
    for (int64_t at = 0; at < coding_.block_bytes;) {
      if (at == next_end) next_end = choose(at);
      const int64_t stop = std::min(next_end, (at / coding_.tile_bytes + 1) * coding_.tile_bytes);
      tile(at, stop - at);
      at = stop;
    }
  }

 private:
  // Take the sources that are there at byte `at`; returns where the first of them ends.
  int64_t choose(int64_t at) {
    int64_t end = coding_.block_bytes;
    rows_.num_sources = 0;
    for (int32_t s = 0; s < coding_.num_sources; ++s)
      if (coding_.source_bytes[s] > at) {
        end = std::min(end, coding_.source_bytes[s]);
        chosen_[rows_.num_sources++] = s;
      }
    rows_.num_targets = coding_.num_targets;
    rows_.add = coding_.add != 0;
    for (int r = 0; r < rows_.num_targets; ++r)
      for (int i = 0; i < rows_.num_sources; ++i)
        rows_.coefficients[r * rows_.num_sources + i] = coding_.coefficients[r * coding_.num_sources + chosen_[i]];
    if (rows_.num_sources > 0 && rows_.num_targets > 0) coder_.prepare(&rows_);
    return end;
  }

  void tile(int64_t at, int64_t nbytes) {
    uint8_t *sources[CKPT_CODE_SOURCES_MAX], *targets[CKPT_CODE_TARGETS_MAX];
    for (int i = 0; i < rows_.num_sources; ++i) {
      sources[i] = pointer_to(coding_.source[chosen_[i]]) + at;
      if (source_crcs_) sum(sources[i], nbytes, &source_crcs_[chosen_[i]]);
    }
    for (int r = 0; r < rows_.num_targets; ++r) targets[r] = pointer_to(coding_.target[r]) + at;
    if (rows_.num_targets == 0) return;
    if (rows_.num_sources > 0) {
      coder_.encode(rows_, sources, targets, nbytes);
    } else if (!rows_.add) {
      for (int r = 0; r < rows_.num_targets; ++r) std::memset(targets[r], 0, static_cast<size_t>(nbytes));
    }
    if (target_crcs_)
      for (int r = 0; r < rows_.num_targets; ++r) sum(targets[r], nbytes, &target_crcs_[r]);
  }

  void sum(const uint8_t* data, int64_t nbytes, uint32_t* crc) const {
    *crc = ~update_(~*crc, data, static_cast<size_t>(nbytes));
  }

  const Coder& coder_;
  const crc32c::Update update_;
  const ckpt_coding& coding_;
  uint32_t* source_crcs_;
  uint32_t* target_crcs_;
  int32_t chosen_[CKPT_CODE_SOURCES_MAX];
  Rows rows_;
};

}  // namespace
}  // namespace ckpt::erasure

int32_t ckpt_coder_available(ckpt_coder coder) { return ckpt::erasure::coder_of(coder) != nullptr ? 1 : 0; }

ckpt_coder ckpt_coder_auto(void) { return ckpt::erasure::isal_coder() ? CKPT_CODER_ISAL : CKPT_CODER_PORTABLE; }

ckpt_status ckpt_code_blocks(ckpt_coder coder, ckpt_kernel kernel, const ckpt_coding* coding, uint32_t* source_crcs,
                             uint32_t* target_crcs, int32_t* bad_source, int32_t* bad_target) {
  using namespace ckpt;
  using namespace ckpt::erasure;
  if (!coding || !bad_source || !bad_target) return CKPT_BAD_ARGUMENT;
  *bad_source = *bad_target = -1;
  if (!sizes_fit(*coding) || has_null(*coding)) return CKPT_BAD_ARGUMENT;
  const Coder* chosen = coder_of(coder);
  crc32c::Update update = crc32c::kernel_of(kernel);
  if (!chosen || !update) return CKPT_NO_KERNEL;
  if (kernel == CKPT_KERNEL_AUTO && chosen->sum) update = chosen->sum;
  const ckpt_status status = check(*coding, bad_source, bad_target);
  if (status == CKPT_OK) Run(*chosen, update, *coding, source_crcs, target_crcs).all();
  return status;
}
