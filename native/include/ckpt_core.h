/* The contract of ckpt's native core: n-d box copy, CRC-32C, both fused, writes to files, verified reads of them, erasure coding,
 * and the arithmetic of merging.
 *
 * All sizes, strides and limits are bytes; limits and stops are exclusive. Every function is thread safe, keeps no state
 * between calls, allocates no memory of its own (worker threads aside), and answers with a status instead of an exception.
 * All bounds are checked before the first byte is touched: a call that does not return CKPT_OK has copied nothing.
 * Knows nothing of Python or torch.
 */
#ifndef CKPT_CORE_H
#define CKPT_CORE_H

#include <stdint.h>

/* Enums hold any int: in C++ a value that is not named must not be undefined behaviour, but be refused. */
#ifdef __cplusplus
#define CKPT_ENUM_BASE : int
extern "C" {
#else
#define CKPT_ENUM_BASE
#endif

#define CKPT_CORE_VERSION 1
#define CKPT_DIMS_MAX 64    /* dims of one box */
#define CKPT_THREADS_MAX 64 /* a call uses no more, whatever it is asked for */

typedef enum ckpt_status CKPT_ENUM_BASE {
  CKPT_OK = 0,
  CKPT_BAD_ARGUMENT = 1,         /* a negative length or stride, an item size below 1, too many dims, a null pointer */
  CKPT_SOURCE_OUT_OF_BOUNDS = 2, /* the box would read a byte at or after its source limit */
  CKPT_TARGET_OUT_OF_BOUNDS = 3, /* the box would write a byte at or after its target limit */
  CKPT_TARGET_OVERLAPS = 4,      /* two elements of one box would share bytes of the target, or interleave in it */
  CKPT_NO_KERNEL = 5,            /* the kernel asked for by name is not in this build or not on this processor */
  CKPT_SEGMENT_OUT_OF_BOUNDS = 6, /* a segment to sum is not inside the target, not sorted, or overlaps another */
  CKPT_SYSTEM_ERROR = 7,          /* a system call failed; the call also gives its errno */
  CKPT_SINGULAR = 8               /* the pieces that are there do not determine the others */
} ckpt_status;

/* N boxes in D dims as columns. Element (i0, i1, ...) of row r lies at
 * source[r] + sum(i_d * source_strides[r*D + d]), itemsize[r] bytes long; likewise for the target. */
typedef struct ckpt_boxes {
  const uint64_t *source;        /* [N] address */
  const uint64_t *source_limit;  /* [N] address, exclusive */
  const uint64_t *target;        /* [N] address */
  const uint64_t *target_limit;  /* [N] address, exclusive */
  const int64_t *lengths;        /* [N, D] elements */
  const int64_t *source_strides; /* [N, D] bytes, >= 0; 0 repeats an element */
  const int64_t *target_strides; /* [N, D] bytes, >= 0 */
  const int64_t *itemsize;       /* [N] bytes, >= 1 */
  int64_t num_rows;              /* N */
  int64_t num_dims;              /* D; with 0 dims each row is one element */
} ckpt_boxes;

/* Copy every box. On a refusal `bad_row` is the first row at fault, else -1.
 * A row with a zero length copies nothing and needs no memory. The bytes of all sources must be disjoint from the bytes of
 * all targets, and the targets of two rows from each other; this is the one condition that is not checked. */
ckpt_status ckpt_copy_boxes(const ckpt_boxes *boxes, int32_t num_threads, int64_t *bad_row);

typedef enum ckpt_kernel CKPT_ENUM_BASE {
  CKPT_KERNEL_AUTO = 0, /* the fastest that this processor has */
  CKPT_KERNEL_TABLE = 1,
  CKPT_KERNEL_SSE42 = 2,
  CKPT_KERNEL_ARM = 3
} ckpt_kernel;

/* 1 when this build has the kernel and this processor runs it. */
int32_t ckpt_kernel_available(ckpt_kernel kernel);

/* What CKPT_KERNEL_AUTO stands for here. */
ckpt_kernel ckpt_kernel_auto(void);

/* CRC-32C (Castagnoli, RFC 3720 B.4) of `data` going on from `value`, the CRC-32C of what came before (0 at the start). */
ckpt_status ckpt_crc32c(ckpt_kernel kernel, const void *data, uint64_t nbytes, uint32_t value, uint32_t *out);

/* out[i] = CRC-32C of data[starts[i] .. stops[i]). On a refusal `bad_range` is the first range outside `data`, else -1, and
 * `out` is untouched (CKPT_SOURCE_OUT_OF_BOUNDS). Threads share out whole ranges. */
ckpt_status ckpt_crc32c_ranges(ckpt_kernel kernel, const void *data, uint64_t nbytes, const int64_t *starts,
                               const int64_t *stops, int64_t num_ranges, int32_t num_threads, uint32_t *out,
                               int64_t *bad_range);

/* CRC-32C of A followed by B, from those of A and B and the size of B. */
uint32_t ckpt_crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t nbytes_b);

/* out[g] = CRC-32C of runs [firsts[g] .. firsts[g + 1]) one after the other, from those of each run and their sizes: 0 for a
 * group of none. `firsts` is [num_groups + 1] and ascends within [0, num_runs], no size is
 * negative, else CKPT_BAD_ARGUMENT and `out` is untouched. */
ckpt_status ckpt_crc32c_join(const uint32_t *crcs, const int64_t *nbytes, int64_t num_runs, const int64_t *firsts,
                             int64_t num_groups, uint32_t *out);

/* N boxes in D dims that are packed row by row into a range of an image, as columns. Element (i0, i1, ...) of row r lies at
 * source[r] + sum(i_d * source_strides[r*D + d]); its place is position[r] on, dense, the last dim running fastest. */
typedef struct ckpt_parts {
  const uint64_t *source;        /* [N] address */
  const uint64_t *source_limit;  /* [N] address, exclusive */
  const int64_t *position;       /* [N] bytes from the start of the image; rows are sorted by it and do not overlap */
  const int64_t *lengths;        /* [N, D] elements */
  const int64_t *source_strides; /* [N, D] bytes, >= 0; 0 repeats an element */
  const int64_t *itemsize;       /* [N] bytes, >= 1 */
  int64_t num_rows;              /* N */
  int64_t num_dims;              /* D; with 0 dims each row is one element */
} ckpt_parts;

/* Copy every row to its place, and out[i] = CRC-32C of bytes [segment_starts[i], segment_stops[i]) of the image as they are
 * afterwards, bytes that no row covers included. `target` holds bytes [start, stop) of the image; rows and segments lie inside.
 * Segments are sorted and disjoint, and may leave bytes out. On a refusal `bad_row` or `bad_segment` is the first at fault, the
 * other -1, and nothing is touched. A row with a zero length copies nothing, and its position does not matter. The sources must
 * be disjoint from the target, which is not checked. What is summed is what was written, even while the sources change. */
ckpt_status ckpt_pack(ckpt_kernel kernel, const ckpt_parts *parts, void *target, int64_t start, int64_t stop,
                      const int64_t *segment_starts, const int64_t *segment_stops, int64_t num_segments,
                      int32_t num_threads, uint32_t *out, int64_t *bad_row, int64_t *bad_segment);

/* Write all of `data` at `offset` of an open file, in slices of `slice_bytes` (a multiple of 4,096, at most 1 GiB) with up to
 * `in_flight` of them at a time; with one, uncut. Short writes are continued and interrupted ones repeated. When the file is
 * open with O_DIRECT and the system refuses a write with EINVAL or stops inside a block, the flag is taken off the descriptor
 * and the rest goes through the page cache; `direct` says afterwards whether the flag is on. CKPT_SYSTEM_ERROR: `error` is the
 * errno of the first failure seen, and any part of the range may have been written. */
ckpt_status ckpt_write_at(int32_t fd, const void *data, int64_t nbytes, int64_t offset, int64_t slice_bytes, int32_t in_flight,
                          int32_t *direct, int32_t *error);
#define CKPT_READ_ALIGN 4096 /* of buffers and offsets of reads around the page cache */

typedef enum ckpt_read_mode {
  CKPT_READ_AUTO = 0,     /* around the page cache, except for what is in it already */
  CKPT_READ_BUFFERED = 1, /* through the page cache */
  CKPT_READ_DIRECT = 2    /* around the page cache wherever the file system can */
} ckpt_read_mode;

/* What became of a chunk; a number above 0 is the errno of the read that failed. */
enum {
  CKPT_READ_DONE = 0,      /* read, verified, copied */
  CKPT_READ_NOT_READ = -1, /* another chunk failed first */
  CKPT_READ_SHORT = -2,    /* the file ends before the chunk does */
  CKPT_READ_DAMAGED = -3   /* a block has another checksum than expected */
};

/* C chunks of F files, with B blocks to verify and N boxes to copy. All columns belong to the caller. */
typedef struct ckpt_reads {
  const int32_t *fd;          /* [F] open for reading */
  const int32_t *direct_fd;   /* [F] the same file opened with O_DIRECT, or -1 */
  const uint64_t *memory;     /* [F] address of what is mapped and takes the place of the file, 0 for none; NULL: none of all */
  const int64_t *memory_bytes; /* [F] */
  int64_t num_files;          /* F */
  const int32_t *file;        /* [C] */
  const int64_t *start;       /* [C] bytes of the file */
  const int64_t *stop;        /* [C] */
  int64_t num_chunks;         /* C */
  const int64_t *block_starts; /* [C + 1] blocks of chunk c are [block_starts[c], block_starts[c + 1]) */
  const int64_t *block_start; /* [B] bytes of the file, inside the chunk */
  const int64_t *block_stop;  /* [B] */
  const uint32_t *block_crc;  /* [B] expected */
  const int64_t *copy_starts; /* [C + 1] rows of chunk c */
  ckpt_boxes copies;          /* [N] `source` is a byte of the file, inside the chunk; `source_limit` is not looked at */
  void *buffer;               /* num_threads x buffer_bytes, aligned */
  int64_t buffer_bytes;       /* of one thread: the longest chunk with both ends rounded out; a multiple of the alignment */
  ckpt_kernel kernel;
  ckpt_read_mode mode;
  int32_t num_threads;        /* 1 to CKPT_THREADS_MAX */
  int32_t stop_at_first;      /* begin no chunk after one that failed */
} ckpt_reads;

typedef struct ckpt_read_results {
  int32_t *outcome;       /* [C] */
  uint32_t *found_crc;    /* [B] of the chunks that are done or damaged */
  int64_t direct_bytes;   /* read around the page cache */
  int64_t cached_bytes;   /* read through it */
  int32_t direct_refused; /* 1: a file that was opened for it could not be read so, and was read through the cache */
} ckpt_read_results;

/* Read every chunk whole, verify all its blocks, and only then copy its boxes. Of what is mapped, every block is verified before a
 * byte of it is copied; of a damaged chunk, bytes before the damage may be copied. Threads share out the chunks in order. Memory
 * that is copied must lie in blocks of the same chunk to be covered by this promise. On a refusal `bad_row` is the box at fault
 * or -1. */
ckpt_status ckpt_read_chunks(const ckpt_reads *reads, ckpt_read_results *results, int64_t *bad_row);

/* Erasure coding over GF(2^8) with polynomial x^8 + x^4 + x^3 + x^2 + 1 (0x11D). A code makes n = k + m pieces of k: pieces
 * 0 .. k-1 are the data themselves, the others parity. Its matrix [n, k] gives each piece as a sum of the data. */
#define CKPT_CODE_SOURCES_MAX 64 /* k, and sources of one call */
#define CKPT_CODE_TARGETS_MAX 32 /* m, and targets of one call */
#define CKPT_CODE_TILE_BYTES_MAX (1 << 30)

/* Kept with what was coded: numbers are never given another meaning. */
typedef enum ckpt_code CKPT_ENUM_BASE {
  CKPT_CODE_XOR = 1,      /* m = 1: the parity is the exclusive or of the data */
  CKPT_CODE_CAUCHY_RS = 2 /* element (i, j) of a parity row i >= k is the inverse of i ^ j, as ISA-L's gf_gen_cauchy1_matrix */
} ckpt_code;

/* The matrix of a code, [k + m, k], into `out`. */
ckpt_status ckpt_code_matrix(ckpt_code code, int32_t k, int32_t m, uint8_t *out);

/* Coefficients [num_wanted, k] that give the wanted pieces from the k pieces `have`, in the order of both lists. `have` names k
 * different pieces. CKPT_SINGULAR when they do not determine the data. */
ckpt_status ckpt_code_rows(const uint8_t *matrix, int32_t k, int32_t m, const int32_t *have, const int32_t *wanted,
                           int32_t num_wanted, uint8_t *out);

/* How many of the (n over k) choices of k pieces do not determine the data: 0 for a code that survives any m losses. Tries all. */
ckpt_status ckpt_code_count_singular(const uint8_t *matrix, int32_t k, int32_t m, int64_t *out);

typedef enum ckpt_coder CKPT_ENUM_BASE {
  CKPT_CODER_AUTO = 0,     /* the fastest that is here */
  CKPT_CODER_PORTABLE = 1, /* plain C++ */
  CKPT_CODER_ISAL = 2      /* Intel ISA-L, linked or found at run time */
} ckpt_coder;

int32_t ckpt_coder_available(ckpt_coder coder);
ckpt_coder ckpt_coder_auto(void);

/* Where ISA-L comes from: the file that was found, "linked", or "" when there is none. */
const char *ckpt_coder_isal_library(void);

typedef struct ckpt_coding {
  const uint64_t *source;       /* [K] address; not looked at where there are no bytes */
  const int64_t *source_bytes;  /* [K] bytes there, at most block_bytes; what is missing to the block counts as zero, unread */
  const uint64_t *target;       /* [R] address of block_bytes */
  const uint8_t *coefficients;  /* [R, K] */
  int32_t num_sources;          /* K, 1 to CKPT_CODE_SOURCES_MAX */
  int32_t num_targets;          /* R, 0 (sums alone) to CKPT_CODE_TARGETS_MAX */
  int64_t block_bytes;
  int64_t tile_bytes;           /* of each source at a time, 64 to CKPT_CODE_TILE_BYTES_MAX, a multiple of 64 */
  int32_t add;                  /* 1: the sum is added to what the targets hold, so that sources can come one after the other */
} ckpt_coding;

/* target[r] = sum over s of coefficients[r, s] * source[s], tile by tile, on the caller's thread; and while a tile is in the
 * processor's cache, its share of source_crcs[s] = CRC-32C of the bytes there are of the source and of target_crcs[r] = that of
 * the target afterwards. Either may be null. Targets must be disjoint from the sources and from each other: on a refusal
 * `bad_source` or `bad_target` is the one at fault, else -1, and nothing is touched. What is summed and what is coded are two
 * reads: while a source changes, they may differ. With CKPT_KERNEL_AUTO the coder ISA-L sums by its own CRC-32C. */
ckpt_status ckpt_code_blocks(ckpt_coder coder, ckpt_kernel kernel, const ckpt_coding *coding, uint32_t *source_crcs,
                             uint32_t *target_crcs, int32_t *bad_source, int32_t *bad_target);

/* For benchmarks: the same by ISA-L's own ec_encode_data and nothing else: no checks, no short sources, no sums, no add. */
ckpt_status ckpt_code_isal_raw(const ckpt_coding *coding);

/* Merging. Elements of any float dtype are widened to double, computed with, and rounded once, to nearest even. Every product, sum
 * and quotient is rounded on its own (no fused multiply-add) and sums have a fixed order, so that a result has the same bits on
 * every processor, with every kernel and on any number of threads. Elements need not be aligned. */
#define CKPT_MERGE_SOURCES_MAX 256 /* of one call */
#define CKPT_SUM_BLOCK 2048        /* elements of one block of a sum */

typedef enum ckpt_float CKPT_ENUM_BASE {
  CKPT_F64 = 1,
  CKPT_F32 = 2,
  CKPT_F16 = 3,
  CKPT_BF16 = 4,
  CKPT_F8_E4M3FN = 5,
  CKPT_F8_E5M2 = 6,
  CKPT_F8_E4M3FNUZ = 7,
  CKPT_F8_E5M2FNUZ = 8
} ckpt_float;

typedef enum ckpt_loops CKPT_ENUM_BASE {
  CKPT_LOOPS_AUTO = 0, /* the fastest that this processor has */
  CKPT_LOOPS_PORTABLE = 1,
  CKPT_LOOPS_AVX2 = 2,
  CKPT_LOOPS_AVX512 = 3
} ckpt_loops;

int32_t ckpt_loops_available(ckpt_loops loops);
ckpt_loops ckpt_loops_auto(void);

/* K parts, each a weighted sum of the same elements of S sources, over a divisor. */
typedef struct ckpt_mix_parts {
  const uint64_t *source;      /* [K, S] address, 0: this source has no share in this part and is not read */
  const int32_t *dtype;        /* [K, S] ckpt_float; not looked at where there is no address */
  const double *weight;        /* [K, S] */
  const int64_t *length;       /* [K] elements */
  const double *divisor;       /* [K, 2] high and low part; 1 and 0: the sum is not divided */
  const uint64_t *sum;         /* [K] address of `length` doubles (twice as many where `exact`) for sums in the making, 0: none */
  const uint64_t *target;      /* [K] address, 0: the sum is kept in `sum` and nothing is made of it yet */
  const int32_t *target_dtype; /* [K] ckpt_float */
  const uint8_t *exact;        /* [K] 1: summed with a compensation term, for sources of 64 bits */
  int64_t num_parts;           /* K */
  int32_t num_sources;         /* S, 1 to CKPT_MERGE_SOURCES_MAX */
  int32_t go_on;               /* 1: `sum` holds the sum of sources before these; parts without `sum` are then refused */
  int32_t num_threads;
} ckpt_mix_parts;

/* target[k] = round((w0 * x0 + w1 * x1 + ...) / divisor), the sources in their order, the first product not added to zero (so that
 * -0 stays). bad[k] = 1 where an element of the target is NaN or infinite, else 0; not touched without a target. A part in which no
 * source has a share, unless it goes on, is refused: `bad_part` is it, else -1. Targets and sums are disjoint from the sources and
 * from each other, which is not checked. */
ckpt_status ckpt_mix(ckpt_loops loops, const ckpt_mix_parts *parts, uint8_t *bad, int64_t *bad_part);

/* Whether all elements are finite: 1 or 0. */
ckpt_status ckpt_all_finite(ckpt_loops loops, uint64_t source, ckpt_float dtype, int64_t length, int32_t *out);

/* The same elements of S sources, and of a base that is subtracted from each (address 0: none). */
typedef struct ckpt_tile {
  const uint64_t *source; /* [S] address */
  const int32_t *dtype;   /* [S] ckpt_float */
  int32_t num_sources;    /* S, 1 to CKPT_MERGE_SOURCES_MAX */
  uint64_t base;
  ckpt_float base_dtype;
  int64_t length;         /* elements */
  int32_t num_threads;
} ckpt_tile;

/* How often each value occurs of some bits of the magnitude, rounded to float (its 31 bits below the sign): for every element with
 * (magnitude >> shift) >> bits equal to prefix[s], or any where that is negative, bins[s][(magnitude >> shift) & (2^bits - 1)] += 1.
 * `bins` is [S, 2^bits] and added to. A thread takes whole sources. */
ckpt_status ckpt_histogram(ckpt_loops loops, const ckpt_tile *tile, int32_t shift, int32_t bits, const int64_t *prefix,
                           uint64_t *bins);

/* Sums have this order: the elements of a block of CKPT_SUM_BLOCK go by their number modulo 8 to eight sums, in rising order;
 * these are added as ((0+4)+(2+6)) + ((1+5)+(3+7)); and the blocks one after the other. `scratch` has room for the sums of
 * all blocks: ceil(length / CKPT_SUM_BLOCK) times as many doubles as `out`.
 *
 * out[s, t] = sum of x_s * x_t, symmetric, [S, S]. */
ckpt_status ckpt_gram(ckpt_loops loops, const ckpt_tile *tile, double *scratch, double *out);

/* out[s] = sum of x, of |x|, of x * x, and the greatest |x|, [S, 4]. */
ckpt_status ckpt_moments(ckpt_loops loops, const ckpt_tile *tile, double *scratch, double *out);

typedef enum ckpt_ties_mode CKPT_ENUM_BASE { CKPT_TIES_MEAN = 0, CKPT_TIES_SUM = 1, CKPT_TIES_MAX = 2 } ckpt_ties_mode;

typedef struct ckpt_ties_rule {
  const uint32_t *threshold; /* [S] a delta counts when its magnitude as a float has at least these bits */
  const double *weight;      /* [S] */
  double scale;
  ckpt_ties_mode mode;
  int32_t zero_sign;         /* the sign where the deltas cancel: 1, -1, or 0: the element of the base stays */
} ckpt_ties_rule;

/* TIES (trim, elect sign, merge): target = round(base + scale * merged), where merged is, of the deltas that count, times their
 * weight, and have the sign of the sum of all that count: their sum over the sum of their weights, their sum, or the greatest.
 * With target 0 only sign_sum = the sum of the signs of these sums, over all elements. `bad` as in ckpt_mix. */
ckpt_status ckpt_ties(ckpt_loops loops, const ckpt_tile *tile, const ckpt_ties_rule *rule, uint64_t target,
                      ckpt_float target_dtype, int64_t *sign_sum, uint8_t *bad);

/* out[i] = a number in [0, 1) with 32 bits for element `first + i`: Philox 4x32-10 (Salmon et al. 2011) with this key and the counter
 * (number / 4, 0), its word number % 4, over 2^32. */
ckpt_status ckpt_uniform(ckpt_loops loops, uint64_t key, uint64_t first, int64_t length, double *out);

/* How this library was built, for reports: "GCC 12.2.0", "Release", "" or "address". */
const char *ckpt_build_compiler(void);
const char *ckpt_build_type(void);
const char *ckpt_build_sanitizer(void);

#ifdef __cplusplus
}
#endif
#endif
