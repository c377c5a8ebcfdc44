// The matrices of erasure codes: made, inverted for the pieces that are there, and tried for every loss. Knows nothing of the
// data. Never allocates: all matrices are at most 64 x 64 bytes.

#include <algorithm>
#include <cstring>
#include <numeric>

#include "ckpt_core.h"
#include "gf256.h"

namespace ckpt::erasure {
namespace {

using gf256::inverse;
using gf256::multiply;

constexpr int kSide = CKPT_CODE_SOURCES_MAX;

bool sizes_fit(int32_t k, int32_t m) {
  return k >= 1 && k <= CKPT_CODE_SOURCES_MAX && m >= 1 && m <= CKPT_CODE_TARGETS_MAX;
}

struct Square {
  int side;
  uint8_t cell[kSide][kSide];
};

void scale(uint8_t* row, int side, uint8_t factor) {
  for (int j = 0; j < side; ++j) row[j] = multiply(row[j], factor);
}

void subtract(uint8_t* row, const uint8_t* other, int side, uint8_t factor) {
  for (int j = 0; j < side; ++j) row[j] ^= multiply(other[j], factor);
}

// A row at or below `column` whose element in it is not 0, or `side`.
int pivot_of(const Square& matrix, int column) {
  int row = column;
  while (row < matrix.side && matrix.cell[row][column] == 0) ++row;
  return row;
}

// Gauss-Jordan; destroys `matrix`.
bool invert(Square* matrix, Square* out) {
  const int side = out->side = matrix->side;
  for (int i = 0; i < side; ++i)
    for (int j = 0; j < side; ++j) out->cell[i][j] = i == j;
  for (int c = 0; c < side; ++c) {
    const int pivot = pivot_of(*matrix, c);
    if (pivot == side) return false;
    std::swap_ranges(matrix->cell[c], matrix->cell[c] + side, matrix->cell[pivot]);
    std::swap_ranges(out->cell[c], out->cell[c] + side, out->cell[pivot]);
    const uint8_t factor = inverse(matrix->cell[c][c]);
    scale(matrix->cell[c], side, factor);
    scale(out->cell[c], side, factor);
    for (int i = 0; i < side; ++i) {
      const uint8_t element = matrix->cell[i][c];
      if (i == c || element == 0) continue;
      subtract(matrix->cell[i], matrix->cell[c], side, element);
      subtract(out->cell[i], out->cell[c], side, element);
    }
  }
  return true;
}

// Destroys `matrix`.
bool singular(Square* matrix) {
  for (int c = 0; c < matrix->side; ++c) {
    const int pivot = pivot_of(*matrix, c);
    if (pivot == matrix->side) return true;
    std::swap_ranges(matrix->cell[c], matrix->cell[c] + matrix->side, matrix->cell[pivot]);
    const uint8_t factor = inverse(matrix->cell[c][c]);
    for (int i = c + 1; i < matrix->side; ++i)
      if (matrix->cell[i][c] != 0)
        subtract(matrix->cell[i], matrix->cell[c], matrix->side, multiply(matrix->cell[i][c], factor));
  }
  return false;
}

// The next of all ascending choices of `count` numbers below `limit`; false after the last.
bool next_choice(int* chosen, int count, int limit) {
  int i = count - 1;
  while (i >= 0 && chosen[i] == limit - count + i) --i;
  if (i < 0) return false;
  ++chosen[i];
  for (int j = i + 1; j < count; ++j) chosen[j] = chosen[j - 1] + 1;
  return true;
}

bool names_pieces(const int32_t* pieces, int32_t count, int32_t limit) {
  return std::all_of(pieces, pieces + count, [limit](int32_t piece) { return piece >= 0 && piece < limit; });
}

}  // namespace
}  // namespace ckpt::erasure

ckpt_status ckpt_code_matrix(ckpt_code code, int32_t k, int32_t m, uint8_t* out) {
  using namespace ckpt;
  if (!out || !erasure::sizes_fit(k, m)) return CKPT_BAD_ARGUMENT;
  if (code != CKPT_CODE_CAUCHY_RS && !(code == CKPT_CODE_XOR && m == 1)) return CKPT_BAD_ARGUMENT;
  for (int32_t i = 0; i < k + m; ++i)
    for (int32_t j = 0; j < k; ++j) {
      uint8_t* cell = out + i * k + j;
      if (i < k) *cell = i == j;
      else *cell = code == CKPT_CODE_XOR ? uint8_t{1} : gf256::inverse(static_cast<uint8_t>(i ^ j));
    }
  return CKPT_OK;
}

ckpt_status ckpt_code_rows(const uint8_t* matrix, int32_t k, int32_t m, const int32_t* have, const int32_t* wanted,
                           int32_t num_wanted, uint8_t* out) {
  using namespace ckpt;
  using namespace ckpt::erasure;
  if (!matrix || !have || !sizes_fit(k, m) || num_wanted < 0 || num_wanted > k + m) return CKPT_BAD_ARGUMENT;
  if (num_wanted > 0 && (!wanted || !out)) return CKPT_BAD_ARGUMENT;
  if (!names_pieces(have, k, k + m) || !names_pieces(wanted, num_wanted, k + m)) return CKPT_BAD_ARGUMENT;
  Square there, back;
  there.side = k;
  for (int32_t i = 0; i < k; ++i) {
    if (std::find(have, have + i, have[i]) != have + i) return CKPT_BAD_ARGUMENT;
    std::memcpy(there.cell[i], matrix + have[i] * k, static_cast<size_t>(k));
  }
  if (!invert(&there, &back)) return CKPT_SINGULAR;
  for (int32_t r = 0; r < num_wanted; ++r)
    for (int32_t j = 0; j < k; ++j) {
      uint8_t sum = 0;
      for (int32_t i = 0; i < k; ++i) sum ^= multiply(matrix[wanted[r] * k + i], back.cell[i][j]);
      out[r * k + j] = sum;
    }
  return CKPT_OK;
}

// Losing `lost` pieces of data and keeping as many of parity leaves a minor of the parity rows to invert: all square ones are tried.
ckpt_status ckpt_code_count_singular(const uint8_t* matrix, int32_t k, int32_t m, int64_t* out) {
  using namespace ckpt::erasure;
  if (!matrix || !out || !sizes_fit(k, m)) return CKPT_BAD_ARGUMENT;
  for (int32_t i = 0; i < k; ++i)
    for (int32_t j = 0; j < k; ++j)
      if (matrix[i * k + j] != (i == j)) return CKPT_BAD_ARGUMENT;
  *out = 0;
  for (int lost = 1; lost <= std::min(k, m); ++lost) {
    int rows[kSide];
    std::iota(rows, rows + lost, 0);
    do {
      int columns[kSide];
      std::iota(columns, columns + lost, 0);
      do {
        Square minor;
        minor.side = lost;
        for (int i = 0; i < lost; ++i)
          for (int j = 0; j < lost; ++j) minor.cell[i][j] = matrix[(k + rows[i]) * k + columns[j]];
        *out += singular(&minor);
      } while (next_choice(columns, lost, k));
    } while (next_choice(rows, lost, m));
  }
  return CKPT_OK;
}
