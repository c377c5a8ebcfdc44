// The loops of merging by instruction set. `n` elements each; `first`: nothing is there to add to yet. None writes beyond them.
#ifndef CKPT_MERGE_KERNELS_H
#define CKPT_MERGE_KERNELS_H

#include <cstdint>

#include "ckpt_core.h"

namespace ckpt::merge {

struct Loops {
  void (*add)(ckpt_float dtype, const void* source, int64_t n, double weight, bool first, double* sum);
  void (*add_plain)(ckpt_float dtype, const void* source, int64_t n, bool first, double* sum);  // as with weight 1
  void (*subtract)(const double* base, int64_t n, double* values);
  void (*divide)(double divisor, int64_t n, double* values);
  bool (*put)(ckpt_float dtype, const double* values, int64_t n, void* target);  // whether all that it wrote is finite
  bool (*finite)(ckpt_float dtype, const void* source, int64_t n);
  void (*magnitudes)(const double* values, int64_t n, uint32_t* out);
  double (*dot)(const double* x, const double* y, int64_t n);
  double (*total)(const double* x, int64_t n, bool of_sizes);
  double (*greatest)(const double* x, int64_t n);
  void (*trim)(const double* deltas, int64_t n, uint32_t threshold, double weight, bool first, double* kept, double* sum);
  int64_t (*signs)(const double* sum, int64_t n);
  void (*elect)(double zero_sign, int64_t n, double* sums);
  void (*agree)(const double* kept, const double* elected, int64_t n, double weight, bool greatest_one, double* merged,
                double* share);
  void (*join)(const double* base, const double* share, double scale, bool mean, int64_t n, double* merged);
  void (*uniform)(uint64_t key, uint64_t first, int64_t n, double* out);
};

const Loops* portable_loops();
const Loops* avx2_loops();    // null when not built or not on this processor
const Loops* avx512_loops();  // null when not built or not on this processor
const Loops* loops_of(ckpt_loops loops);

int64_t itemsize_of(ckpt_float dtype);  // 0 for a number that is no dtype

}  // namespace ckpt::merge

#endif
