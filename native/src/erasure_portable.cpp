// Erasure coding in plain C++: a table of 256 products per coefficient, made of two of 16. In: sources of one tile. Out: its
// targets. What the other coders are compared with.

#include <cstddef>
#include <cstring>

#include "erasure_kernels.h"
#include "gf256.h"

namespace ckpt::erasure {
namespace {

constexpr int64_t kStripBytes = 16 * 1024;  // of one source at a time: it and a target stay in the first-level cache

void add_source(const uint8_t* source, uint8_t* target, int64_t nbytes) {
  int64_t at = 0;
  for (; at + 8 <= nbytes; at += 8) {  // compilers make vectors of this
    uint64_t a, b;
    std::memcpy(&a, source + at, 8);
    std::memcpy(&b, target + at, 8);
    b ^= a;
    std::memcpy(target + at, &b, 8);
  }
  for (; at < nbytes; ++at) target[at] ^= source[at];
}

void add_product(uint8_t coefficient, const uint8_t* source, uint8_t* target, int64_t nbytes) {
  uint8_t low[16], high[16], product[256];
  for (unsigned i = 0; i < 16; ++i) {
    low[i] = gf256::multiply(coefficient, static_cast<uint8_t>(i));
    high[i] = gf256::multiply(coefficient, static_cast<uint8_t>(i << 4));
  }
  for (unsigned i = 0; i < 256; ++i) product[i] = low[i & 15] ^ high[i >> 4];
  for (int64_t at = 0; at < nbytes; ++at) target[at] ^= product[source[at]];
}

void prepare(Rows*) {}

void encode(const Rows& rows, uint8_t* const* sources, uint8_t* const* targets, int64_t nbytes) {
  for (int64_t at = 0; at < nbytes; at += kStripBytes) {
    const int64_t strip = nbytes - at < kStripBytes ? nbytes - at : kStripBytes;
    for (int r = 0; r < rows.num_targets; ++r) {
      uint8_t* target = targets[r] + at;
      if (!rows.add) std::memset(target, 0, static_cast<size_t>(strip));
      for (int s = 0; s < rows.num_sources; ++s) {
        const uint8_t coefficient = rows.coefficients[r * rows.num_sources + s];
        if (coefficient == 1) add_source(sources[s] + at, target, strip);
        else if (coefficient != 0) add_product(coefficient, sources[s] + at, target, strip);
      }
    }
  }
}

}  // namespace

const Coder* portable_coder() {
  static constexpr Coder coder{prepare, encode, nullptr};
  return &coder;
}

}  // namespace ckpt::erasure
