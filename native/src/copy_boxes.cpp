// Copy strided n-d boxes between addresses. In: columns of boxes. Out: copied bytes. Never touches a byte before all rows are
// checked, and never a byte outside a row's limits.

#include <algorithm>
#include <atomic>
#include <cstddef>

#include "box_row.h"
#include "ckpt_core.h"
#include "workers.h"

namespace ckpt {
namespace {

constexpr uint64_t kPieceBytesMin = 256 * 1024;  // what a thread claims at a time: far above the cost of claiming
constexpr uint64_t kThreadBytesMin = 1024 * 1024;  // a thread costs about 30 us to start, as long as copying this much
constexpr uint64_t kRowBytes = 256;  // a row costs at least as much as copying this much

ckpt_status check_row(const ckpt_boxes& boxes, int64_t r, Row* row) {
  return check_row(boxes, r, boxes.source[r], boxes.source_limit[r], row);
}

int64_t scale(int64_t length, uint64_t part, uint64_t whole) {
  __extension__ typedef unsigned __int128 uint128;
  return static_cast<int64_t>(static_cast<uint128>(length) * part / whole);
}

// The share of `row` that goes with bytes [start, stop) of its bytes: shares of adjoining ranges adjoin. Cuts the outermost dim
// that is long enough for `num_parts`, else the run, else the longest dim.
void take_part(Row* row, uint64_t start, uint64_t stop, int64_t num_parts) {
  const auto whole = static_cast<uint64_t>(row->nbytes);
  if (start == 0 && stop == whole) return;
  int cut = -1;
  for (int d = 0; d < row->num_dims && cut < 0; ++d)
    if (row->dims[d].length >= num_parts) cut = d;
  if (cut < 0 && row->run < num_parts)
    for (int d = 0; d < row->num_dims; ++d)
      if (cut < 0 || row->dims[d].length > row->dims[cut].length) cut = d;
  const int64_t length = cut < 0 ? row->run : row->dims[cut].length;
  const int64_t first = scale(length, start, whole);
  const int64_t count = scale(length, stop, whole) - first;
  if (count == 0) {
    row->run = 0;
  } else if (cut < 0) {
    row->source += first;
    row->target += first;
    row->run = count;
  } else {
    row->source += first * row->dims[cut].source_stride;
    row->target += first * row->dims[cut].target_stride;
    row->dims[cut].length = count;
  }
}

// What one row costs, in bytes copied; rows and threads are weighed by it.
uint64_t cost_of(const Row& row) { return row.run == 0 ? 0 : static_cast<uint64_t>(row.nbytes) + kRowBytes; }

// Copy what the piece [start, stop) of the total cost holds of one row, whose cost begins at `row_start`. A row no larger than a
// piece goes whole to the piece that holds its start; a larger one is cut.
void copy_share(const Row& row, uint64_t cost, uint64_t piece, uint64_t start, uint64_t stop, uint64_t row_start) {
  const bool cut = cost > piece;
  if (!cut && start > row_start) return;
  Row part = row;
  simplify(&part);
  if (cut) {
    const auto nbytes = static_cast<uint64_t>(row.nbytes);
    const uint64_t from = std::min(std::max(start, row_start) - row_start, nbytes);
    const uint64_t to = std::min(stop - row_start, nbytes);
    take_part(&part, from, to, static_cast<int64_t>(cost / piece + 1));
  }
  if (part.run > 0) copy_row(&part);
}

// Claims pieces of the total cost, in rising order, and copies what lies in them. One pass over the rows per worker.
void copy_pieces(const ckpt_boxes& boxes, uint64_t piece, std::atomic<uint64_t>* claimed, uint64_t total) {
  uint64_t start = claimed->fetch_add(piece);
  uint64_t stop = start + piece;
  uint64_t row_start = 0;
  Row row;
  for (int64_t r = 0; r < boxes.num_rows && start < total; ++r) {
    read_row(boxes, r, &row);
    check_row(boxes, r, &row);
    const uint64_t cost = cost_of(row);
    const uint64_t row_stop = row_start + cost;
    while (start < row_stop) {
      if (stop > row_start) copy_share(row, cost, piece, start, stop, row_start);
      if (stop >= row_stop) break;
      start = claimed->fetch_add(piece);
      stop = start + piece;
    }
    row_start = row_stop;
  }
}

void copy_all(const ckpt_boxes& boxes) {
  Row row;
  for (int64_t r = 0; r < boxes.num_rows; ++r) {
    read_row(boxes, r, &row);
    if (row.run == 0) continue;
    simplify(&row);
    copy_row(&row);
  }
}

bool has_null(const ckpt_boxes& boxes) {
  if (!boxes.source || !boxes.source_limit || !boxes.target || !boxes.target_limit || !boxes.itemsize) return true;
  return boxes.num_dims > 0 && (!boxes.lengths || !boxes.source_strides || !boxes.target_strides);
}

}  // namespace
}  // namespace ckpt

ckpt_status ckpt_copy_boxes(const ckpt_boxes* boxes, int32_t num_threads, int64_t* bad_row) {
  using namespace ckpt;
  if (!boxes || !bad_row) return CKPT_BAD_ARGUMENT;
  *bad_row = -1;
  if (boxes->num_rows < 0 || boxes->num_dims < 0 || boxes->num_dims > CKPT_DIMS_MAX) return CKPT_BAD_ARGUMENT;
  if (boxes->num_rows == 0) return CKPT_OK;
  if (has_null(*boxes)) return CKPT_BAD_ARGUMENT;
  uint64_t total = 0;
  for (int64_t r = 0; r < boxes->num_rows; ++r) {
    Row row;
    ckpt_status status = read_row(*boxes, r, &row);
    if (status == CKPT_OK) status = check_row(*boxes, r, &row);
    // The total stays below half of the range, so that a claim past the end cannot wrap around.
    if (status == CKPT_OK && (__builtin_add_overflow(total, cost_of(row), &total) || total > INT64_MAX))
      status = CKPT_BAD_ARGUMENT;
    if (status != CKPT_OK) {
      *bad_row = r;
      return status;
    }
  }
  const int64_t useful = static_cast<int64_t>(std::min<uint64_t>(total / kThreadBytesMin, CKPT_THREADS_MAX));
  const int64_t threads = std::min<int64_t>(num_threads, useful);
  if (threads <= 1) {
    copy_all(*boxes);
    return CKPT_OK;
  }
  // Eight pieces per thread, so that one slow thread does not hold up the others.
  const uint64_t piece = std::max<uint64_t>(kPieceBytesMin, total / static_cast<uint64_t>(threads * 8) + 1);
  std::atomic<uint64_t> claimed{0};
  run_workers(threads, [&] { copy_pieces(*boxes, piece, &claimed, total); });
  return CKPT_OK;
}
