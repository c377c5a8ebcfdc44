// Statistics of tiles, and TIES: what needs the elements of several sources, or of a base, side by side.

#include <algorithm>
#include <atomic>

#include "ckpt_core.h"
#include "merge_kernels.h"
#include "merge_threads.h"
#include "workers.h"

namespace ckpt::merge {
namespace {

constexpr int64_t kBlock = CKPT_SUM_BLOCK;
constexpr int64_t kTiesBlock = 256;  // of every source at a time, on the stack of a thread
constexpr int64_t kThreadBlocks = 32;

int64_t blocks_of(int64_t length) { return length / kBlock + (length % kBlock != 0); }

const void* at(uint64_t address, int64_t bytes) {
  return reinterpret_cast<const void*>(static_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes));
}

bool sound(const ckpt_tile* tile) {
  if (!tile || tile->num_sources < 1 || tile->num_sources > CKPT_MERGE_SOURCES_MAX || tile->length < 0) return false;
  if (!tile->source || !tile->dtype || tile->num_threads < 1) return false;
  if (tile->base && itemsize_of(tile->base_dtype) == 0) return false;
  for (int32_t s = 0; s < tile->num_sources; ++s)
    if (itemsize_of(static_cast<ckpt_float>(tile->dtype[s])) == 0 || (tile->length > 0 && !tile->source[s])) return false;
  return true;
}

void widen(const Loops* loops, uint64_t source, int32_t dtype, int64_t from, int64_t n, double* out) {
  const auto kind = static_cast<ckpt_float>(dtype);
  loops->add_plain(kind, at(source, from * itemsize_of(kind)), n, true, out);
}

// The elements [from, from + n) of a source, less those of the base.
void take(const Loops* loops, const ckpt_tile& tile, int32_t s, int64_t from, int64_t n, double* base, double* out) {
  widen(loops, tile.source[s], tile.dtype[s], from, n, out);
  if (!tile.base) return;
  widen(loops, tile.base, tile.base_dtype, from, n, base);
  loops->subtract(base, n, out);
}

template <class Work>  // work(block, first element, elements)
void for_blocks(const ckpt_tile& tile, const Work& work) {
  const int64_t blocks = blocks_of(tile.length);
  std::atomic<int64_t> claimed{0};
  const int64_t threads = std::min<int64_t>(tile.num_threads, std::max<int64_t>(1, blocks / kThreadBlocks));
  ckpt::run_workers(threads, [&] {
    const KeepDenormals keep;
    for (int64_t block = claimed.fetch_add(1); block < blocks; block = claimed.fetch_add(1))
      work(block, block * kBlock, std::min(kBlock, tile.length - block * kBlock));
  });
}

void add_up(const double* scratch, int64_t blocks, int64_t count, double* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = 0;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < count; ++i) out[i] += scratch[block * count + i];
}

void count(const uint32_t* sizes, int64_t n, int32_t shift, int32_t bits, int64_t prefix, uint64_t* bins) {
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  if (prefix < 0) {
    for (int64_t i = 0; i < n; ++i) ++bins[(sizes[i] >> shift) & mask];
  } else {
    for (int64_t i = 0; i < n; ++i)
      if (static_cast<int64_t>(uint64_t{sizes[i]} >> (shift + bits)) == prefix) ++bins[(sizes[i] >> shift) & mask];
  }
}

void count_source(const Loops* loops, const ckpt_tile& tile, int32_t s, int32_t shift, int32_t bits, int64_t prefix, uint64_t* bins) {
  double values[kBlock], base[kBlock];
  uint32_t sizes[kBlock];
  for (int64_t from = 0; from < tile.length; from += kBlock) {
    const int64_t n = std::min(kBlock, tile.length - from);
    take(loops, tile, s, from, n, base, values);
    loops->magnitudes(values, n, sizes);
    count(sizes, n, shift, bits, prefix, bins);
  }
}

struct Ties {
  const Loops* loops;
  const ckpt_tile& tile;
  const ckpt_ties_rule& rule;
  uint64_t target;
  ckpt_float target_dtype;
  std::atomic<int64_t> sign_sum{0};
  std::atomic<bool> bad{false};

  void run(int64_t from, int64_t n) {
    double kept[CKPT_MERGE_SOURCES_MAX * kTiesBlock], deltas[kTiesBlock], base[kTiesBlock], sum[kTiesBlock];
    for (int32_t s = 0; s < tile.num_sources; ++s) {
      take(loops, tile, s, from, n, base, deltas);
      loops->trim(deltas, n, rule.threshold[s], rule.weight[s], s == 0, kept + s * kTiesBlock, sum);
    }
    if (!target) {
      sign_sum.fetch_add(loops->signs(sum, n));
      return;
    }
    loops->elect(rule.zero_sign, n, sum);
    double merged[kTiesBlock], share[kTiesBlock];
    for (int64_t i = 0; i < n; ++i) merged[i] = share[i] = 0;
    for (int32_t s = 0; s < tile.num_sources; ++s)
      loops->agree(kept + s * kTiesBlock, sum, n, rule.weight[s], rule.mode == CKPT_TIES_MAX, merged, share);
    loops->join(base, share, rule.scale, rule.mode == CKPT_TIES_MEAN, n, merged);
    void* out = const_cast<void*>(at(target, from * itemsize_of(target_dtype)));
    if (!loops->put(target_dtype, merged, n, out)) bad.store(true);
  }
};

}  // namespace
}  // namespace ckpt::merge

ckpt_status ckpt_histogram(ckpt_loops loops, const ckpt_tile* tile, int32_t shift, int32_t bits, const int64_t* prefix,
                           uint64_t* bins) {
  using namespace ckpt::merge;
  if (!sound(tile) || !prefix || !bins || shift < 0 || bits < 1 || bits > 24 || shift + bits > 31) return CKPT_BAD_ARGUMENT;
  const Loops* chosen = loops_of(loops);
  if (!chosen) return CKPT_NO_KERNEL;
  std::atomic<int32_t> claimed{0};
  ckpt::run_workers(std::min(tile->num_threads, tile->num_sources), [&] {
    const KeepDenormals keep;
    for (int32_t s = claimed.fetch_add(1); s < tile->num_sources; s = claimed.fetch_add(1))
      count_source(chosen, *tile, s, shift, bits, prefix[s], bins + (static_cast<int64_t>(s) << bits));
  });
  return CKPT_OK;
}

ckpt_status ckpt_gram(ckpt_loops loops, const ckpt_tile* tile, double* scratch, double* out) {
  using namespace ckpt::merge;
  if (!sound(tile) || !out || (tile->length > 0 && !scratch)) return CKPT_BAD_ARGUMENT;
  const Loops* chosen = loops_of(loops);
  if (!chosen) return CKPT_NO_KERNEL;
  const int64_t sources = tile->num_sources;
  for_blocks(*tile, [&](int64_t block, int64_t from, int64_t n) {
    double x[kBlock], y[kBlock], base[kBlock];
    double* sums = scratch + block * sources * sources;
    for (int32_t s = 0; s < tile->num_sources; ++s) {
      take(chosen, *tile, s, from, n, base, x);
      sums[s * sources + s] = chosen->dot(x, x, n);
      for (int32_t t = s + 1; t < tile->num_sources; ++t) {
        take(chosen, *tile, t, from, n, base, y);
        sums[s * sources + t] = sums[t * sources + s] = chosen->dot(x, y, n);
      }
    }
  });
  add_up(scratch, blocks_of(tile->length), sources * sources, out);
  return CKPT_OK;
}

ckpt_status ckpt_moments(ckpt_loops loops, const ckpt_tile* tile, double* scratch, double* out) {
  using namespace ckpt::merge;
  if (!sound(tile) || !out || (tile->length > 0 && !scratch)) return CKPT_BAD_ARGUMENT;
  const Loops* chosen = loops_of(loops);
  if (!chosen) return CKPT_NO_KERNEL;
  const int64_t sources = tile->num_sources, blocks = blocks_of(tile->length);
  for_blocks(*tile, [&](int64_t block, int64_t from, int64_t n) {
    double x[kBlock], base[kBlock];
    for (int32_t s = 0; s < tile->num_sources; ++s) {
      double* sums = scratch + (block * sources + s) * 4;
      take(chosen, *tile, s, from, n, base, x);
      sums[0] = chosen->total(x, n, false);
      sums[1] = chosen->total(x, n, true);
      sums[2] = chosen->dot(x, x, n);
      sums[3] = chosen->greatest(x, n);
    }
  });
  add_up(scratch, blocks, sources * 4, out);
  for (int64_t s = 0; s < sources; ++s) {
    out[4 * s + 3] = 0;
    for (int64_t block = 0; block < blocks; ++block)
      out[4 * s + 3] = std::max(out[4 * s + 3], scratch[(block * sources + s) * 4 + 3]);
  }
  return CKPT_OK;
}

ckpt_status ckpt_ties(ckpt_loops loops, const ckpt_tile* tile, const ckpt_ties_rule* rule, uint64_t target,
                      ckpt_float target_dtype, int64_t* sign_sum, uint8_t* bad) {
  using namespace ckpt::merge;
  if (!sound(tile) || !tile->base || !rule || !rule->threshold || !rule->weight || !sign_sum || !bad) return CKPT_BAD_ARGUMENT;
  if (rule->mode < CKPT_TIES_MEAN || rule->mode > CKPT_TIES_MAX || rule->zero_sign < -1 || rule->zero_sign > 1) return CKPT_BAD_ARGUMENT;
  if (target && itemsize_of(target_dtype) == 0) return CKPT_BAD_ARGUMENT;
  const Loops* chosen = loops_of(loops);
  if (!chosen) return CKPT_NO_KERNEL;
  Ties ties{chosen, *tile, *rule, target, target_dtype};
  for_blocks(*tile, [&ties](int64_t, int64_t from, int64_t n) {
    for (int64_t start = 0; start < n; start += kTiesBlock) ties.run(from + start, std::min(kTiesBlock, n - start));
  });
  *sign_sum = ties.sign_sum.load();
  *bad = ties.bad.load() ? 1 : 0;
  return CKPT_OK;
}
