// Erasure coding in plain C++: a table of 256 products per coefficient, made of two of 16. In: sources of one tile. Out: its
// targets. What the other coders are compared with.

#include <cstddef>
#include <cstring>

#include "erasure_kernels.h"
#include "gf256.h"

namespace ckpt::erasure {
namespace {

constexpr int64_t kStripBytes = 16 * 1024;  // of one source at a time: it and a target stay in the first-level cache

uint64_t word(const uint8_t* from) {
  uint64_t out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

// The exclusive or of `kCount` sources into `target`, or added to it: every byte is read once, whatever its alignment.
template <int kCount, bool kAdd>
void add_few(const uint8_t* const* sources, uint8_t* __restrict target, int64_t nbytes) {
  const uint8_t* __restrict first = sources[0];
  const uint8_t* __restrict second = sources[kCount > 1 ? 1 : 0];
  const uint8_t* __restrict third = sources[kCount > 2 ? 2 : 0];
  const uint8_t* __restrict fourth = sources[kCount > 3 ? 3 : 0];
  int64_t at = 0;
  for (; at + 8 <= nbytes; at += 8) {  // compilers make vectors of this
    uint64_t sum = word(first + at);
    if constexpr (kCount > 1) sum ^= word(second + at);
    if constexpr (kCount > 2) sum ^= word(third + at);
    if constexpr (kCount > 3) sum ^= word(fourth + at);
    if constexpr (kAdd) sum ^= word(target + at);
    std::memcpy(target + at, &sum, sizeof sum);
  }
  for (; at < nbytes; ++at) {
    uint8_t sum = kAdd ? target[at] : 0;
    for (int i = 0; i < kCount; ++i) sum ^= sources[i][at];
    target[at] = sum;
  }
}

template <bool kAdd>
void add_up_to_four(const uint8_t* const* sources, int count, uint8_t* target, int64_t nbytes) {
  if (count == 4) return add_few<4, kAdd>(sources, target, nbytes);
  if (count == 3) return add_few<3, kAdd>(sources, target, nbytes);
  if (count == 2) return add_few<2, kAdd>(sources, target, nbytes);
  add_few<1, kAdd>(sources, target, nbytes);
}

// Set `target` to the exclusive or of the sources, or add that to it.
void add_sources(const uint8_t* const* sources, int count, uint8_t* target, int64_t nbytes, bool add) {
  if (count == 0 && !add) std::memset(target, 0, static_cast<size_t>(nbytes));
  for (int done = 0; done < count; done += 4, add = true) {
    const int some = count - done < 4 ? count - done : 4;
    if (add) add_up_to_four<true>(sources + done, some, target, nbytes);
    else add_up_to_four<false>(sources + done, some, target, nbytes);
  }
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
      const uint8_t* coefficients = rows.coefficients + r * rows.num_sources;
      const uint8_t* alone[CKPT_CODE_SOURCES_MAX];  // those that count as they are
      int count = 0;
      for (int s = 0; s < rows.num_sources; ++s)
        if (coefficients[s] == 1) alone[count++] = sources[s] + at;
      add_sources(alone, count, target, strip, rows.add);
      for (int s = 0; s < rows.num_sources; ++s)
        if (coefficients[s] > 1) add_product(coefficients[s], sources[s] + at, target, strip);
    }
  }
}

}  // namespace

const Coder* portable_coder() {
  static constexpr Coder coder{prepare, encode, nullptr};
  return &coder;
}

}  // namespace ckpt::erasure
