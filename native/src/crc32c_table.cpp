// CRC-32C by tables, eight bytes per step ("slicing by 8", Kounavis and Berry 2005): the plain kernel that every machine runs.

#include <array>

#include "crc32c_kernels.h"
#include "crc32c_polynomial.h"

namespace ckpt::crc32c {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: what byte b contributes when k more bytes follow it within the step.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t value = 0; value < 256; ++value) {
    uint32_t state = value;
    for (int bit = 0; bit < 8; ++bit) state = times_x(state);
    tables[0][value] = state;
  }
  for (size_t k = 1; k < 8; ++k)
    for (size_t value = 0; value < 256; ++value) {
      const uint32_t before = tables[k - 1][value];
      tables[k][value] = (before >> 8) ^ tables[0][before & 255u];
    }
  return tables;
}

constexpr Tables kTables = make_tables();

}  // namespace

uint32_t update_table(uint32_t state, const unsigned char* data, size_t nbytes) {
  for (; nbytes >= 8; data += 8, nbytes -= 8) {
    const uint32_t first = state ^ (data[0] | data[1] << 8 | data[2] << 16 | static_cast<uint32_t>(data[3]) << 24);
    state = kTables[7][first & 255u] ^ kTables[6][(first >> 8) & 255u] ^ kTables[5][(first >> 16) & 255u] ^
            kTables[4][first >> 24] ^ kTables[3][data[4]] ^ kTables[2][data[5]] ^ kTables[1][data[6]] ^ kTables[0][data[7]];
  }
  for (; nbytes > 0; ++data, --nbytes) state = (state >> 8) ^ kTables[0][(state ^ *data) & 255u];
  return state;
}

}  // namespace ckpt::crc32c
