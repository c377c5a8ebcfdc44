// Choose a CRC-32C kernel and run it over one buffer, or over many ranges of one. Never reads outside the buffer.

#include <algorithm>
#include <atomic>

#include "ckpt_core.h"
#include "crc32c_kernels.h"
#include "crc32c_polynomial.h"
#include "workers.h"

namespace ckpt::crc32c {

Update kernel_of(ckpt_kernel kernel) {
  switch (kernel) {
    case CKPT_KERNEL_AUTO: return kernel_of(ckpt_kernel_auto());
    case CKPT_KERNEL_TABLE: return update_table;
    case CKPT_KERNEL_SSE42: return sse42_kernel();
    case CKPT_KERNEL_ARM: return arm_kernel();
  }
  return nullptr;
}

namespace {

constexpr uint64_t kThreadBytesMin = 2 * 1024 * 1024;  // about 100 us of work: three times what a thread costs to start

uint32_t checksum(Update update, const unsigned char* data, uint64_t nbytes, uint32_t value) {
  return nbytes == 0 ? value : ~update(~value, data, static_cast<size_t>(nbytes));
}

}  // namespace
}  // namespace ckpt::crc32c

int32_t ckpt_kernel_available(ckpt_kernel kernel) { return ckpt::crc32c::kernel_of(kernel) != nullptr ? 1 : 0; }

ckpt_kernel ckpt_kernel_auto(void) {
  if (ckpt::crc32c::sse42_kernel()) return CKPT_KERNEL_SSE42;
  if (ckpt::crc32c::arm_kernel()) return CKPT_KERNEL_ARM;
  return CKPT_KERNEL_TABLE;
}

ckpt_status ckpt_crc32c(ckpt_kernel kernel, const void* data, uint64_t nbytes, uint32_t value, uint32_t* out) {
  using namespace ckpt::crc32c;
  if (!out || (!data && nbytes > 0)) return CKPT_BAD_ARGUMENT;
  const Update update = kernel_of(kernel);
  if (!update) return CKPT_NO_KERNEL;
  *out = checksum(update, static_cast<const unsigned char*>(data), nbytes, value);
  return CKPT_OK;
}

ckpt_status ckpt_crc32c_ranges(ckpt_kernel kernel, const void* data, uint64_t nbytes, const int64_t* starts,
                               const int64_t* stops, int64_t num_ranges, int32_t num_threads, uint32_t* out,
                               int64_t* bad_range) {
  using namespace ckpt::crc32c;
  if (!bad_range) return CKPT_BAD_ARGUMENT;
  *bad_range = -1;
  if (num_ranges < 0 || (num_ranges > 0 && (!starts || !stops || !out)) || (!data && nbytes > 0)) return CKPT_BAD_ARGUMENT;
  const Update update = kernel_of(kernel);
  if (!update) return CKPT_NO_KERNEL;
  uint64_t total = 0;
  for (int64_t i = 0; i < num_ranges; ++i) {
    if (starts[i] < 0 || stops[i] < starts[i] || static_cast<uint64_t>(stops[i]) > nbytes) {
      *bad_range = i;
      return CKPT_SOURCE_OUT_OF_BOUNDS;
    }
    total = std::min<uint64_t>(total + static_cast<uint64_t>(stops[i] - starts[i]), INT64_MAX);
  }
  // Sixteen claims per thread, so that one slow thread does not hold up the others.
  const auto useful = static_cast<int64_t>(std::min<uint64_t>(total / kThreadBytesMin, CKPT_THREADS_MAX));
  const int64_t threads = std::max<int64_t>(1, std::min({int64_t{num_threads}, useful, num_ranges}));
  const int64_t batch = std::max<int64_t>(1, num_ranges / (threads * 16));
  std::atomic<int64_t> claimed{0};
  ckpt::run_workers(threads, [&] {
    for (;;) {
      const int64_t first = claimed.fetch_add(batch);
      if (first >= num_ranges) return;
      for (int64_t i = first; i < std::min(first + batch, num_ranges); ++i)
        out[i] = checksum(update, static_cast<const unsigned char*>(data) + starts[i],
                          static_cast<uint64_t>(stops[i] - starts[i]), 0);
    }
  });
  return CKPT_OK;
}

uint32_t ckpt_crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t nbytes_b) {
  using namespace ckpt::crc32c;
  return multiply(crc_a, power_of_bytes(nbytes_b)) ^ crc_b;
}

ckpt_status ckpt_crc32c_join(const uint32_t* crcs, const int64_t* nbytes, int64_t num_runs, const int64_t* firsts,
                             int64_t num_groups, uint32_t* out) {
  if (num_runs < 0 || num_groups < 0 || !firsts || (num_groups > 0 && !out) || (num_runs > 0 && (!crcs || !nbytes)))
    return CKPT_BAD_ARGUMENT;
  if (firsts[0] < 0 || firsts[num_groups] > num_runs) return CKPT_BAD_ARGUMENT;
  for (int64_t g = 0; g < num_groups; ++g)
    if (firsts[g + 1] < firsts[g]) return CKPT_BAD_ARGUMENT;
  for (int64_t i = 0; i < num_runs; ++i)
    if (nbytes[i] < 0) return CKPT_BAD_ARGUMENT;
  for (int64_t g = 0; g < num_groups; ++g) {
    uint32_t sum = 0;
    for (int64_t i = firsts[g]; i < firsts[g + 1]; ++i)
      sum = ckpt_crc32c_combine(sum, crcs[i], static_cast<uint64_t>(nbytes[i]));
    out[g] = sum;
  }
  return CKPT_OK;
}
