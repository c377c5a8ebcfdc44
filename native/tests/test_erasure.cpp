// Tests of erasure coding through the C header alone, to be run under the address, undefined and thread sanitizers.
//
// Method: heap blocks of exactly their size, so that one byte too far is an error of the sanitizer (in plain C++; ISA-L is not
// instrumented); a definition of its own of the field; all codes up to 20 pieces; refusals; hostile numbers; many callers.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "ckpt_core.h"

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

// The definition: polynomials over GF(2) modulo 0x11D.
uint8_t times(uint8_t a, uint8_t b) {
  unsigned product = 0;
  for (int bit = 0; bit < 8; ++bit)
    if (b >> bit & 1) product ^= static_cast<unsigned>(a) << bit;
  for (int bit = 15; bit >= 8; --bit)
    if (product >> bit & 1) product ^= 0x11Du << (bit - 8);
  return static_cast<uint8_t>(product);
}

std::vector<ckpt_coder> coders() {
  std::vector<ckpt_coder> here{CKPT_CODER_PORTABLE};
  if (ckpt_coder_available(CKPT_CODER_ISAL)) here.push_back(CKPT_CODER_ISAL);
  return here;
}

// Blocks on the heap, each of exactly its size, and what is to become of the targets.
struct Blocks {
  std::vector<std::unique_ptr<unsigned char[]>> memory;
  std::vector<uint64_t> source, target;
  std::vector<int64_t> source_bytes;
  std::vector<uint8_t> coefficients;
  int64_t block_bytes = 0, tile_bytes = 64;
  bool add = false;

  ckpt_coding columns() const {
    return {source.data(),  source_bytes.data(), target.data(), coefficients.data(), static_cast<int32_t>(source.size()),
            static_cast<int32_t>(target.size()), block_bytes,   tile_bytes,          add};
  }
  const unsigned char* bytes(uint64_t address) const { return reinterpret_cast<const unsigned char*>(address); }
};

Blocks draw_blocks(Rng& rng, int64_t num_sources, int64_t num_targets, int64_t bytes_max) {
  Blocks blocks;
  blocks.block_bytes = draw(rng, 0, bytes_max);
  blocks.tile_bytes = 64 * draw(rng, 1, 40);
  blocks.add = draw(rng, 0, 1) == 1;
  const auto make = [&](int64_t nbytes) {
    blocks.memory.emplace_back(new unsigned char[static_cast<size_t>(nbytes)]);
    for (int64_t i = 0; i < nbytes; ++i) blocks.memory.back()[static_cast<size_t>(i)] = static_cast<unsigned char>(rng());
    return reinterpret_cast<uint64_t>(blocks.memory.back().get());
  };
  for (int64_t s = 0; s < num_sources; ++s) {
    const int64_t kind = draw(rng, 0, 3);
    blocks.source_bytes.push_back(kind == 0 ? draw(rng, 0, blocks.block_bytes) : kind == 1 ? 0 : blocks.block_bytes);
    blocks.source.push_back(make(blocks.source_bytes.back()));
  }
  for (int64_t r = 0; r < num_targets; ++r) blocks.target.push_back(make(blocks.block_bytes));
  const bool ones = draw(rng, 0, 3) == 0;
  for (int64_t i = 0; i < num_sources * num_targets; ++i)
    blocks.coefficients.push_back(ones ? 1 : static_cast<uint8_t>(draw(rng, 0, 9) ? rng() : rng() % 2));
  return blocks;
}

std::vector<std::vector<unsigned char>> expected_targets(const Blocks& blocks) {
  std::vector<std::vector<unsigned char>> out;
  const auto size = static_cast<size_t>(blocks.block_bytes);
  for (size_t r = 0; r < blocks.target.size(); ++r) {
    std::vector<unsigned char> target(size, 0);
    for (size_t i = 0; i < size; ++i) {
      if (blocks.add) target[i] = blocks.bytes(blocks.target[r])[i];
      for (size_t s = 0; s < blocks.source.size(); ++s)
        if (static_cast<int64_t>(i) < blocks.source_bytes[s])
          target[i] ^= times(blocks.coefficients[r * blocks.source.size() + s], blocks.bytes(blocks.source[s])[i]);
    }
    out.push_back(std::move(target));
  }
  return out;
}

uint32_t sum_of(const unsigned char* data, size_t nbytes) {
  uint32_t crc = 0;
  ckpt_crc32c(CKPT_KERNEL_TABLE, data, nbytes, 0, &crc);
  return crc;
}

bool codes_right(ckpt_coder coder, const Blocks& blocks) {
  const auto expected = expected_targets(blocks);
  const ckpt_coding columns = blocks.columns();
  std::vector<uint32_t> source_crcs(blocks.source.size(), 9), target_crcs(blocks.target.size(), 9);
  int32_t bad_source = 7, bad_target = 7;
  if (ckpt_code_blocks(coder, CKPT_KERNEL_AUTO, &columns, source_crcs.data(), target_crcs.data(), &bad_source, &bad_target) !=
      CKPT_OK)
    return false;
  bool right = bad_source == -1 && bad_target == -1;
  for (size_t r = 0; r < expected.size(); ++r) {
    right &= std::equal(expected[r].begin(), expected[r].end(), blocks.bytes(blocks.target[r]));
    right &= target_crcs[r] == sum_of(expected[r].data(), expected[r].size());
  }
  for (size_t s = 0; s < blocks.source.size(); ++s)
    right &= source_crcs[s] == sum_of(blocks.bytes(blocks.source[s]), static_cast<size_t>(blocks.source_bytes[s]));
  return right;
}

void test_blocks_of_any_size_equal_the_definition() {
  Rng rng(1);
  for (const ckpt_coder coder : coders()) {
    for (int i = 0; i < 1500; ++i) CHECK(codes_right(coder, draw_blocks(rng, draw(rng, 1, 9), draw(rng, 0, 5), 300)));
    for (int i = 0; i < 40; ++i) CHECK(codes_right(coder, draw_blocks(rng, draw(rng, 1, 20), draw(rng, 1, 9), 9000)));
    CHECK(codes_right(coder, draw_blocks(rng, CKPT_CODE_SOURCES_MAX, CKPT_CODE_TARGETS_MAX, 900)));
  }
}

std::vector<uint8_t> matrix_of(ckpt_code code, int32_t k, int32_t m) {
  std::vector<uint8_t> matrix(static_cast<size_t>((k + m) * k));
  CHECK(ckpt_code_matrix(code, k, m, matrix.data()) == CKPT_OK);
  return matrix;
}

void test_no_loss_is_singular_in_any_code_of_up_to_20_pieces() {
  for (int32_t n = 2; n <= 20; ++n)
    for (int32_t k = 1; k < n; ++k) {
      int64_t singular = -1;
      CHECK(ckpt_code_count_singular(matrix_of(CKPT_CODE_CAUCHY_RS, k, n - k).data(), k, n - k, &singular) == CKPT_OK);
      CHECK(singular == 0);
      if (n - k > 1) continue;
      CHECK(ckpt_code_count_singular(matrix_of(CKPT_CODE_XOR, k, 1).data(), k, 1, &singular) == CKPT_OK);
      CHECK(singular == 0);
    }
  std::vector<uint8_t> matrix = matrix_of(CKPT_CODE_CAUCHY_RS, 3, 2);
  std::copy_n(matrix.begin() + 9, 3, matrix.begin() + 12);  // two equal rows of parity: losing any 2 of 3 data is fatal
  int64_t singular = -1;
  CHECK(ckpt_code_count_singular(matrix.data(), 3, 2, &singular) == CKPT_OK && singular == 3);
  matrix[0] = 2;
  CHECK(ckpt_code_count_singular(matrix.data(), 3, 2, &singular) == CKPT_BAD_ARGUMENT);
}

// Every choice of k pieces gives rows that, times the pieces' own rows, are the rows wanted.
void test_rows_rebuild_every_piece_from_every_choice() {
  for (int32_t n = 2; n <= 10; ++n)
    for (int32_t k = 1; k < n; ++k) {
      const std::vector<uint8_t> matrix = matrix_of(CKPT_CODE_CAUCHY_RS, k, n - k);
      std::vector<int32_t> all;
      for (int32_t i = 0; i < n; ++i) all.push_back(i);
      std::vector<uint8_t> out(matrix.size());
      for (uint32_t mask = 0; mask < 1u << n; ++mask) {
        std::vector<int32_t> have;
        for (int32_t i = n - 1; i >= 0; --i)  // not in order
          if (mask >> i & 1) have.push_back(i);
        if (static_cast<int32_t>(have.size()) != k) continue;
        CHECK(ckpt_code_rows(matrix.data(), k, n - k, have.data(), all.data(), n, out.data()) == CKPT_OK);
        bool right = true;
        for (int32_t i = 0; i < n; ++i)
          for (int32_t j = 0; j < k; ++j) {
            uint8_t sum = 0;
            for (int32_t s = 0; s < k; ++s) sum ^= times(out[i * k + s], matrix[have[s] * k + j]);
            right &= sum == matrix[i * k + j];
          }
        CHECK(right);
      }
    }
  const std::vector<uint8_t> matrix = matrix_of(CKPT_CODE_CAUCHY_RS, 3, 2);
  uint8_t out[15];
  const int32_t twice[] = {0, 1, 1}, outside[] = {0, 1, 5}, negative[] = {0, -1, 2}, fine[] = {0, 1, 2};
  for (const int32_t* have : {twice, outside, negative})
    CHECK(ckpt_code_rows(matrix.data(), 3, 2, have, fine, 3, out) == CKPT_BAD_ARGUMENT);
  for (const int32_t* wanted : {outside, negative})
    CHECK(ckpt_code_rows(matrix.data(), 3, 2, fine, wanted, 3, out) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_code_rows(matrix.data(), 3, 2, nullptr, fine, 3, out) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_code_rows(matrix.data(), 0, 2, fine, fine, 3, out) == CKPT_BAD_ARGUMENT);
  std::vector<uint8_t> equal = matrix;
  std::copy_n(equal.begin() + 9, 3, equal.begin() + 12);
  const int32_t have[] = {0, 3, 4};
  CHECK(ckpt_code_rows(equal.data(), 3, 2, have, fine, 3, out) == CKPT_SINGULAR);
}

void test_codes_that_are_none_are_refused() {
  uint8_t out[1];
  CHECK(ckpt_code_matrix(CKPT_CODE_XOR, 3, 2, out) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_code_matrix(static_cast<ckpt_code>(3), 3, 1, out) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_code_matrix(CKPT_CODE_CAUCHY_RS, 0, 1, out) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_code_matrix(CKPT_CODE_CAUCHY_RS, 1, 0, out) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_code_matrix(CKPT_CODE_CAUCHY_RS, CKPT_CODE_SOURCES_MAX + 1, 1, out) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_code_matrix(CKPT_CODE_CAUCHY_RS, 1, CKPT_CODE_TARGETS_MAX + 1, out) == CKPT_BAD_ARGUMENT);
  CHECK(ckpt_code_matrix(CKPT_CODE_CAUCHY_RS, 1, 1, nullptr) == CKPT_BAD_ARGUMENT);
}

ckpt_status code(const ckpt_coding& columns, int32_t* bad_source, int32_t* bad_target, ckpt_coder coder = CKPT_CODER_AUTO) {
  return ckpt_code_blocks(coder, CKPT_KERNEL_AUTO, &columns, nullptr, nullptr, bad_source, bad_target);
}

void test_blocks_at_fault_are_refused_and_nothing_written() {
  Rng rng(2);
  Blocks blocks = draw_blocks(rng, 3, 2, 0);
  std::vector<unsigned char> memory(1000, 5);
  const auto base = reinterpret_cast<uint64_t>(memory.data());
  blocks.block_bytes = 100;
  blocks.source = {base, base + 100, base + 200};
  blocks.source_bytes = {100, 50, 100};
  blocks.target = {base + 300, base + 400};
  int32_t source = 0, target = 0;
  const auto with = [&](auto change, ckpt_status expected, int32_t expected_source, int32_t expected_target) {
    Blocks changed;
    changed.source = blocks.source, changed.source_bytes = blocks.source_bytes, changed.target = blocks.target;
    changed.coefficients = blocks.coefficients, changed.block_bytes = 100;
    change(&changed);
    CHECK(code(changed.columns(), &source, &target) == expected);
    CHECK(source == expected_source && target == expected_target);
    if (expected != CKPT_OK) CHECK(memory == std::vector<unsigned char>(1000, 5));
  };
  with([](Blocks* b) { b->source_bytes[1] = 101; }, CKPT_SOURCE_OUT_OF_BOUNDS, 1, -1);
  with([](Blocks* b) { b->source_bytes[1] = -1; }, CKPT_SOURCE_OUT_OF_BOUNDS, 1, -1);
  with([](Blocks* b) { b->source[2] = 0; }, CKPT_SOURCE_OUT_OF_BOUNDS, 2, -1);
  with([](Blocks* b) { b->source[2] = UINT64_MAX - 50; }, CKPT_SOURCE_OUT_OF_BOUNDS, 2, -1);
  with([](Blocks* b) { b->target[1] = UINT64_MAX - 50; }, CKPT_TARGET_OUT_OF_BOUNDS, -1, 1);
  with([](Blocks* b) { b->target[1] = b->target[0] + 99; }, CKPT_TARGET_OVERLAPS, -1, 1);
  with([](Blocks* b) { b->target[0] = b->source[2] + 99; }, CKPT_TARGET_OVERLAPS, -1, 0);
  with([](Blocks* b) { b->block_bytes = -1; }, CKPT_BAD_ARGUMENT, -1, -1);
  with([](Blocks* b) { b->tile_bytes = 0; }, CKPT_BAD_ARGUMENT, -1, -1);
  with([](Blocks* b) { b->tile_bytes = 96; }, CKPT_BAD_ARGUMENT, -1, -1);
  with([](Blocks* b) { b->tile_bytes = int64_t{1} << 31; }, CKPT_BAD_ARGUMENT, -1, -1);
  with([](Blocks* b) { b->source.clear(), b->source_bytes.clear(); }, CKPT_BAD_ARGUMENT, -1, -1);
  with([](Blocks* b) { b->target[0] = b->source[1] + 50, b->block_bytes = 100; }, CKPT_TARGET_OVERLAPS, -1, 0);
  ckpt_coding columns = blocks.columns();
  CHECK(code(columns, &source, &target, static_cast<ckpt_coder>(9)) == CKPT_NO_KERNEL);
  columns.num_targets = CKPT_CODE_TARGETS_MAX + 1;
  CHECK(code(columns, &source, &target) == CKPT_BAD_ARGUMENT);
  columns = blocks.columns();
  columns.coefficients = nullptr;
  CHECK(code(columns, &source, &target) == CKPT_BAD_ARGUMENT);
  CHECK(memory == std::vector<unsigned char>(1000, 5));
  with([](Blocks*) {}, CKPT_OK, -1, -1);
}

void test_many_callers_at_once() {
  std::thread callers[4];
  bool right[4] = {};
  for (int i = 0; i < 4; ++i)
    callers[i] = std::thread([i, &right] {
      Rng rng(static_cast<uint64_t>(100 + i));
      right[i] = true;
      for (const ckpt_coder coder : coders()) right[i] &= codes_right(coder, draw_blocks(rng, 5, 3, 5000));
    });
  for (auto& caller : callers) caller.join();
  for (const bool one : right) CHECK(one);
}

}  // namespace

int main() {
  test_blocks_of_any_size_equal_the_definition();
  test_no_loss_is_singular_in_any_code_of_up_to_20_pieces();
  test_rows_rebuild_every_piece_from_every_choice();
  test_codes_that_are_none_are_refused();
  test_blocks_at_fault_are_refused_and_nothing_written();
  test_many_callers_at_once();
  std::printf("%s\n", failures == 0 ? "all erasure tests passed" : "erasure tests FAILED");
  return failures == 0 ? 0 : 1;
}
