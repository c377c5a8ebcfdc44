// One strided box at a time: read from a table, checked, brought to its simplest form, and copied. In: row r of a table of boxes.
// Out: copied bytes. Never touches a byte outside the row.
#ifndef CKPT_BOX_ROW_H
#define CKPT_BOX_ROW_H

#include <cstddef>
#include <cstdint>

#include "ckpt_core.h"

namespace ckpt {

struct Dim {
  int64_t length;
  int64_t source_stride;
  int64_t target_stride;
};

// A box brought to its simplest form: `run` contiguous bytes at each position of `dims`, outermost first.
struct Row {
  const std::byte* source;
  std::byte* target;
  int64_t run;     // bytes; 0: nothing to copy
  int64_t nbytes;  // of the whole box
  int num_dims;
  Dim dims[CKPT_DIMS_MAX];
};

// Bytes from the first to past the last byte of a box on one side; false when that does not fit into 64 bits.
bool extent_of(const Dim* dims, int num_dims, int64_t itemsize, int64_t Dim::*stride, int64_t* extent);

// Whether `extent` bytes from address `start` end at `limit` or before.
bool fits(uint64_t start, int64_t extent, uint64_t limit);

// Read row `r`: dims of length 1 dropped, the rest sorted by target stride, widest first. A box with a zero length has run 0.
ckpt_status read_row(const ckpt_boxes& boxes, int64_t r, Row* row);

// Bounds on both sides, with the source at `source` below `source_limit`, and that no two elements of the target share a byte.
ckpt_status check_row(const ckpt_boxes& boxes, int64_t r, uint64_t source, uint64_t source_limit, Row* row);

// Merge dims that follow each other without a gap on both sides, and let contiguous innermost elements become one run.
void simplify(Row* row);

// Copy a row that is simplified and has no zero length. May reorder its dims.
void copy_row(Row* row);

}  // namespace ckpt

#endif
