// Read chunks of files on several threads, verify each chunk's blocks, and copy boxes out of it. In: columns of chunks, blocks
// and boxes. Out: copied bytes, and what became of each chunk. Never copies a byte out of a chunk with a block that is not what
// its checksum says (of what is mapped: out of such a block), never holds more than one chunk per thread, never writes outside a box's limits.

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

#include "box_row.h"
#include "ckpt_core.h"
#include "stream_copy.h"
#include "workers.h"

namespace ckpt {
namespace {

constexpr int64_t kAlign = CKPT_READ_ALIGN;
constexpr int64_t kPieceBytes = 512 * 1024;  // of a cached chunk: half of a second-level cache, so that the checksum finds it there

// cachestat(2), Linux 6.5, has one number on all architectures. Older headers lack it.
constexpr long kCachestat = 451;
struct CacheRange {
  uint64_t offset, nbytes;
};
struct CacheStat {
  uint64_t cached, dirty, writeback, evicted, recently_evicted;
};

int64_t align_down(int64_t value) { return value & ~(kAlign - 1); }
int64_t align_up(int64_t value) { return align_down(value + kAlign - 1); }

// Whether bytes [start, stop) of a file are in the page cache, or nearly so. False where the kernel cannot tell.
bool is_cached(int fd, int64_t start, int64_t stop) {
  const CacheRange range{static_cast<uint64_t>(start), static_cast<uint64_t>(stop - start)};
  CacheStat found{};
  if (syscall(kCachestat, fd, &range, &found, 0) == 0) {
    const int64_t pages = (align_up(stop) - align_down(start)) / sysconf(_SC_PAGESIZE);
    return static_cast<int64_t>(found.cached) >= pages - pages / 8;
  }
#ifdef RWF_NOWAIT
  for (const int64_t place : {start, stop - 1}) {  // both ends: a look costs a microsecond
    char byte;
    const iovec target{&byte, 1};
    if (preadv2(fd, &target, 1, place, RWF_NOWAIT) != 1) return false;
  }
  return true;
#else
  return false;
#endif
}

// Positioned read of all bytes. Returns 0, an errno, or CKPT_READ_SHORT.
int32_t read_all(int fd, std::byte* target, int64_t start, int64_t stop) {
  while (start < stop) {
    const ssize_t count = pread(fd, target, static_cast<size_t>(stop - start), start);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno;
    if (count == 0) return CKPT_READ_SHORT;
    target += count;
    start += count;
  }
  return 0;
}

class Reader {
 public:
  Reader(const ckpt_reads& reads, ckpt_read_results* results) : reads_(reads), results_(results) {}

  void run(int64_t thread) {
    std::byte* buffer = static_cast<std::byte*>(reads_.buffer) + thread * reads_.buffer_bytes;
    for (;;) {
      const int64_t chunk = claimed_.fetch_add(1);
      if (chunk >= reads_.num_chunks || stop_.load()) return;
      const int32_t outcome = one(chunk, buffer);
      results_->outcome[chunk] = outcome;
      if (outcome != CKPT_READ_DONE && reads_.stop_at_first) stop_.store(true);
    }
  }

  void tally() const {
    results_->direct_bytes = direct_bytes_.load();
    results_->cached_bytes = cached_bytes_.load();
    results_->direct_refused = refused_.load() ? 1 : 0;
  }

  int64_t next_thread() { return threads_.fetch_add(1); }

 private:
  int32_t one(int64_t chunk, std::byte* buffer) {
    const int64_t start = reads_.start[chunk], stop = reads_.stop[chunk];
    const int32_t file = reads_.file[chunk];
    if (reads_.memory && reads_.memory[file]) return in_memory(chunk, file, start);
    std::byte* data = buffer + (start - align_down(start));  // where the file's first wanted byte comes to lie
    const bool direct = wants_direct(file, start, stop);
    int32_t outcome = direct ? read_direct(file, buffer, start, stop) : 0;
    bool sound = true;
    int64_t at = direct ? stop : start;
    if (outcome != 0) return outcome;
    if (!direct) cached_bytes_.fetch_add(stop - start);
    for (int64_t b = reads_.block_starts[chunk]; b < reads_.block_starts[chunk + 1]; ++b) {
      if (reads_.block_stop[b] > at) {
        const int64_t to = std::min(stop, std::max(reads_.block_stop[b], at + kPieceBytes));
        outcome = read_all(reads_.fd[file], data + (at - start), at, to);
        if (outcome != 0) return outcome;
        at = to;
      }
      sound = verify(b, data, start) && sound;
    }
    if (at < stop) outcome = read_all(reads_.fd[file], data + (at - start), at, stop);
    if (outcome != 0) return outcome;
    if (!sound) return CKPT_READ_DAMAGED;
    copy(chunk, data, start);
    return CKPT_READ_DONE;
  }

  // What is mapped is verified and copied where it lies, some blocks at a time, so that memory is read once: the copy finds in a
  // second-level cache what was summed. No byte is copied before its block is verified; of a damaged chunk, those before it may be.
  int32_t in_memory(int64_t chunk, int32_t file, int64_t start) {
    const auto* data = reinterpret_cast<const std::byte*>(static_cast<uintptr_t>(reads_.memory[file])) + start;
    const bool ordered = is_ordered(chunk);
    Copied copied{reads_.copy_starts[chunk], 0, start};
    bool sound = true;
    for (int64_t b = reads_.block_starts[chunk]; b < reads_.block_starts[chunk + 1]; ++b) {
      sound = verify(b, data, start) && sound;
      const int64_t verified = reads_.block_stop[b];
      if (sound && ordered && verified - copied.limit >= kPieceBytes / 2) copy_up_to(chunk, data, start, verified, &copied);
    }
    cached_bytes_.fetch_add(reads_.stop[chunk] - start);
    if (!sound) return CKPT_READ_DAMAGED;
    copy_up_to(chunk, data, start, INT64_MAX, &copied);
    return CKPT_READ_DONE;
  }

  // How far the rows of a chunk are copied: row `row` up to its byte `done`, all before it, none after it.
  struct Copied {
    int64_t row, done, limit;
  };

  // Whether blocks and rows are sorted by where they begin: then what ends before a block's end is in blocks up to that one.
  bool is_ordered(int64_t chunk) const {
    const int64_t *blocks = reads_.block_starts + chunk, *rows = reads_.copy_starts + chunk;
    return std::is_sorted(reads_.block_start + blocks[0], reads_.block_start + blocks[1]) &&
           std::is_sorted(reads_.copies.source + rows[0], reads_.copies.source + rows[1]);
  }

  // Go on with the rows as far as they lie before byte `limit` of the file. It comes once, so it goes past the caches.
  void copy_up_to(int64_t chunk, const std::byte* data, int64_t start, int64_t limit, Copied* copied) {
    copied->limit = limit;
    Row row;
    for (; copied->row < reads_.copy_starts[chunk + 1]; ++copied->row, copied->done = 0) {
      read_row(reads_.copies, copied->row, &row);
      if (row.run == 0) continue;
      const auto source = static_cast<int64_t>(reads_.copies.source[copied->row]);
      if (source >= limit) return;
      row.source = data + (source - start);
      simplify(&row);
      if (row.num_dims > 0) {
        int64_t extent;
        if (!extent_of(row.dims, row.num_dims, row.run, &Dim::source_stride, &extent) || extent > limit - source) return;
        copy_row(&row);
        continue;
      }
      const int64_t to = std::min(row.run, limit - source), done = copied->done;
      stream_copy(row.target + done, row.source + done, static_cast<size_t>(to - done));
      copied->done = to;
      if (to < row.run) return;
    }
  }

  bool verify(int64_t block, const std::byte* data, int64_t start) {
    const int64_t from = reads_.block_start[block];
    const auto nbytes = static_cast<uint64_t>(reads_.block_stop[block] - from);
    ckpt_crc32c(reads_.kernel, data + (from - start), nbytes, 0, &results_->found_crc[block]);
    return results_->found_crc[block] == reads_.block_crc[block];
  }

  void copy(int64_t chunk, const std::byte* data, int64_t start) {
    Row row;
    for (int64_t r = reads_.copy_starts[chunk]; r < reads_.copy_starts[chunk + 1]; ++r) {
      read_row(reads_.copies, r, &row);
      if (row.run == 0) continue;
      row.source = data + (static_cast<int64_t>(reads_.copies.source[r]) - start);
      simplify(&row);
      copy_row(&row);
    }
  }

  bool wants_direct(int32_t file, int64_t start, int64_t stop) {
    if (reads_.direct_fd[file] < 0 || refused_.load()) return false;
    if (reads_.mode == CKPT_READ_DIRECT) return true;
    return reads_.mode == CKPT_READ_AUTO && !is_cached(reads_.fd[file], start, stop);
  }

  // Whole aligned sectors around [start, stop); the buffer begins with the sector that holds `start`.
  int32_t read_direct(int32_t file, std::byte* buffer, int64_t start, int64_t stop) {
    const int64_t first = align_down(start), last = align_up(stop);
    int64_t at = first;
    while (at < stop) {
      const ssize_t count = pread(reads_.direct_fd[file], buffer + (at - first), static_cast<size_t>(last - at), at);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0 && errno != EINVAL && errno != EOPNOTSUPP) return errno;
      if (count < 0) refused_.store(true);  // it opened, but wants another alignment, or cannot after all
      if (count > 0) {
        at += count;
        direct_bytes_.fetch_add(count);
      }
      if (count <= 0 || at % kAlign != 0) break;  // the end of the file, at the latest
    }
    if (at >= stop) return 0;
    cached_bytes_.fetch_add(stop - std::max(at, start));
    return read_all(reads_.fd[file], buffer + (at - first), at, stop);
  }

  const ckpt_reads& reads_;
  ckpt_read_results* results_;
  std::atomic<int64_t> claimed_{0}, threads_{0}, direct_bytes_{0}, cached_bytes_{0};
  std::atomic<bool> stop_{false}, refused_{false};
};

bool has_null(const ckpt_reads& reads, const ckpt_read_results& results) {
  const ckpt_boxes& boxes = reads.copies;
  if (reads.num_chunks < 0 || reads.num_files < 0 || boxes.num_rows < 0 || boxes.num_dims < 0) return true;
  if (boxes.num_dims > CKPT_DIMS_MAX || reads.num_threads < 1 || reads.num_threads > CKPT_THREADS_MAX) return true;
  if (!reads.block_starts || !reads.copy_starts) return true;
  if (reads.num_chunks == 0) return false;
  if (!reads.fd || !reads.direct_fd || !reads.file || !reads.start || !reads.stop || !reads.buffer) return true;
  if (reads.memory && !reads.memory_bytes) return true;
  if (!results.outcome || reinterpret_cast<uintptr_t>(reads.buffer) % kAlign != 0 || reads.buffer_bytes % kAlign != 0)
    return true;
  const int64_t blocks = reads.block_starts[reads.num_chunks], rows = reads.copy_starts[reads.num_chunks];
  if (blocks > 0 && (!reads.block_start || !reads.block_stop || !reads.block_crc || !results.found_crc)) return true;
  if (rows != boxes.num_rows) return true;
  if (rows > 0 && (!boxes.source || !boxes.target || !boxes.target_limit || !boxes.itemsize)) return true;
  return rows > 0 && boxes.num_dims > 0 && (!boxes.lengths || !boxes.source_strides || !boxes.target_strides);
}

// The chunk lies in one buffer, its blocks lie in it, and each row reads from it and writes within its own limits.
ckpt_status check_chunk(const ckpt_reads& reads, int64_t chunk, int64_t* bad_row) {
  const int64_t start = reads.start[chunk], stop = reads.stop[chunk];
  if (reads.file[chunk] < 0 || reads.file[chunk] >= reads.num_files || start < 0 || stop < start) return CKPT_BAD_ARGUMENT;
  if (stop > INT64_MAX - kAlign || align_up(stop) - align_down(start) > reads.buffer_bytes) return CKPT_BAD_ARGUMENT;
  if (reads.block_starts[chunk + 1] < reads.block_starts[chunk] || reads.copy_starts[chunk + 1] < reads.copy_starts[chunk])
    return CKPT_BAD_ARGUMENT;
  const int32_t file = reads.file[chunk];
  if (reads.memory && reads.memory[file] && stop > reads.memory_bytes[file]) return CKPT_SOURCE_OUT_OF_BOUNDS;
  for (int64_t b = reads.block_starts[chunk]; b < reads.block_starts[chunk + 1]; ++b)
    if (reads.block_start[b] < start || reads.block_stop[b] < reads.block_start[b] || reads.block_stop[b] > stop)
      return CKPT_SOURCE_OUT_OF_BOUNDS;
  Row row;
  for (int64_t r = reads.copy_starts[chunk]; r < reads.copy_starts[chunk + 1]; ++r) {
    ckpt_status status = read_row(reads.copies, r, &row);
    const uint64_t source = reads.copies.source[r];
    if (status == CKPT_OK && row.run > 0 && source < static_cast<uint64_t>(start)) status = CKPT_SOURCE_OUT_OF_BOUNDS;
    if (status == CKPT_OK) status = check_row(reads.copies, r, source, static_cast<uint64_t>(stop), &row);
    if (status != CKPT_OK) {
      *bad_row = r;
      return status;
    }
  }
  return CKPT_OK;
}

}  // namespace
}  // namespace ckpt

ckpt_status ckpt_read_chunks(const ckpt_reads* reads, ckpt_read_results* results, int64_t* bad_row) {
  using namespace ckpt;
  if (!reads || !results || !bad_row) return CKPT_BAD_ARGUMENT;
  *bad_row = -1;
  results->direct_bytes = results->cached_bytes = 0;
  results->direct_refused = 0;
  if (has_null(*reads, *results)) return CKPT_BAD_ARGUMENT;
  if (!ckpt_kernel_available(reads->kernel)) return CKPT_NO_KERNEL;
  if (reads->num_chunks == 0) return CKPT_OK;
  if (reads->block_starts[0] != 0 || reads->copy_starts[0] != 0) return CKPT_BAD_ARGUMENT;
  for (int64_t chunk = 0; chunk < reads->num_chunks; ++chunk) {
    const ckpt_status status = check_chunk(*reads, chunk, bad_row);
    if (status != CKPT_OK) return status;
  }
  for (int64_t chunk = 0; chunk < reads->num_chunks; ++chunk) results->outcome[chunk] = CKPT_READ_NOT_READ;
  Reader reader(*reads, results);
  run_workers(std::min<int64_t>(reads->num_threads, reads->num_chunks), [&] { reader.run(reader.next_thread()); });
  reader.tally();
  return CKPT_OK;
}
