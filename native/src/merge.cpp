// Weighted sums and finiteness: choose the loops, check what came in, share blocks out to threads.

#include <algorithm>
#include <atomic>
#include <cmath>

#include "ckpt_core.h"
#include "merge_kernels.h"
#include "merge_threads.h"
#include "workers.h"

namespace ckpt::merge {

const Loops* loops_of(ckpt_loops loops) {
  switch (loops) {
    case CKPT_LOOPS_AUTO: return loops_of(ckpt_loops_auto());
    case CKPT_LOOPS_PORTABLE: return portable_loops();
    case CKPT_LOOPS_AVX2: return avx2_loops();
    case CKPT_LOOPS_AVX512: return avx512_loops();
  }
  return nullptr;
}

int64_t itemsize_of(ckpt_float dtype) {
  switch (dtype) {
    case CKPT_F64: return 8;
    case CKPT_F32: return 4;
    case CKPT_F16:
    case CKPT_BF16: return 2;
    case CKPT_F8_E4M3FN:
    case CKPT_F8_E5M2:
    case CKPT_F8_E4M3FNUZ:
    case CKPT_F8_E5M2FNUZ: return 1;
  }
  return 0;
}

namespace {

constexpr int64_t kBlock = CKPT_SUM_BLOCK;      // 16 KiB of sums: they stay in the first-level cache
constexpr int64_t kUnit = 8 * kBlock;           // what a thread takes at a time
constexpr int64_t kThreadElements = 64 * 1024;  // a thread that is started for less costs more than it does

const void* at(uint64_t address, int64_t bytes) {
  return reinterpret_cast<const void*>(static_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes));
}

double* doubles_at(uint64_t address, int64_t index) {
  return reinterpret_cast<double*>(static_cast<uintptr_t>(address)) + index;
}

// a + b = sum + error, exactly (Knuth).
double two_sum(double a, double b, double* error) {
  const double sum = a + b, part = sum - a;
  *error = (a - (sum - part)) + (b - part);
  return sum;
}

// a * b = product + error (Dekker, Veltkamp's split); the error is given up where it overflows.
double two_product(double a, double b, double* error) {
  constexpr double kSplit = 134217729.0;  // 2^27 + 1
  const double product = a * b, ca = kSplit * a, cb = kSplit * b;
  const double ah = ca - (ca - a), bh = cb - (cb - b), al = a - ah, bl = b - bh;
  const double found = ((ah * bh - product) + ah * bl + al * bh) + al * bl;
  *error = std::isfinite(found) ? found : 0.0;
  return product;
}

// high + low += weight * x
void add_exact(double weight, double x, bool first, double* high, double* low) {
  double product_error, sum_error;
  const double product = two_product(weight, x, &product_error);
  if (first) {
    *high = product;
    *low = product_error;
    return;
  }
  *high = two_sum(*high, product, &sum_error);
  *low += sum_error + product_error;
}

// (high + low) / (divisor + rest), rounded as if there were no more bits to come.
double finish_exact(double high, double low, double divisor, double rest) {
  if (!std::isfinite(high)) return high / divisor;
  if (divisor == 1.0 && rest == 0.0) return low == 0.0 ? high : high + low;
  double error;
  const double quotient = high / divisor;
  const double product = two_product(quotient, divisor, &error);
  const double left = (((high - product) - error) + low) - quotient * rest;
  return left == 0.0 || !std::isfinite(left) ? quotient : quotient + left / divisor;
}

class Mixer {
 public:
  Mixer(const Loops* loops, const ckpt_mix_parts& parts, uint8_t* bad) : loops_(loops), parts_(parts), bad_(bad) {}

  void run() {
    int64_t part = 0, first_unit = 0;  // of the part that the last claim fell into: claims of one thread only rise
    for (;;) {
      const int64_t unit = claimed_.fetch_add(1);
      while (part < parts_.num_parts && unit >= first_unit + units_of(parts_.length[part])) first_unit += units_of(parts_.length[part++]);
      if (part >= parts_.num_parts) return;
      const int64_t start = (unit - first_unit) * kUnit, stop = std::min(start + kUnit, parts_.length[part]);
      for (int64_t from = start; from < stop; from += kBlock) block(part, from, std::min(kBlock, stop - from));
    }
  }

  static int64_t units_of(int64_t length) { return length / kUnit + (length % kUnit != 0); }

 private:
  void block(int64_t part, int64_t from, int64_t n) {
    if (parts_.exact[part]) return block_exact(part, from, n);
    double own[kBlock];
    double* sums = parts_.sum[part] ? doubles_at(parts_.sum[part], from) : own;
    bool first = !parts_.go_on;
    for (int32_t s = 0; s < parts_.num_sources; ++s) {
      const int64_t i = part * parts_.num_sources + s;
      if (!parts_.source[i]) continue;
      const auto dtype = static_cast<ckpt_float>(parts_.dtype[i]);
      const void* source = at(parts_.source[i], from * itemsize_of(dtype));
      if (parts_.weight[i] == 1.0)
        loops_->add_plain(dtype, source, n, first, sums);
      else
        loops_->add(dtype, source, n, parts_.weight[i], first, sums);
      first = false;
    }
    if (!parts_.target[part]) return;
    const double divisor = parts_.divisor[2 * part];
    if (divisor != 1.0) loops_->divide(divisor, n, sums);
    put(part, from, n, sums);
  }

  void block_exact(int64_t part, int64_t from, int64_t n) {
    double high[kBlock], low[kBlock], values[kBlock];
    double* kept = parts_.sum[part] ? doubles_at(parts_.sum[part], 2 * from) : nullptr;
    if (parts_.go_on)
      for (int64_t i = 0; i < n; ++i) high[i] = kept[2 * i], low[i] = kept[2 * i + 1];
    bool first = !parts_.go_on;
    for (int32_t s = 0; s < parts_.num_sources; ++s) {
      const int64_t i = part * parts_.num_sources + s;
      if (!parts_.source[i]) continue;
      const auto dtype = static_cast<ckpt_float>(parts_.dtype[i]);
      loops_->add_plain(dtype, at(parts_.source[i], from * itemsize_of(dtype)), n, true, values);
      for (int64_t j = 0; j < n; ++j) add_exact(parts_.weight[i], values[j], first, &high[j], &low[j]);
      first = false;
    }
    if (kept)
      for (int64_t i = 0; i < n; ++i) kept[2 * i] = high[i], kept[2 * i + 1] = low[i];
    if (!parts_.target[part]) return;
    for (int64_t i = 0; i < n; ++i)
      values[i] = finish_exact(high[i], low[i], parts_.divisor[2 * part], parts_.divisor[2 * part + 1]);
    put(part, from, n, values);
  }

  void put(int64_t part, int64_t from, int64_t n, const double* values) {
    const auto dtype = static_cast<ckpt_float>(parts_.target_dtype[part]);
    void* target = const_cast<void*>(at(parts_.target[part], from * itemsize_of(dtype)));
    if (!loops_->put(dtype, values, n, target)) __atomic_store_n(&bad_[part], uint8_t{1}, __ATOMIC_RELAXED);
  }

  const Loops* loops_;
  const ckpt_mix_parts& parts_;
  uint8_t* bad_;
  std::atomic<int64_t> claimed_{0};
};

bool has_null(const ckpt_mix_parts& parts, const uint8_t* bad) {
  if (parts.num_parts < 0 || parts.num_sources < 1 || parts.num_sources > CKPT_MERGE_SOURCES_MAX || parts.num_threads < 1) return true;
  if (parts.num_parts == 0) return false;
  return !parts.source || !parts.dtype || !parts.weight || !parts.length || !parts.divisor || !parts.sum || !parts.target ||
         !parts.target_dtype || !parts.exact || !bad;
}

bool sound(const ckpt_mix_parts& parts, int64_t part) {
  if (parts.length[part] < 0 || (parts.go_on && !parts.sum[part]) || (!parts.target[part] && !parts.sum[part])) return false;
  if (parts.target[part] && itemsize_of(static_cast<ckpt_float>(parts.target_dtype[part])) == 0) return false;
  bool any = parts.go_on != 0;
  for (int32_t s = 0; s < parts.num_sources; ++s) {
    const int64_t i = part * parts.num_sources + s;
    if (!parts.source[i]) continue;
    if (itemsize_of(static_cast<ckpt_float>(parts.dtype[i])) == 0) return false;
    any = true;
  }
  return any;
}

}  // namespace
}  // namespace ckpt::merge

int32_t ckpt_loops_available(ckpt_loops loops) { return ckpt::merge::loops_of(loops) != nullptr ? 1 : 0; }

ckpt_loops ckpt_loops_auto(void) {
  if (ckpt::merge::avx512_loops()) return CKPT_LOOPS_AVX512;
  if (ckpt::merge::avx2_loops()) return CKPT_LOOPS_AVX2;
  return CKPT_LOOPS_PORTABLE;
}

ckpt_status ckpt_mix(ckpt_loops loops, const ckpt_mix_parts* parts, uint8_t* bad, int64_t* bad_part) {
  using namespace ckpt::merge;
  if (!parts || !bad_part) return CKPT_BAD_ARGUMENT;
  *bad_part = -1;
  if (has_null(*parts, bad)) return CKPT_BAD_ARGUMENT;
  const Loops* chosen = loops_of(loops);
  if (!chosen) return CKPT_NO_KERNEL;
  int64_t elements = 0;
  for (int64_t part = 0; part < parts->num_parts; ++part) {
    if (!sound(*parts, part)) {
      *bad_part = part;
      return CKPT_BAD_ARGUMENT;
    }
    elements += std::min<int64_t>(parts->length[part], int64_t{1} << 40);
  }
  for (int64_t part = 0; part < parts->num_parts; ++part)
    if (parts->target[part]) bad[part] = 0;
  Mixer mixer(chosen, *parts, bad);
  const int64_t threads = std::min<int64_t>(parts->num_threads, std::max<int64_t>(1, elements / kThreadElements));
  ckpt::run_workers(threads, [&mixer] {
    const KeepDenormals keep;
    mixer.run();
  });
  return CKPT_OK;
}

ckpt_status ckpt_all_finite(ckpt_loops loops, uint64_t source, ckpt_float dtype, int64_t length, int32_t* out) {
  using namespace ckpt::merge;
  if (!out || length < 0 || (length > 0 && !source) || itemsize_of(dtype) == 0) return CKPT_BAD_ARGUMENT;
  const Loops* chosen = loops_of(loops);
  if (!chosen) return CKPT_NO_KERNEL;
  *out = 1;
  for (int64_t from = 0; from < length && *out; from += kUnit)
    *out = chosen->finite(dtype, at(source, from * itemsize_of(dtype)), std::min(kUnit, length - from)) ? 1 : 0;
  return CKPT_OK;
}

ckpt_status ckpt_uniform(ckpt_loops loops, uint64_t key, uint64_t first, int64_t length, double* out) {
  if (length < 0 || (length > 0 && !out)) return CKPT_BAD_ARGUMENT;
  const ckpt::merge::Loops* chosen = ckpt::merge::loops_of(loops);
  if (!chosen) return CKPT_NO_KERNEL;
  chosen->uniform(key, first, length, out);
  return CKPT_OK;
}
