// Arithmetic in GF(2^8) with polynomial 0x11D, of which 2 is a generator. In and out: bytes. The tables are made at compile time.
#ifndef CKPT_GF256_H
#define CKPT_GF256_H

#include <array>
#include <cstdint>

namespace ckpt::gf256 {

constexpr unsigned kPolynomial = 0x11D;

struct Tables {
  std::array<uint8_t, 510> power{};  // power[i] = 2^i, twice around so that a sum of two logarithms needs no remainder
  std::array<uint8_t, 256> logarithm{};
};

constexpr Tables make_tables() {
  Tables tables;
  unsigned value = 1;
  for (unsigned i = 0; i < 255; ++i) {
    tables.power[i] = tables.power[i + 255] = static_cast<uint8_t>(value);
    tables.logarithm[value] = static_cast<uint8_t>(i);
    value <<= 1;
    if (value & 0x100) value ^= kPolynomial;
  }
  return tables;
}

inline constexpr Tables kTables = make_tables();

constexpr uint8_t multiply(uint8_t a, uint8_t b) {
  if (a == 0 || b == 0) return 0;
  return kTables.power[kTables.logarithm[a] + kTables.logarithm[b]];
}

// Of `a` that is not 0.
constexpr uint8_t inverse(uint8_t a) { return kTables.power[255 - kTables.logarithm[a]]; }

static_assert(multiply(2, 0x80) == 0x1D && multiply(7, inverse(7)) == 1 && inverse(4) == 71);

}  // namespace ckpt::gf256

#endif
