// Copy strided n-d boxes between addresses. In: columns of boxes. Out: copied bytes. Never touches a byte before all rows are
// checked, and never a byte outside a row's limits.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>

#include "box_rows.h"
#include "ckpt_core.h"
#include "workers.h"

namespace ckpt {
namespace {

constexpr uint64_t kPieceBytesMin = 256 * 1024;  // what a thread claims at a time: far above the cost of claiming
constexpr uint64_t kThreadBytesMin = 1024 * 1024;  // a thread costs about 30 us to start, as long as copying this much
constexpr uint64_t kRowBytes = 256;  // a row costs at least as much as copying this much
constexpr int64_t kTile = 64;  // elements; 64 x 64 of 8 bytes on both sides fit into a second-level cache

// Bytes from the first to past the last byte of a box on one side; false when that does not fit into 64 bits.
bool extent_of(const Dim* dims, int num_dims, int64_t itemsize, int64_t Dim::*stride, int64_t* extent) {
  *extent = itemsize;
  for (int d = 0; d < num_dims; ++d) {
    int64_t reach;
    if (__builtin_mul_overflow(dims[d].length - 1, dims[d].*stride, &reach)) return false;
    if (__builtin_add_overflow(*extent, reach, extent)) return false;
  }
  return true;
}

bool fits(uint64_t start, int64_t extent, uint64_t limit) {
  return start <= limit && static_cast<uint64_t>(extent) <= limit - start;
}

}  // namespace

ckpt_status read_row(const ckpt_boxes& boxes, int64_t r, Row* row) {
  const int64_t num_dims = boxes.num_dims;
  const int64_t itemsize = boxes.itemsize[r];
  if (itemsize < 1) return CKPT_BAD_ARGUMENT;
  row->source = reinterpret_cast<const std::byte*>(static_cast<uintptr_t>(boxes.source[r]));
  row->target = reinterpret_cast<std::byte*>(static_cast<uintptr_t>(boxes.target[r]));
  row->run = itemsize;
  row->num_dims = 0;
  for (int64_t d = 0; d < num_dims; ++d) {
    const int64_t at = r * num_dims + d;
    const Dim dim{boxes.lengths[at], boxes.source_strides[at], boxes.target_strides[at]};
    if (dim.length < 0 || dim.source_stride < 0 || dim.target_stride < 0) return CKPT_BAD_ARGUMENT;
    if (dim.length == 0) row->run = 0;
    if (dim.length <= 1) continue;
    int place = row->num_dims++;
    for (; place > 0 && row->dims[place - 1].target_stride < dim.target_stride; --place)
      row->dims[place] = row->dims[place - 1];
    row->dims[place] = dim;
  }
  return CKPT_OK;
}

ckpt_status check_row(const ckpt_boxes& boxes, int64_t r, uint64_t source, uint64_t source_limit, Row* row) {
  row->nbytes = 0;
  if (row->run == 0) return CKPT_OK;
  int64_t extent;
  if (!extent_of(row->dims, row->num_dims, row->run, &Dim::source_stride, &extent)) return CKPT_SOURCE_OUT_OF_BOUNDS;
  if (!fits(source, extent, source_limit)) return CKPT_SOURCE_OUT_OF_BOUNDS;
  if (!extent_of(row->dims, row->num_dims, row->run, &Dim::target_stride, &extent)) return CKPT_TARGET_OUT_OF_BOUNDS;
  if (!fits(boxes.target[r], extent, boxes.target_limit[r])) return CKPT_TARGET_OUT_OF_BOUNDS;
  int64_t inner = row->run;  // extent of the dims inside d; they nest, so the volume is at most the extent and fits as well
  row->nbytes = row->run;
  for (int d = row->num_dims - 1; d >= 0; --d) {
    if (row->dims[d].target_stride < inner) return CKPT_TARGET_OVERLAPS;
    inner += (row->dims[d].length - 1) * row->dims[d].target_stride;
    row->nbytes *= row->dims[d].length;
  }
  return CKPT_OK;
}

void simplify(Row* row) {
  int kept = 0;
  for (int d = 0; d < row->num_dims; ++d) {
    const Dim dim = row->dims[d];
    if (kept > 0) {
      Dim& outer = row->dims[kept - 1];
      if (outer.source_stride == dim.source_stride * dim.length && outer.target_stride == dim.target_stride * dim.length) {
        outer = Dim{outer.length * dim.length, dim.source_stride, dim.target_stride};
        continue;
      }
    }
    row->dims[kept++] = dim;
  }
  if (kept > 0 && row->dims[kept - 1].source_stride == row->run && row->dims[kept - 1].target_stride == row->run)
    row->run *= row->dims[--kept].length;
  row->num_dims = kept;
}

namespace {

// Put the dim that is nearest in the source beside the innermost one, where tiles make both sides cache friendly.
void pair_transposed_dims(Row* row) {
  const int last = row->num_dims - 1;
  int nearest = last;
  for (int d = 0; d < last; ++d)
    if (row->dims[d].source_stride < row->dims[nearest].source_stride) nearest = d;
  if (nearest < last - 1) std::rotate(row->dims + nearest, row->dims + nearest + 1, row->dims + last);
}

// One rectangle of runs. A fixed size compiles to single moves; SIZE 0 is any size.
template <int64_t SIZE>
void copy_rectangle(const std::byte* source, std::byte* target, const Dim& rows, const Dim& columns, int64_t run) {
  for (int64_t i = 0; i < rows.length; ++i) {
    const std::byte* from = source + i * rows.source_stride;
    std::byte* to = target + i * rows.target_stride;
    for (int64_t j = 0; j < columns.length; ++j) {
      std::memcpy(to, from, static_cast<size_t>(SIZE > 0 ? SIZE : run));
      from += columns.source_stride;
      to += columns.target_stride;
    }
  }
}

template <int64_t SIZE>
void copy_plane(const std::byte* source, std::byte* target, const Dim& rows, const Dim& columns, int64_t run) {
  if (rows.source_stride >= columns.source_stride || run > 64) {
    copy_rectangle<SIZE>(source, target, rows, columns, run);
    return;
  }
  for (int64_t i = 0; i < rows.length; i += kTile) {
    for (int64_t j = 0; j < columns.length; j += kTile) {
      const Dim tile_rows{std::min(kTile, rows.length - i), rows.source_stride, rows.target_stride};
      const Dim tile_columns{std::min(kTile, columns.length - j), columns.source_stride, columns.target_stride};
      copy_rectangle<SIZE>(source + i * rows.source_stride + j * columns.source_stride,
                           target + i * rows.target_stride + j * columns.target_stride, tile_rows, tile_columns, run);
    }
  }
}

using PlaneCopy = void (*)(const std::byte*, std::byte*, const Dim&, const Dim&, int64_t);

PlaneCopy plane_copy_for(int64_t run) {
  switch (run) {
    case 1: return copy_plane<1>;
    case 2: return copy_plane<2>;
    case 4: return copy_plane<4>;
    case 8: return copy_plane<8>;
    case 16: return copy_plane<16>;
    default: return copy_plane<0>;
  }
}

}  // namespace

void copy_row(Row* row) {
  if (row->num_dims == 0) {
    std::memcpy(row->target, row->source, static_cast<size_t>(row->run));
    return;
  }
  pair_transposed_dims(row);
  const int num_outer = std::max(0, row->num_dims - 2);
  const Dim single{1, 0, 0};
  const Dim rows = row->num_dims >= 2 ? row->dims[row->num_dims - 2] : single;
  const Dim columns = row->dims[row->num_dims - 1];
  const PlaneCopy copy = plane_copy_for(row->run);
  int64_t index[CKPT_DIMS_MAX] = {};
  const std::byte* source = row->source;
  std::byte* target = row->target;
  for (;;) {
    copy(source, target, rows, columns, row->run);
    int d = num_outer - 1;
    for (; d >= 0; --d) {
      const Dim& dim = row->dims[d];
      source += dim.source_stride;
      target += dim.target_stride;
      if (++index[d] < dim.length) break;
      source -= dim.length * dim.source_stride;
      target -= dim.length * dim.target_stride;
      index[d] = 0;
    }
    if (d < 0) return;
  }
}

namespace {

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
