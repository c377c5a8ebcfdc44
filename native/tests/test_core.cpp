// Tests of the core through its C header alone, to be run under the address, undefined and thread sanitizers.
//
// Method: heap buffers of exactly the size that the boxes need, so that one byte too far is an error of the sanitizer; random
// boxes compared with element-by-element copying; refusals; many callers at once. Prints what failed and returns 1.

#include <cerrno>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "ckpt_core.h"
#include "write_at.h"

namespace {

int failures = 0;

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);      \
      ++failures;                                                              \
    }                                                                          \
  } while (0)

using Rng = std::mt19937_64;

int64_t draw(Rng& rng, int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

// Columns of boxes over two exactly sized heap buffers.
struct Boxes {
  int64_t num_dims;
  std::vector<uint64_t> source, source_limit, target, target_limit;
  std::vector<int64_t> lengths, source_strides, target_strides, itemsize;
  std::unique_ptr<unsigned char[]> from, to;
  uint64_t from_bytes = 0, to_bytes = 0;

  ckpt_boxes columns() const {
    return {source.data(),         source_limit.data(),   target.data(),   target_limit.data(),
            lengths.data(),        source_strides.data(), target_strides.data(), itemsize.data(),
            static_cast<int64_t>(source.size()), num_dims};
  }
};

int64_t extent(const int64_t* lengths, const int64_t* strides, int64_t num_dims, int64_t itemsize) {
  int64_t bytes = itemsize;
  for (int64_t d = 0; d < num_dims; ++d) {
    if (lengths[d] == 0) return 0;
    bytes += (lengths[d] - 1) * strides[d];
  }
  return bytes;
}

// Strides that nest in a random order of dims, with a gap now and then.
void draw_strides(Rng& rng, const int64_t* lengths, int64_t num_dims, int64_t itemsize, int64_t* strides) {
  std::vector<int64_t> order(static_cast<size_t>(num_dims));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  if (draw(rng, 0, 1)) std::shuffle(order.begin(), order.end(), rng);
  int64_t bytes = itemsize;
  for (int64_t d : order) {
    strides[d] = bytes + (draw(rng, 0, 3) == 0 ? draw(rng, 1, 5) : 0);
    bytes += (lengths[d] > 0 ? lengths[d] - 1 : 0) * strides[d];
  }
}

Boxes draw_boxes(Rng& rng, int64_t num_rows, int64_t num_dims, int64_t length_max) {
  static const int64_t kItemsizes[] = {1, 2, 3, 4, 8, 16, 24};
  Boxes boxes;
  boxes.num_dims = num_dims;
  const auto cells = static_cast<size_t>(num_rows * num_dims);
  boxes.lengths.resize(cells);
  boxes.source_strides.resize(cells);
  boxes.target_strides.resize(cells);
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t at = r * num_dims;
    int64_t* lengths = boxes.lengths.data() + at;
    const int64_t itemsize = kItemsizes[draw(rng, 0, 6)];
    for (int64_t d = 0; d < num_dims; ++d) lengths[d] = draw(rng, draw(rng, 0, 9) == 0 ? 0 : 1, length_max);
    draw_strides(rng, lengths, num_dims, itemsize, boxes.source_strides.data() + at);
    draw_strides(rng, lengths, num_dims, itemsize, boxes.target_strides.data() + at);
    boxes.itemsize.push_back(itemsize);
    boxes.source.push_back(boxes.from_bytes);
    boxes.target.push_back(boxes.to_bytes);
    boxes.from_bytes += static_cast<uint64_t>(extent(lengths, boxes.source_strides.data() + at, num_dims, itemsize));
    boxes.to_bytes += static_cast<uint64_t>(extent(lengths, boxes.target_strides.data() + at, num_dims, itemsize));
  }
  boxes.from = std::make_unique<unsigned char[]>(boxes.from_bytes);
  boxes.to = std::make_unique<unsigned char[]>(boxes.to_bytes);
  for (uint64_t i = 0; i < boxes.from_bytes; ++i) boxes.from[i] = static_cast<unsigned char>(rng());
  for (size_t r = 0; r < boxes.source.size(); ++r) {
    boxes.source[r] += reinterpret_cast<uintptr_t>(boxes.from.get());
    boxes.target[r] += reinterpret_cast<uintptr_t>(boxes.to.get());
  }
  boxes.source_limit.assign(boxes.source.size(), reinterpret_cast<uintptr_t>(boxes.from.get()) + boxes.from_bytes);
  boxes.target_limit.assign(boxes.target.size(), reinterpret_cast<uintptr_t>(boxes.to.get()) + boxes.to_bytes);
  return boxes;
}

// The target as the contract says it must be, one element at a time.
std::vector<unsigned char> expected_target(const Boxes& boxes) {
  std::vector<unsigned char> out(boxes.to_bytes, 0);
  const auto from = reinterpret_cast<uintptr_t>(boxes.from.get());
  const auto to = reinterpret_cast<uintptr_t>(boxes.to.get());
  const auto num_dims = static_cast<size_t>(boxes.num_dims);
  for (size_t r = 0; r < boxes.source.size(); ++r) {
    int64_t volume = 1;
    for (size_t d = 0; d < num_dims; ++d) volume *= boxes.lengths[r * num_dims + d];
    for (int64_t i = 0; i < volume; ++i) {
      int64_t rest = i;
      uint64_t source = boxes.source[r] - from, target = boxes.target[r] - to;
      for (size_t d = num_dims; d-- > 0;) {
        const size_t at = r * num_dims + d;
        const int64_t index = rest % boxes.lengths[at];
        rest /= boxes.lengths[at];
        source += static_cast<uint64_t>(index * boxes.source_strides[at]);
        target += static_cast<uint64_t>(index * boxes.target_strides[at]);
      }
      std::memcpy(out.data() + target, boxes.from.get() + source, static_cast<size_t>(boxes.itemsize[r]));
    }
  }
  return out;
}

bool copies_right(const Boxes& boxes, int32_t threads) {
  const ckpt_boxes columns = boxes.columns();
  int64_t bad_row = 7;
  if (ckpt_copy_boxes(&columns, threads, &bad_row) != CKPT_OK || bad_row != -1) return false;
  const std::vector<unsigned char> expected = expected_target(boxes);
  return expected.empty() || std::memcmp(expected.data(), boxes.to.get(), expected.size()) == 0;
}

void test_random_boxes_equal_elementwise_copy() {
  Rng rng(1);
  for (int i = 0; i < 300; ++i) CHECK(copies_right(draw_boxes(rng, draw(rng, 0, 6), draw(rng, 0, 5), 5), 1));
}

void test_large_boxes_split_over_threads() {
  Rng rng(2);
  for (int32_t threads = 2; threads <= 4; ++threads) {
    CHECK(copies_right(draw_boxes(rng, 1, 1, 2000000), threads));
    CHECK(copies_right(draw_boxes(rng, 3, 2, 1200), threads));
    CHECK(copies_right(draw_boxes(rng, 4, 3, 90), threads));
    CHECK(copies_right(draw_boxes(rng, 6000, 2, 12), threads));
  }
}

void test_one_byte_short_is_refused_and_nothing_written() {
  Rng rng(3);
  for (int i = 0; i < 200; ++i) {
    Boxes boxes = draw_boxes(rng, 3, 3, 4);
    const auto bad = static_cast<size_t>(draw(rng, 0, 2));
    const int64_t* strides = (i % 2 ? boxes.source_strides : boxes.target_strides).data() + bad * 3;
    const int64_t bytes = extent(boxes.lengths.data() + bad * 3, strides, 3, boxes.itemsize[bad]);
    if (bytes == 0) continue;
    auto& limit = i % 2 ? boxes.source_limit : boxes.target_limit;
    limit[bad] = (i % 2 ? boxes.source : boxes.target)[bad] + static_cast<uint64_t>(bytes) - 1;
    const ckpt_boxes columns = boxes.columns();
    int64_t bad_row = -1;
    CHECK(ckpt_copy_boxes(&columns, 2, &bad_row) == (i % 2 ? CKPT_SOURCE_OUT_OF_BOUNDS : CKPT_TARGET_OUT_OF_BOUNDS));
    CHECK(bad_row == static_cast<int64_t>(bad));
    for (uint64_t k = 0; k < boxes.to_bytes; ++k) CHECK(boxes.to[k] == 0);
  }
}

// Any 64-bit numbers at all: an answer, never an access outside the buffers. Sizes near the ends of the range are likely.
void test_hostile_numbers_are_survived() {
  static const int64_t kNumbers[] = {INT64_MIN, -1, 0, 1, 2, 3, 8, int64_t{1} << 31, int64_t{1} << 62, INT64_MAX};
  Rng rng(4);
  for (int i = 0; i < 20000; ++i) {
    Boxes boxes = draw_boxes(rng, 2, 3, 3);
    std::vector<int64_t>* columns[] = {&boxes.lengths, &boxes.source_strides, &boxes.target_strides, &boxes.itemsize};
    for (int change = 0; change < 3; ++change) {
      std::vector<int64_t>& column = *columns[draw(rng, 0, 3)];
      column[static_cast<size_t>(draw(rng, 0, static_cast<int64_t>(column.size()) - 1))] = kNumbers[draw(rng, 0, 9)];
    }
    const ckpt_boxes view = boxes.columns();
    int64_t bad_row;
    const ckpt_status status = ckpt_copy_boxes(&view, 1, &bad_row);
    CHECK((status == CKPT_OK) == (bad_row == -1));
  }
}

void test_null_pointers_and_odd_counts_are_refused() {
  int64_t bad;
  ckpt_boxes boxes{};
  CHECK(ckpt_copy_boxes(&boxes, 1, &bad) == CKPT_OK);
  boxes.num_rows = 1;
  CHECK(ckpt_copy_boxes(&boxes, 1, &bad) == CKPT_BAD_ARGUMENT);
  boxes.num_rows = -1;
  CHECK(ckpt_copy_boxes(&boxes, 1, &bad) == CKPT_BAD_ARGUMENT);
  boxes.num_rows = 0;
  boxes.num_dims = CKPT_DIMS_MAX + 1;
  CHECK(ckpt_copy_boxes(&boxes, 1, &bad) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_copy_boxes(nullptr, 1, &bad) == CKPT_BAD_ARGUMENT);
  uint32_t out;
  CHECK(ckpt_crc32c(CKPT_KERNEL_AUTO, nullptr, 1, 0, &out) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_crc32c(static_cast<ckpt_kernel>(99), "", 0, 0, &out) == CKPT_NO_KERNEL);
}

void test_kernels_agree_with_table_at_every_length() {
  Rng rng(5);
  uint32_t known = 0;
  CHECK(ckpt_crc32c(CKPT_KERNEL_AUTO, "123456789", 9, 0, &known) == CKPT_OK && known == 0xE3069283u);
  for (const ckpt_kernel kernel : {CKPT_KERNEL_AUTO, CKPT_KERNEL_TABLE, CKPT_KERNEL_SSE42, CKPT_KERNEL_ARM}) {
    uint32_t sum = 0, table = 0;
    if (!ckpt_kernel_available(kernel)) {
      CHECK(ckpt_crc32c(kernel, "a", 1, 0, &sum) == CKPT_NO_KERNEL);
      continue;
    }
    for (uint64_t nbytes = 0; nbytes < 60000; nbytes += 1 + nbytes / 40) {
      auto data = std::make_unique<unsigned char[]>(nbytes);
      for (uint64_t i = 0; i < nbytes; ++i) data[i] = static_cast<unsigned char>(rng());
      const uint64_t cut = nbytes / 3;
      uint32_t head = 0, tail = 0, chained = 0;
      CHECK(ckpt_crc32c(CKPT_KERNEL_TABLE, data.get(), nbytes, 0, &table) == CKPT_OK);
      CHECK(ckpt_crc32c(kernel, data.get(), nbytes, 0, &sum) == CKPT_OK && sum == table);
      CHECK(ckpt_crc32c(kernel, data.get(), cut, 0, &head) == CKPT_OK);
      CHECK(ckpt_crc32c(kernel, data.get() + cut, nbytes - cut, 0, &tail) == CKPT_OK);
      CHECK(ckpt_crc32c(kernel, data.get() + cut, nbytes - cut, head, &chained) == CKPT_OK && chained == table);
      CHECK(ckpt_crc32c_combine(head, tail, nbytes - cut) == table);
      const uint32_t runs[2] = {head, tail};
      const int64_t sizes[2] = {static_cast<int64_t>(cut), static_cast<int64_t>(nbytes - cut)};
      const int64_t firsts[4] = {0, 2, 2, 2}, bad[2] = {0, 3};
      uint32_t joined[3] = {1, 1, 1};
      CHECK(ckpt_crc32c_join(runs, sizes, 2, firsts, 3, joined) == CKPT_OK && joined[0] == table && joined[1] == 0);
      CHECK(ckpt_crc32c_join(runs, sizes, 2, bad, 1, joined) == CKPT_BAD_ARGUMENT && joined[0] == table);
    }
  }
}

void test_ranges_on_threads_and_out_of_bounds() {
  Rng rng(6);
  std::vector<unsigned char> data(9000000);
  for (auto& byte : data) byte = static_cast<unsigned char>(rng());
  std::vector<int64_t> starts, stops;
  for (int i = 0; i < 300; ++i) {
    starts.push_back(draw(rng, 0, 9000000));
    stops.push_back(draw(rng, starts.back(), 9000000));
  }
  std::vector<uint32_t> out(300);
  int64_t bad;
  CHECK(ckpt_crc32c_ranges(CKPT_KERNEL_AUTO, data.data(), data.size(), starts.data(), stops.data(), 300, 4, out.data(), &bad) ==
        CKPT_OK);
  for (size_t i = 0; i < 300; ++i) {
    uint32_t sum = 0;
    ckpt_crc32c(CKPT_KERNEL_AUTO, data.data() + starts[i], static_cast<uint64_t>(stops[i] - starts[i]), 0, &sum);
    CHECK(sum == out[i]);
  }
  stops[77] = 9000001;
  std::vector<uint32_t> untouched(300, 5);
  CHECK(ckpt_crc32c_ranges(CKPT_KERNEL_AUTO, data.data(), data.size(), starts.data(), stops.data(), 300, 4, untouched.data(),
                           &bad) == CKPT_SOURCE_OUT_OF_BOUNDS);
  CHECK(bad == 77);
  CHECK(untouched == std::vector<uint32_t>(300, 5));
}

// Parts that lie in the target of draw_boxes' kind of buffer, dense, with gaps in between, and random segments over all of it.
struct Parts {
  Boxes boxes;
  std::vector<int64_t> position, starts, stops;
  int64_t first = 0, last = 0;

  ckpt_parts columns() const {
    return {boxes.source.data(),         boxes.source_limit.data(), position.data(), boxes.lengths.data(),
            boxes.source_strides.data(), boxes.itemsize.data(),     static_cast<int64_t>(position.size()), boxes.num_dims};
  }
};

Parts draw_parts(Rng& rng, int64_t num_rows, int64_t num_dims, int64_t length_max) {
  Parts parts;
  parts.boxes = draw_boxes(rng, num_rows, num_dims, length_max);
  Boxes& boxes = parts.boxes;
  parts.first = draw(rng, 0, 1) ? 0 : draw(rng, 1, int64_t{1} << 40);
  int64_t at = parts.first;
  for (size_t r = 0; r < boxes.source.size(); ++r) {
    at += draw(rng, 0, 3) * draw(rng, 0, 100);
    parts.position.push_back(at);
    boxes.target[r] = static_cast<uint64_t>(at - parts.first);
    int64_t inner = boxes.itemsize[r];
    for (auto d = static_cast<size_t>(num_dims); d-- > 0;) {
      const size_t cell = r * static_cast<size_t>(num_dims) + d;
      boxes.target_strides[cell] = inner;
      inner *= boxes.lengths[cell];
    }
    at += inner;
  }
  parts.last = at + draw(rng, 0, 9);
  boxes.to_bytes = static_cast<uint64_t>(parts.last - parts.first);
  boxes.to = std::make_unique<unsigned char[]>(boxes.to_bytes);
  for (auto& address : boxes.target) address += reinterpret_cast<uintptr_t>(boxes.to.get());
  int64_t edge = parts.first;
  for (int64_t i = draw(rng, 0, 12); i > 0 && edge < parts.last; --i) {
    parts.starts.push_back(draw(rng, edge, edge + (parts.last - edge) / 4));
    edge = draw(rng, parts.starts.back(), parts.starts.back() + (parts.last - parts.starts.back()) / 2);
    parts.stops.push_back(edge);
  }
  return parts;
}

ckpt_status pack(const Parts& parts, int32_t threads, uint32_t* out, int64_t* bad_row, int64_t* bad_segment) {
  const ckpt_parts columns = parts.columns();
  return ckpt_pack(CKPT_KERNEL_AUTO, &columns, parts.boxes.to.get(), parts.first, parts.last, parts.starts.data(),
                   parts.stops.data(), static_cast<int64_t>(parts.starts.size()), threads, out, bad_row, bad_segment);
}

bool packs_right(const Parts& parts, int32_t threads) {
  std::vector<uint32_t> out(parts.starts.size() + 1, 9);
  int64_t bad_row = 7, bad_segment = 7;
  if (pack(parts, threads, out.data(), &bad_row, &bad_segment) != CKPT_OK || bad_row != -1 || bad_segment != -1) return false;
  const std::vector<unsigned char> expected = expected_target(parts.boxes);
  if (!expected.empty() && std::memcmp(expected.data(), parts.boxes.to.get(), expected.size()) != 0) return false;
  for (size_t i = 0; i < parts.starts.size(); ++i) {
    uint32_t sum = 0;
    ckpt_crc32c(CKPT_KERNEL_TABLE, expected.data() + (parts.starts[i] - parts.first),
                static_cast<uint64_t>(parts.stops[i] - parts.starts[i]), 0, &sum);
    if (sum != out[i]) return false;
  }
  return out.back() == 9;
}

void test_random_parts_are_packed_and_summed() {
  Rng rng(11);
  for (int i = 0; i < 300; ++i) CHECK(packs_right(draw_parts(rng, draw(rng, 0, 6), draw(rng, 0, 5), 5), 1));
  for (int32_t threads = 1; threads <= 4; ++threads) {
    CHECK(packs_right(draw_parts(rng, 1, 1, 2000000), threads));
    CHECK(packs_right(draw_parts(rng, 3, 2, 1200), threads));
    CHECK(packs_right(draw_parts(rng, 4, 3, 90), threads));
    CHECK(packs_right(draw_parts(rng, 6000, 2, 12), threads));
  }
}

void test_parts_or_segments_at_fault_are_refused_and_nothing_written() {
  Rng rng(12);
  for (int i = 0; i < 300; ++i) {
    Parts parts = draw_parts(rng, 3, 3, 4);
    const auto bad = static_cast<size_t>(draw(rng, 0, 2));
    const int64_t* lengths = parts.boxes.lengths.data() + bad * 3;
    if (lengths[0] == 0 || lengths[1] == 0 || lengths[2] == 0) continue;
    const int64_t bytes = extent(lengths, parts.boxes.source_strides.data() + bad * 3, 3, parts.boxes.itemsize[bad]);
    ckpt_status expected = CKPT_SOURCE_OUT_OF_BOUNDS;
    int64_t expected_row = static_cast<int64_t>(bad), expected_segment = -1;
    switch (i % 4) {
      case 0: parts.boxes.source_limit[bad] = parts.boxes.source[bad] + static_cast<uint64_t>(bytes) - 1; break;
      case 1: parts.position[bad] = parts.last, expected = CKPT_TARGET_OUT_OF_BOUNDS; break;
      case 2: parts.position[bad] = parts.first - 1, expected = CKPT_TARGET_OUT_OF_BOUNDS; break;
      default:
        parts.starts.push_back(parts.last);
        parts.stops.push_back(parts.last + 1);
        expected = CKPT_SEGMENT_OUT_OF_BOUNDS, expected_row = -1;
        expected_segment = static_cast<int64_t>(parts.starts.size()) - 1;
    }
    std::vector<uint32_t> out(parts.starts.size(), 5);
    int64_t bad_row = 7, bad_segment = 7;
    CHECK(pack(parts, 2, out.data(), &bad_row, &bad_segment) == expected);
    CHECK(bad_row == expected_row && bad_segment == expected_segment);
    CHECK(out == std::vector<uint32_t>(parts.starts.size(), 5));
    for (uint64_t k = 0; k < parts.boxes.to_bytes; ++k) CHECK(parts.boxes.to[k] == 0);
  }
}

void test_hostile_numbers_in_parts_are_survived() {
  static const int64_t kNumbers[] = {INT64_MIN, -1, 0, 1, 2, 3, 8, int64_t{1} << 31, int64_t{1} << 62, INT64_MAX};
  Rng rng(13);
  for (int i = 0; i < 5000; ++i) {
    Parts parts = draw_parts(rng, 2, 3, 3);
    std::vector<int64_t>* columns[] = {&parts.boxes.lengths, &parts.boxes.source_strides, &parts.boxes.itemsize,
                                       &parts.position,      &parts.starts,               &parts.stops};
    for (int change = 0; change < 3; ++change) {
      std::vector<int64_t>& column = *columns[draw(rng, 0, 5)];
      if (column.empty()) continue;
      column[static_cast<size_t>(draw(rng, 0, static_cast<int64_t>(column.size()) - 1))] = kNumbers[draw(rng, 0, 9)];
    }
    std::vector<uint32_t> out(parts.starts.size());
    int64_t bad_row, bad_segment;
    const ckpt_status status = pack(parts, 1, out.data(), &bad_row, &bad_segment);
    CHECK((status == CKPT_OK) == (bad_row == -1 && bad_segment == -1));
  }
  int64_t bad_row, bad_segment;
  ckpt_parts none{};
  CHECK(ckpt_pack(CKPT_KERNEL_AUTO, &none, nullptr, 0, 0, nullptr, nullptr, 0, 1, nullptr, &bad_row, &bad_segment) == CKPT_OK);
  CHECK(ckpt_pack(CKPT_KERNEL_AUTO, &none, nullptr, 0, 1, nullptr, nullptr, 0, 1, nullptr, &bad_row, &bad_segment) ==
        CKPT_BAD_ARGUMENT);
  none.num_rows = 1;
  CHECK(ckpt_pack(CKPT_KERNEL_AUTO, &none, nullptr, 0, 0, nullptr, nullptr, 0, 1, nullptr, &bad_row, &bad_segment) ==
        CKPT_BAD_ARGUMENT);
}

// What the stand-in for pwrite(2) does at each call; the file it writes to is this memory.
std::vector<unsigned char> written;
std::atomic<int> calls{0};
int fail_at = -1, fail_with = 0, short_at = -1;

int64_t fake_pwrite(int, const void* data, size_t nbytes, int64_t offset) {
  const int call = calls.fetch_add(1);
  if (call == fail_at) {
    errno = fail_with;
    return fail_with == 0 ? 0 : -1;
  }
  if (call == short_at) nbytes = nbytes / 2 + 1;
  std::memcpy(written.data() + offset, data, nbytes);
  return static_cast<int64_t>(nbytes);
}

ckpt_status write_with(int fd, const std::vector<unsigned char>& data, int32_t in_flight, int32_t* direct, int32_t* error) {
  calls = 0;
  written.assign(data.size() + 8192, 0);
  const ckpt_status status = ckpt::write_at(fd, data.data(), static_cast<int64_t>(data.size()), 8192, 4096, in_flight,
                                            fake_pwrite, direct, error);
  if (status == CKPT_OK) CHECK(std::equal(data.begin(), data.end(), written.begin() + 8192));
  return status;
}

void test_writes_survive_short_interrupted_and_refused_calls() {
  char name[] = "/tmp/ckpt-test-core-XXXXXX";
  const int fd = mkstemp(name);
  CHECK(fd >= 0);
  unlink(name);
  const int flags = fcntl(fd, F_GETFL);
  const bool has_direct = fcntl(fd, F_SETFL, flags | O_DIRECT) == 0;
  Rng rng(14);
  std::vector<unsigned char> data(40 * 4096);
  for (auto& byte : data) byte = static_cast<unsigned char>(rng());
  int32_t direct = 7, error = 7;
  for (int32_t in_flight = 1; in_flight <= 5; ++in_flight) {
    for (int at = 0; at < 3; ++at) {
      fcntl(fd, F_SETFL, has_direct ? flags | O_DIRECT : flags);
      fail_at = short_at = -1;
      CHECK(write_with(fd, data, in_flight, &direct, &error) == CKPT_OK && direct == has_direct && error == 0);
      fail_at = at, fail_with = EINTR;
      if (in_flight > 1 || at == 0) CHECK(write_with(fd, data, in_flight, &direct, &error) == CKPT_OK && direct == has_direct);
      fail_at = -1, short_at = at;
      if (in_flight > 1 || at == 0) CHECK(write_with(fd, data, in_flight, &direct, &error) == CKPT_OK && direct == 0);
      fcntl(fd, F_SETFL, has_direct ? flags | O_DIRECT : flags);
      short_at = -1, fail_at = at, fail_with = EINVAL;
      if (in_flight == 1 && at > 0) continue;  // one write in flight is one call
      const ckpt_status expected = has_direct ? CKPT_OK : CKPT_SYSTEM_ERROR;
      CHECK(write_with(fd, data, in_flight, &direct, &error) == expected && direct == 0);
      CHECK(write_with(fd, data, in_flight, &direct, &error) == CKPT_SYSTEM_ERROR && error == EINVAL);  // not direct: real
      fail_with = ENOSPC;
      CHECK(write_with(fd, data, in_flight, &direct, &error) == CKPT_SYSTEM_ERROR && error == ENOSPC);
      fail_with = 0;
      CHECK(write_with(fd, data, in_flight, &direct, &error) == CKPT_SYSTEM_ERROR && error == EIO);
    }
  }
  close(fd);
  CHECK(ckpt_write_at(fd, data.data(), 1, 0, 4096, 1, &direct, &error) == CKPT_SYSTEM_ERROR && error == EBADF);
  CHECK(ckpt_write_at(0, nullptr, 1, 0, 4096, 1, &direct, &error) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_write_at(0, data.data(), -1, 0, 4096, 1, &direct, &error) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_write_at(0, data.data(), 1, INT64_MAX, 4096, 1, &direct, &error) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_write_at(0, data.data(), 1, 0, 1, 1, &direct, &error) == CKPT_BAD_ARGUMENT);
}

void test_many_callers_at_once() {
  std::thread callers[4];
  bool right[4] = {};
  for (int i = 0; i < 4; ++i)
    callers[i] = std::thread([i, &right] {
      Rng rng(static_cast<uint64_t>(100 + i));
      right[i] = copies_right(draw_boxes(rng, 3, 2, 700), 3) && packs_right(draw_parts(rng, 3, 2, 700), 3);
    });
  for (auto& caller : callers) caller.join();
  for (const bool one : right) CHECK(one);
}

// A file of random bytes that is gone when this is.
struct File {
  std::vector<unsigned char> bytes;
  int fd = -1;

  File(Rng& rng, size_t nbytes) : bytes(nbytes) {
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(draw(rng, 0, 255));
    char name[] = "/tmp/ckpt-core-XXXXXX";
    fd = mkstemp(name);
    unlink(name);
    size_t done = 0;
    while (fd >= 0 && done < nbytes) {
      const ssize_t count = write(fd, bytes.data() + done, nbytes - done);
      if (count <= 0) break;
      done += static_cast<size_t>(count);
    }
    CHECK(done == nbytes);
  }
  ~File() { close(fd); }
};

// Chunks of one file, each one block and one box of every other byte, read by several threads; one chunk is damaged.
void test_reads_copy_only_out_of_chunks_that_verify() {
  Rng rng(11);
  const int64_t chunks = 40, chunk_bytes = 10'000;
  File file(rng, static_cast<size_t>(chunks * chunk_bytes));
  const int64_t damaged = 17, half = chunk_bytes / 2;
  std::vector<int32_t> number(chunks, 0), outcome(chunks, 9);
  std::vector<int64_t> start, stop, edges{0}, lengths(chunks, half), two(chunks, 2), one(chunks, 1);
  std::vector<uint32_t> expected, found(chunks, 0);
  std::vector<uint64_t> source, target, limit;
  std::unique_ptr<unsigned char[]> to(new unsigned char[static_cast<size_t>(chunks * half)]());
  for (int64_t c = 0; c < chunks; ++c) {
    start.push_back(c * chunk_bytes);
    stop.push_back((c + 1) * chunk_bytes);
    edges.push_back(c + 1);
    uint32_t crc = 0;
    ckpt_crc32c(CKPT_KERNEL_AUTO, file.bytes.data() + c * chunk_bytes, static_cast<uint64_t>(chunk_bytes), 0, &crc);
    expected.push_back(c == damaged ? ~crc : crc);
    source.push_back(static_cast<uint64_t>(c * chunk_bytes));
    target.push_back(reinterpret_cast<uintptr_t>(to.get()) + static_cast<uint64_t>(c * half));
    limit.push_back(target.back() + static_cast<uint64_t>(half));
  }
  const int32_t none = -1, threads = 4;
  const int64_t room = 5 * CKPT_READ_ALIGN;
  void* buffer = std::aligned_alloc(CKPT_READ_ALIGN, static_cast<size_t>(room * threads));
  ckpt_reads reads{&file.fd, &none, nullptr, nullptr, 1, number.data(), start.data(), stop.data(), chunks, edges.data(), start.data(),
                   stop.data(), expected.data(), edges.data(),
                   {source.data(), nullptr, target.data(), limit.data(), lengths.data(), two.data(), one.data(),
                    one.data(), chunks, 1},
                   buffer, room, CKPT_KERNEL_AUTO, CKPT_READ_AUTO, threads, 0};
  ckpt_read_results results{outcome.data(), found.data(), 0, 0, 0};
  int64_t bad_row = 0;
  CHECK(ckpt_read_chunks(&reads, &results, &bad_row) == CKPT_OK && bad_row == -1);
  for (int64_t c = 0; c < chunks; ++c) {
    CHECK(outcome[static_cast<size_t>(c)] == (c == damaged ? CKPT_READ_DAMAGED : CKPT_READ_DONE));
    for (int64_t i = 0; i < half; ++i)
      CHECK(to[static_cast<size_t>(c * half + i)] ==
            (c == damaged ? 0 : file.bytes[static_cast<size_t>(c * chunk_bytes + 2 * i)]));
  }
  limit[3] -= 1;
  CHECK(ckpt_read_chunks(&reads, &results, &bad_row) == CKPT_TARGET_OUT_OF_BOUNDS && bad_row == 3);
  reads.buffer_bytes = 2 * CKPT_READ_ALIGN;
  CHECK(ckpt_read_chunks(&reads, &results, &bad_row) == CKPT_BAD_ARGUMENT);
  std::free(buffer);
}

}  // namespace

int main() {
  test_random_boxes_equal_elementwise_copy();
  test_large_boxes_split_over_threads();
  test_one_byte_short_is_refused_and_nothing_written();
  test_hostile_numbers_are_survived();
  test_null_pointers_and_odd_counts_are_refused();
  test_kernels_agree_with_table_at_every_length();
  test_ranges_on_threads_and_out_of_bounds();
  test_random_parts_are_packed_and_summed();
  test_parts_or_segments_at_fault_are_refused_and_nothing_written();
  test_hostile_numbers_in_parts_are_survived();
  test_writes_survive_short_interrupted_and_refused_calls();
  test_reads_copy_only_out_of_chunks_that_verify();
  test_many_callers_at_once();
  std::printf("%s\n", failures == 0 ? "all core tests passed" : "core tests FAILED");
  return failures == 0 ? 0 : 1;
}
