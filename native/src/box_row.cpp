// Simplify and copy one strided box. See box_row.h.

#include "box_row.h"

#include <algorithm>
#include <cstring>

#include "stream_copy.h"

namespace ckpt {
namespace {

constexpr int64_t kTile = 64;  // elements; 64 x 64 of 8 bytes on both sides fit into a second-level cache

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

void copy_row(Row* row) {
  if (row->num_dims == 0) {
    vector_copy(row->target, row->source, static_cast<size_t>(row->run));
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

}  // namespace ckpt
