// Float dtypes to double and back, one element at a time, in code that compilers vectorise. Included by merge_loops.h alone.
//
// Widening is exact. Narrowing rounds a double once, to nearest even: a double is first rounded to a float *to odd* (when inexact,
// the last bit is set), which keeps enough of it for the second rounding to be as if there had been only one.
#ifndef CKPT_MERGE_CODEC_H
#define CKPT_MERGE_CODEC_H

#include <cstdint>
#include <cstring>

namespace ckpt {
namespace {  // one copy per instruction set: nothing here may be shared between files that are compiled for different ones

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
}

inline float power_of_two(int exponent) { return bits_as<float>(static_cast<uint32_t>(exponent + 127) << 23); }

inline uint32_t odd_float_bits(double value) {
  const float nearest = static_cast<float>(value);
  const double back = nearest;
  const double size = value < 0 ? -value : value, back_size = back < 0 ? -back : back;
  uint32_t bits = bits_as<uint32_t>(nearest);
  bits -= back_size > size ? 1u : 0u;
  return bits | (back != value ? 1u : 0u);
}

struct F64 {
  using Bits = uint64_t;
  static double widen(Bits bits) { return bits_as<double>(bits); }
  static Bits narrow(double value) { return bits_as<Bits>(value); }
  static bool finite(Bits bits) { return (bits & 0x7FF0000000000000u) != 0x7FF0000000000000u; }
};

struct F32 {
  using Bits = uint32_t;
  static double widen(Bits bits) { return bits_as<float>(bits); }
  static Bits narrow(double value) { return bits_as<Bits>(static_cast<float>(value)); }
  static bool finite(Bits bits) { return (bits & 0x7F800000u) != 0x7F800000u; }
};

struct Bf16 {
  using Bits = uint16_t;
  static double widen(Bits bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }
  static Bits narrow(double value) {
    const uint32_t bits = odd_float_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return static_cast<Bits>((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
  }
  static bool finite(Bits bits) { return (bits & 0x7F80u) != 0x7F80u; }
};

// A dtype of `8 * sizeof(BitsType)` bits with kMantissa bits of mantissa. kTop: the code of what comes after the greatest finite
// number (infinity, or NaN where there is none). kUnsignedZero: the code of -0 is NaN's.
template <class BitsType, int kMantissa, int kBias, uint32_t kTop, uint32_t kNan, bool kUnsignedZero>
struct Small {
  using Bits = BitsType;
  static constexpr int kWidth = 8 * sizeof(Bits);
  static constexpr uint32_t kSign = 1u << (kWidth - 1);
  static constexpr int kShift = 23 - kMantissa;

  static double widen(Bits bits) {
    const uint32_t size = bits & (kSign - 1), sign = static_cast<uint32_t>(bits & kSign) << (32 - kWidth);
    const float value = bits_as<float>(size << kShift) * power_of_two(127 - kBias);
    const bool special = kUnsignedZero ? bits == kSign : size >= kTop;
    const uint32_t whole = !kUnsignedZero && kTop != kNan && size == kTop ? 0x7F800000u : 0x7FC00000u;
    return bits_as<float>((special ? whole : bits_as<uint32_t>(value)) | (kUnsignedZero && special ? 0u : sign));
  }

  static Bits narrow(double value) {
    const uint32_t bits = odd_float_bits(value), size = bits & 0x7FFFFFFFu, sign = (bits >> 31) * kSign;
    constexpr uint32_t kRebias = static_cast<uint32_t>(127 - kBias) << 23;
    constexpr uint32_t kLeastNormal = kRebias + (1u << 23);
    const uint32_t normal = (size - kRebias + ((1u << (kShift - 1)) - 1u) + ((size >> kShift) & 1u)) >> kShift;
    // Added to this power of two, whose last bit is worth the least subnormal, a smaller number is rounded by the processor.
    const float magic = power_of_two(1 - kBias - kMantissa + 23);
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(size) + magic) - bits_as<uint32_t>(magic);
    uint32_t code = size < kLeastNormal ? subnormal : normal;
    code = size >= 0x7F800000u || code > kTop ? kTop : code;
    code = size > 0x7F800000u ? kNan : code;
    if (kUnsignedZero) return static_cast<Bits>(code >= kTop ? kSign : code == 0 ? 0 : code | sign);
    return static_cast<Bits>(code | sign);
  }

  static bool finite(Bits bits) { return kUnsignedZero ? bits != kSign : (bits & (kSign - 1)) < kTop; }
};

using F16 = Small<uint16_t, 10, 15, 0x7C00, 0x7E00, false>;
using E5m2 = Small<uint8_t, 2, 15, 0x7C, 0x7E, false>;
using E4m3fn = Small<uint8_t, 3, 7, 0x7F, 0x7F, false>;
using E4m3fnuz = Small<uint8_t, 3, 8, 0x80, 0x80, true>;
using E5m2fnuz = Small<uint8_t, 2, 16, 0x80, 0x80, true>;

}  // namespace
}  // namespace ckpt

#endif
