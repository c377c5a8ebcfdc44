// One strided box brought to its simplest form. In: row r of a table of boxes. Out: the row, checked and copied.
#ifndef CKPT_BOX_ROWS_H
#define CKPT_BOX_ROWS_H

#include <cstddef>
#include <cstdint>

#include "ckpt_core.h"

namespace ckpt {

struct Dim {
  int64_t length;
  int64_t source_stride;
  int64_t target_stride;
};

// `run` contiguous bytes at each position of `dims`, outermost first.
struct Row {
  const std::byte* source;
  std::byte* target;
  int64_t run;     // bytes; 0: nothing to copy
  int64_t nbytes;  // of the whole box
  int num_dims;
  Dim dims[CKPT_DIMS_MAX];
};

// Read row `r`: dims of length 1 dropped, the rest sorted by target stride, widest first. A box with a zero length has run 0.
ckpt_status read_row(const ckpt_boxes& boxes, int64_t r, Row* row);

// Bounds on both sides, with the source at `source` below `source_limit`, and that no two elements of the target share a byte.
ckpt_status check_row(const ckpt_boxes& boxes, int64_t r, uint64_t source, uint64_t source_limit, Row* row);

// Merge dims that follow each other without a gap on both sides, and let contiguous innermost elements become one run.
void simplify(Row* row);

// Copy a row whose run is not 0.
void copy_row(Row* row);

}  // namespace ckpt

#endif
