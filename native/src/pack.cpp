// Copy parts of tensors to their places in an image and sum segments of it, in one pass over the memory: each piece is summed
// while it is still in the processor's cache. In: columns of parts, sorted by place. Out: copied bytes and checksums. Never
// touches a byte before all columns are checked.
//
// The range of the image is cut into spans, which threads claim. A span begins at its first byte or, when that lies inside a
// piece, where this piece ends: so every piece is copied, and every byte summed, by exactly one thread, and the sum of a byte
// comes after its copy. A segment that reaches over several spans is joined at the end.

#include <algorithm>
#include <atomic>

#include "box_row.h"
#include "ckpt_core.h"
#include "crc32c_kernels.h"
#include "stream_copy.h"
#include "workers.h"

namespace ckpt {
namespace {

using crc32c::Update;

constexpr int64_t kPieceBytes = 256 * 1024;  // half or a quarter of a second-level cache
constexpr int64_t kTransposedPieceBytes = 4 * 1024 * 1024;  // tiles need many rows; worth more than a warm cache
constexpr int64_t kTransposedRunBytesMax = 64;
constexpr int64_t kSpanBytesMin = 1024 * 1024;  // a thread costs about 30 us to start, a third of the work on this much
constexpr int64_t kSpansMax = 4 * CKPT_THREADS_MAX;

// Row `r`, and its checks on the source; where it goes is left to the caller. A row with a zero length has run 0.
ckpt_status read_part(const ckpt_parts& parts, int64_t r, Row* row) {
  const int64_t itemsize = parts.itemsize[r];
  if (itemsize < 1) return CKPT_BAD_ARGUMENT;
  row->run = row->nbytes = itemsize;
  row->num_dims = 0;
  bool too_large = false;
  Dim kept[CKPT_DIMS_MAX];
  for (int64_t d = parts.num_dims - 1; d >= 0; --d) {
    const int64_t length = parts.lengths[r * parts.num_dims + d];
    const int64_t stride = parts.source_strides[r * parts.num_dims + d];
    if (length < 0 || stride < 0) return CKPT_BAD_ARGUMENT;
    if (length == 0) row->run = 0;
    if (length <= 1) continue;
    kept[row->num_dims++] = Dim{length, stride, row->nbytes};
    if (!too_large) too_large = __builtin_mul_overflow(row->nbytes, length, &row->nbytes);
  }
  if (row->run == 0) {
    row->nbytes = 0;
    return CKPT_OK;
  }
  std::reverse_copy(kept, kept + row->num_dims, row->dims);
  int64_t extent;
  if (!extent_of(row->dims, row->num_dims, itemsize, &Dim::source_stride, &extent)) return CKPT_SOURCE_OUT_OF_BOUNDS;
  if (!fits(parts.source[r], extent, parts.source_limit[r])) return CKPT_SOURCE_OUT_OF_BOUNDS;
  if (too_large) return CKPT_TARGET_OUT_OF_BOUNDS;
  row->source = reinterpret_cast<const std::byte*>(static_cast<uintptr_t>(parts.source[r]));
  return CKPT_OK;
}

// How a simplified row is cut: at dim `level` (its run, when that is past the dims) into groups of at most `group`.
struct Cut {
  int level;
  int64_t length;  // of that dim; bytes for the run
  int64_t unit;    // bytes of the target that one of it holds
  int64_t group;
};

Cut cut_of(const Row& row) {
  bool transposed = false;
  for (int d = 0; d + 1 < row.num_dims; ++d)
    transposed |= row.dims[d].source_stride < row.dims[row.num_dims - 1].source_stride;
  const int64_t bytes = transposed && row.run <= kTransposedRunBytesMax ? kTransposedPieceBytes : kPieceBytes;
  int level = 0;
  while (level < row.num_dims && row.dims[level].target_stride > bytes) ++level;
  if (level == row.num_dims) return {level, row.run, 1, bytes};
  const Dim& dim = row.dims[level];
  return {level, dim.length, dim.target_stride, std::max<int64_t>(1, bytes / dim.target_stride)};
}

struct Piece {
  int64_t line;   // number of the run of dim `level` that it lies in
  int64_t first;  // in dim `level`
  int64_t count;
  int64_t start;  // bytes from the start of the row
  int64_t stop;
};

// The piece that holds byte `at` of a row.
Piece piece_at(const Cut& cut, int64_t at) {
  const int64_t line_bytes = cut.length * cut.unit;
  const int64_t line = at / line_bytes;
  const int64_t first = at % line_bytes / cut.unit / cut.group * cut.group;
  const int64_t count = std::min(cut.group, cut.length - first);
  const int64_t start = line * line_bytes + first * cut.unit;
  return {line, first, count, start, start + count * cut.unit};
}

// With `stream`, nobody reads the target soon: what is summed is not streamed.
void copy_piece(const Row& row, const Cut& cut, const Piece& piece, std::byte* target, bool stream) {
  Row part;  // filled by hand: a Row is 1.5 KiB, more than many tensors
  part.source = row.source;
  part.target = target;
  part.run = row.run;
  part.nbytes = piece.stop - piece.start;
  int64_t rest = piece.line;
  for (int d = cut.level - 1; d >= 0; --d) {
    part.source += rest % row.dims[d].length * row.dims[d].source_stride;
    rest /= row.dims[d].length;
  }
  part.num_dims = row.num_dims - cut.level;
  if (part.num_dims == 0) {
    part.source += piece.first;
    part.run = piece.count;
    if (stream) return stream_copy(part.target, part.source, static_cast<size_t>(part.run));
  } else {
    std::copy(row.dims + cut.level, row.dims + row.num_dims, part.dims);
    part.source += piece.first * part.dims[0].source_stride;
    part.dims[0].length = piece.count;
  }
  copy_row(&part);
}

// One call: what all threads share, all of it read-only but `out`, whose elements have one writer each.
struct Job {
  const ckpt_parts& parts;
  std::byte* target;
  int64_t start;  // of the image, at `target`
  int64_t stop;
  const int64_t* segment_starts;
  const int64_t* segment_stops;
  int64_t num_segments;
  uint32_t* out;
  Update update;
};

struct Span {
  int64_t start = 0;
  int64_t row = 0;        // the first whose bytes end after `start`
  int64_t head = -1;      // the segment that began in an earlier span and goes on in this one
  int64_t head_bytes = 0;  // of it in this span
  uint32_t head_crc = 0;
};

// Sums the segments of one span from front to back.
class Summer {
 public:
  Summer(const Job& job, Span* span, int64_t start) : job_(job), span_(span), start_(start), done_(start) {
    segment_ = std::upper_bound(job.segment_stops, job.segment_stops + job.num_segments, start) - job.segment_stops;
  }

  int64_t done() const { return done_; }

  // Go on to byte `stop` of the image, whose bytes before it are all in place.
  void advance(int64_t stop) {
    while (segment_ < job_.num_segments && job_.segment_starts[segment_] < stop) {
      const int64_t from = std::max(done_, job_.segment_starts[segment_]);
      const int64_t to = std::min(stop, job_.segment_stops[segment_]);
      if (from < to) {
        const auto* data = reinterpret_cast<const unsigned char*>(job_.target + (from - job_.start));
        crc_ = ~job_.update(~crc_, data, static_cast<size_t>(to - from));
      }
      if (to < job_.segment_stops[segment_]) break;
      finish(to);
      ++segment_;
    }
    done_ = stop;
  }

  // The end of the span: keep what there is of a segment that goes on after it.
  void close() {
    if (segment_ < job_.num_segments && job_.segment_starts[segment_] < done_) finish(done_);
  }

 private:
  // The sum of the segment up to `stop` goes to `out` when it began in this span, else to the span.
  void finish(int64_t stop) {
    if (job_.segment_starts[segment_] < start_) {
      span_->head = segment_;
      span_->head_bytes = stop - start_;
      span_->head_crc = crc_;
    } else {
      job_.out[segment_] = crc_;
    }
    crc_ = 0;
  }

  const Job& job_;
  Span* span_;
  int64_t start_;
  int64_t done_;
  int64_t segment_;
  uint32_t crc_ = 0;
};

// Where the pieces of a span begin: its start, or the end of the piece that its start lies inside.
int64_t first_byte_of(const Job& job, const Span& span) {
  if (span.row >= job.parts.num_rows || job.parts.position[span.row] >= span.start) return span.start;
  Row row;
  read_part(job.parts, span.row, &row);
  simplify(&row);
  const int64_t at = span.start - job.parts.position[span.row];
  const Piece piece = piece_at(cut_of(row), at);
  return piece.start == at ? span.start : job.parts.position[span.row] + piece.stop;
}

// Copy and sum bytes [start, stop) of the image, which begin and end where pieces do.
void run_span(const Job& job, Span* span, int64_t start, int64_t stop) {
  Summer summer(job, span, start);
  Row row;
  for (int64_t r = span->row; r < job.parts.num_rows; ++r) {
    read_part(job.parts, r, &row);
    if (row.run == 0) continue;
    const int64_t position = job.parts.position[r];
    if (position >= stop) break;
    simplify(&row);
    const Cut cut = cut_of(row);
    for (int64_t at = std::max<int64_t>(start - position, 0); at < row.nbytes && position + at < stop;) {
      const Piece piece = piece_at(cut, at);
      copy_piece(row, cut, piece, job.target + (position + piece.start - job.start), job.num_segments == 0);
      at = piece.stop;
      if (position + at - summer.done() >= kPieceBytes) summer.advance(position + at);
    }
  }
  summer.advance(stop);
  summer.close();
}

// Checks every row, and finds for each span the row that it begins in.
ckpt_status check_parts(const Job& job, Span* spans, int64_t num_spans, int64_t* bad_row) {
  int64_t previous = job.start;
  int64_t span = 0;
  Row row;
  for (int64_t r = 0; r < job.parts.num_rows; ++r) {
    ckpt_status status = read_part(job.parts, r, &row);
    if (status == CKPT_OK && row.run > 0) {
      const int64_t position = job.parts.position[r];
      if (position < job.start || position > job.stop || row.nbytes > job.stop - position)
        status = CKPT_TARGET_OUT_OF_BOUNDS;
      else if (position < previous)
        status = CKPT_TARGET_OVERLAPS;
      else
        previous = position + row.nbytes;
    }
    if (status != CKPT_OK) {
      *bad_row = r;
      return status;
    }
    for (; span < num_spans && spans[span].start < previous; ++span) spans[span].row = r;
  }
  for (; span < num_spans; ++span) spans[span].row = job.parts.num_rows;
  return CKPT_OK;
}

ckpt_status check_segments(const Job& job, int64_t* bad_segment) {
  int64_t previous = job.start;
  for (int64_t i = 0; i < job.num_segments; ++i) {
    if (job.segment_starts[i] < previous || job.segment_stops[i] < job.segment_starts[i] || job.segment_stops[i] > job.stop) {
      *bad_segment = i;
      return CKPT_SEGMENT_OUT_OF_BOUNDS;
    }
    previous = job.segment_stops[i];
  }
  return CKPT_OK;
}

bool has_null(const ckpt_parts& parts) {
  if (parts.num_rows == 0) return false;
  if (!parts.source || !parts.source_limit || !parts.position || !parts.itemsize) return true;
  return parts.num_dims > 0 && (!parts.lengths || !parts.source_strides);
}

void run_spans(const Job& job, Span* spans, int64_t num_spans, int64_t threads) {
  std::atomic<int64_t> claimed{0};
  run_workers(threads, [&] {
    for (int64_t s = claimed.fetch_add(1); s < num_spans; s = claimed.fetch_add(1)) {
      const int64_t start = first_byte_of(job, spans[s]);
      const int64_t stop = s + 1 < num_spans ? first_byte_of(job, spans[s + 1]) : job.stop;
      if (start < stop) run_span(job, &spans[s], start, stop);
    }
  });
  for (int64_t s = 0; s < num_spans; ++s)
    if (spans[s].head >= 0)
      job.out[spans[s].head] = ckpt_crc32c_combine(job.out[spans[s].head], spans[s].head_crc,
                                                   static_cast<uint64_t>(spans[s].head_bytes));
}

}  // namespace
}  // namespace ckpt

ckpt_status ckpt_pack(ckpt_kernel kernel, const ckpt_parts* parts, void* target, int64_t start, int64_t stop,
                      const int64_t* segment_starts, const int64_t* segment_stops, int64_t num_segments,
                      int32_t num_threads, uint32_t* out, int64_t* bad_row, int64_t* bad_segment) {
  using namespace ckpt;
  if (!parts || !bad_row || !bad_segment) return CKPT_BAD_ARGUMENT;
  *bad_row = *bad_segment = -1;
  if (parts->num_rows < 0 || parts->num_dims < 0 || parts->num_dims > CKPT_DIMS_MAX || has_null(*parts))
    return CKPT_BAD_ARGUMENT;
  if (start < 0 || stop < start || (!target && stop > start)) return CKPT_BAD_ARGUMENT;
  if (num_segments < 0 || (num_segments > 0 && (!segment_starts || !segment_stops || !out))) return CKPT_BAD_ARGUMENT;
  const Update update = crc32c::kernel_of(kernel);
  if (!update) return CKPT_NO_KERNEL;
  const Job job{*parts,       static_cast<std::byte*>(target), start, stop, segment_starts, segment_stops,
                num_segments, out,                             update};
  // Four spans per thread, so that one slow thread does not hold up the others.
  const int64_t threads = std::clamp<int64_t>(std::min<int64_t>(num_threads, (stop - start) / kSpanBytesMin), 1, CKPT_THREADS_MAX);
  const int64_t span_bytes = threads == 1 ? stop - start : std::max(kSpanBytesMin, (stop - start) / (4 * threads) + 1);
  Span spans[kSpansMax];
  int64_t num_spans = 0;
  do spans[num_spans].start = start + num_spans * span_bytes;
  while (++num_spans < kSpansMax && stop - start > num_spans * span_bytes);
  ckpt_status status = check_parts(job, spans, num_spans, bad_row);
  if (status == CKPT_OK) status = check_segments(job, bad_segment);
  if (status != CKPT_OK) return status;
  std::fill_n(out, num_segments, 0u);
  run_spans(job, spans, num_spans, threads);
  return CKPT_OK;
}
