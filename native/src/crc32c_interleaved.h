// CRC-32C with a processor's own instruction, three streams at a time: the instruction takes three cycles but one can start in
// every cycle, so one stream alone runs at a third of the speed. The streams' registers are joined by multiplying with x^(8 n).
#ifndef CKPT_CRC32C_INTERLEAVED_H
#define CKPT_CRC32C_INTERLEAVED_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "crc32c_polynomial.h"

namespace ckpt::crc32c {
namespace {  // own copies per file, see crc32c_polynomial.h

constexpr size_t kLongBytes = 8192;  // of one stream: joining costs about 20 ns, a hundredth of these 3 x 8 KiB
constexpr size_t kShortBytes = 256;

constexpr Lookup kLongShift = make_lookup(power_of_bytes(kLongBytes));
constexpr Lookup kShortShift = make_lookup(power_of_bytes(kShortBytes));

inline uint64_t load_word(const unsigned char* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

// Takes all triples of `bytes` long streams off the front of the data.
template <class Instruction>
uint32_t update_triples(uint32_t state, const unsigned char** data, size_t* nbytes, size_t bytes, const Lookup& shift) {
  for (; *nbytes >= 3 * bytes; *data += 3 * bytes, *nbytes -= 3 * bytes) {
    const unsigned char* at = *data;
    uint64_t a = state, b = 0, c = 0;
    for (const unsigned char* stop = at + bytes; at != stop; at += 8) {
      a = Instruction::word(a, load_word(at));
      b = Instruction::word(b, load_word(at + bytes));
      c = Instruction::word(c, load_word(at + 2 * bytes));
    }
    state = multiply_by(shift, static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b);
    state = multiply_by(shift, state) ^ static_cast<uint32_t>(c);
  }
  return state;
}

template <class Instruction>
uint32_t update_interleaved(uint32_t state, const unsigned char* data, size_t nbytes) {
  state = update_triples<Instruction>(state, &data, &nbytes, kLongBytes, kLongShift);
  state = update_triples<Instruction>(state, &data, &nbytes, kShortBytes, kShortShift);
  for (; nbytes >= 8; data += 8, nbytes -= 8) state = static_cast<uint32_t>(Instruction::word(state, load_word(data)));
  for (; nbytes > 0; ++data, --nbytes) state = Instruction::byte(state, *data);
  return state;
}

}  // namespace
}  // namespace ckpt::crc32c

#endif
