// The inner loops of merging, over runs of elements that fit into a processor's cache. Included once per instruction set by a file
// that defines CKPT_LOOPS_NAME and is compiled for it without fused multiply-add; all of it is private to that file but for `table`.
//
// Every loop gives the same bits in each of them: it has no sum over elements, or one whose order is spelled out.

#include <cstdint>
#include <cstring>

#include "ckpt_core.h"
#include "merge_codec.h"
#include "merge_kernels.h"

namespace ckpt::merge {
namespace {

template <class Codec>
typename Codec::Bits load(const void* source, int64_t i) {
  typename Codec::Bits bits;
  std::memcpy(&bits, static_cast<const unsigned char*>(source) + i * static_cast<int64_t>(sizeof(bits)), sizeof(bits));
  return bits;
}

// Calls `make` with the codec of a dtype; `otherwise` for a number that is none.
template <class Result, class Make>
Result with_codec(ckpt_float dtype, Result otherwise, Make make) {
  switch (dtype) {
    case CKPT_F64: return make(F64{});
    case CKPT_F32: return make(F32{});
    case CKPT_F16: return make(F16{});
    case CKPT_BF16: return make(Bf16{});
    case CKPT_F8_E4M3FN: return make(E4m3fn{});
    case CKPT_F8_E5M2: return make(E5m2{});
    case CKPT_F8_E4M3FNUZ: return make(E4m3fnuz{});
    case CKPT_F8_E5M2FNUZ: return make(E5m2fnuz{});
  }
  return otherwise;
}

void add(ckpt_float dtype, const void* source, int64_t n, double weight, bool first, double* sum) {
  with_codec(dtype, 0, [&](auto codec) {
    using Codec = decltype(codec);
    if (first)
      for (int64_t i = 0; i < n; ++i) sum[i] = weight * Codec::widen(load<Codec>(source, i));
    else
      for (int64_t i = 0; i < n; ++i) sum[i] += weight * Codec::widen(load<Codec>(source, i));
    return 0;
  });
}

void add_plain(ckpt_float dtype, const void* source, int64_t n, bool first, double* sum) {
  with_codec(dtype, 0, [&](auto codec) {
    using Codec = decltype(codec);
    if (first)
      for (int64_t i = 0; i < n; ++i) sum[i] = Codec::widen(load<Codec>(source, i));
    else
      for (int64_t i = 0; i < n; ++i) sum[i] += Codec::widen(load<Codec>(source, i));
    return 0;
  });
}

void subtract(const double* base, int64_t n, double* values) {
  for (int64_t i = 0; i < n; ++i) values[i] -= base[i];
}

void divide(double divisor, int64_t n, double* values) {
  for (int64_t i = 0; i < n; ++i) values[i] /= divisor;
}

bool put(ckpt_float dtype, const double* values, int64_t n, void* target) {
  return with_codec(dtype, false, [&](auto codec) {
    using Codec = decltype(codec);
    using Bits = typename Codec::Bits;
    auto* out = static_cast<unsigned char*>(target);
    Bits bad = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Bits bits = Codec::narrow(values[i]);
      std::memcpy(out + i * static_cast<int64_t>(sizeof(bits)), &bits, sizeof(bits));
      bad = static_cast<Bits>(bad | (Codec::finite(bits) ? 0 : 1));
    }
    return bad == 0;
  });
}

bool finite(ckpt_float dtype, const void* source, int64_t n) {
  return with_codec(dtype, false, [&](auto codec) {
    using Codec = decltype(codec);
    using Bits = typename Codec::Bits;
    Bits bad = 0;
    for (int64_t i = 0; i < n; ++i) bad = static_cast<Bits>(bad | (Codec::finite(load<Codec>(source, i)) ? 0 : 1));
    return bad == 0;
  });
}

uint32_t magnitude(double value) { return bits_as<uint32_t>(static_cast<float>(value)) & 0x7FFFFFFFu; }

void magnitudes(const double* values, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = magnitude(values[i]);
}

// Eight sums that go on from block to block would depend on the blocks' lengths; these begin at zero in each block.
double fold(const double* lanes) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

double dot(const double* x, const double* y, int64_t n) {
  double lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += x[i + lane] * y[i + lane];
  for (; i < n; ++i) lanes[i % 8] += x[i] * y[i];
  return fold(lanes);
}

double total(const double* x, int64_t n, bool of_sizes) {
  double lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t i = 0;
  if (of_sizes) {
    for (; i + 8 <= n; i += 8)
      for (int lane = 0; lane < 8; ++lane) lanes[lane] += x[i + lane] < 0 ? -x[i + lane] : x[i + lane];
    for (; i < n; ++i) lanes[i % 8] += x[i] < 0 ? -x[i] : x[i];
  } else {
    for (; i + 8 <= n; i += 8)
      for (int lane = 0; lane < 8; ++lane) lanes[lane] += x[i + lane];
    for (; i < n; ++i) lanes[i % 8] += x[i];
  }
  return fold(lanes);
}

double greatest(const double* x, int64_t n) {
  double out = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double size = x[i] < 0 ? -x[i] : x[i];
    out = size > out ? size : out;
  }
  return out;
}

// What TIES keeps of one source: its weighted deltas, zero where they are too small; and their sum.
void trim(const double* deltas, int64_t n, uint32_t threshold, double weight, bool first, double* kept, double* sum) {
  for (int64_t i = 0; i < n; ++i) {
    const double value = magnitude(deltas[i]) >= threshold ? weight * deltas[i] : 0.0;
    kept[i] = value;
    sum[i] = first ? value : sum[i] + value;
  }
}

int64_t signs(const double* sum, int64_t n) {
  int64_t out = 0;
  for (int64_t i = 0; i < n; ++i) out += (sum[i] > 0 ? 1 : 0) - (sum[i] < 0 ? 1 : 0);
  return out;
}

// `sums` become the elected signs: above, below or at zero.
void elect(double zero_sign, int64_t n, double* sums) {
  for (int64_t i = 0; i < n; ++i) sums[i] = sums[i] == 0.0 ? zero_sign : sums[i];
}

void agree(const double* kept, const double* elected, int64_t n, double weight, bool greatest_one, double* merged, double* share) {
  for (int64_t i = 0; i < n; ++i) {
    const bool same = (kept[i] > 0 && elected[i] > 0) || (kept[i] < 0 && elected[i] < 0);
    const double value = same ? kept[i] : 0.0;
    const double size = value < 0 ? -value : value, had = merged[i] < 0 ? -merged[i] : merged[i];
    merged[i] = greatest_one ? (size > had ? value : merged[i]) : merged[i] + value;
    share[i] += same ? weight : 0.0;
  }
}

void join(const double* base, const double* share, double scale, bool mean, int64_t n, double* merged) {
  for (int64_t i = 0; i < n; ++i) {
    const double one = mean && share[i] != 0.0 ? merged[i] / share[i] : merged[i];
    const double moved = base[i] + scale * one;
    merged[i] = one == 0.0 ? base[i] : moved;  // -0 of the base stays where nothing is added
  }
}

struct Word4 {
  uint32_t word[4];
};

Word4 philox(uint64_t key, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  Word4 x{{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * x.word[0], b = uint64_t{0xCD9E8D57u} * x.word[2];
    x = {{static_cast<uint32_t>(b >> 32) ^ x.word[1] ^ k0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ x.word[3] ^ k1, static_cast<uint32_t>(a)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return x;
}

void uniform(uint64_t key, uint64_t first, int64_t n, double* out) {
  int64_t i = 0;
  while (i < n) {
    const uint64_t number = first + static_cast<uint64_t>(i);
    const Word4 words = philox(key, number / 4);
    for (uint64_t lane = number % 4; lane < 4 && i < n; ++lane, ++i) out[i] = words.word[lane] * (1.0 / 4294967296.0);
  }
}

}  // namespace

const Loops* CKPT_LOOPS_NAME() {
  static constexpr Loops table{add,  add_plain, subtract, divide, put,   finite, magnitudes, dot,
                               total, greatest,  trim,     signs,  elect, agree,  join,       uniform};
  return &table;
}

}  // namespace ckpt::merge
