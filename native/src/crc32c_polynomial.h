// Arithmetic of CRC-32C: polynomials over GF(2) modulo the Castagnoli polynomial, bit-reflected (bit 31 is x^0).
// Pure, and all of it can run at compile time. See RFC 3720 appendix B.4 for the polynomial.
#ifndef CKPT_CRC32C_POLYNOMIAL_H
#define CKPT_CRC32C_POLYNOMIAL_H

#include <array>
#include <cstdint>

namespace ckpt::crc32c {
namespace {  // own copies per file: files are compiled for different processors and must not share code

constexpr uint32_t kPolynomial = 0x82F63B78u;
constexpr uint32_t kOne = 0x80000000u;  // the polynomial 1

constexpr uint32_t times_x(uint32_t a) { return (a >> 1) ^ ((a & 1u) ? kPolynomial : 0u); }

constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = times_x(b);
  }
  return product;
}

using Powers = std::array<uint32_t, 64>;

// x^(8 * 2^k) for k = 0, 1, ...: what 2^k zero bytes multiply a checksum by.
constexpr Powers make_byte_powers() {
  Powers powers{};
  uint32_t power = kOne;
  for (int i = 0; i < 8; ++i) power = times_x(power);
  for (auto& entry : powers) {
    entry = power;
    power = multiply(power, power);
  }
  return powers;
}

constexpr Powers kBytePowers = make_byte_powers();

// x^(8 * nbytes)
constexpr uint32_t power_of_bytes(uint64_t nbytes) {
  uint32_t power = kOne;
  for (unsigned k = 0; nbytes != 0; ++k, nbytes >>= 1)
    if (nbytes & 1u) power = multiply(power, kBytePowers[k]);
  return power;
}

using Lookup = std::array<std::array<uint32_t, 256>, 4>;

// Tables that multiply by `factor`: one lookup per byte of the operand.
constexpr Lookup make_lookup(uint32_t factor) {
  Lookup tables{};
  for (unsigned byte = 0; byte < 4; ++byte) {
    // The eight powers of two first, every other value as the sum of a smaller one and one of them.
    for (unsigned bit = 0; bit < 8; ++bit) tables[byte][1u << bit] = multiply(1u << (8 * byte + bit), factor);
    for (unsigned value = 1; value < 256; ++value) {
      const unsigned low = value & (~value + 1u);
      if (low != value) tables[byte][value] = tables[byte][value ^ low] ^ tables[byte][low];
    }
  }
  return tables;
}

inline uint32_t multiply_by(const Lookup& tables, uint32_t a) {
  return tables[0][a & 255u] ^ tables[1][(a >> 8) & 255u] ^ tables[2][(a >> 16) & 255u] ^ tables[3][a >> 24];
}

}  // namespace
}  // namespace ckpt::crc32c

#endif
