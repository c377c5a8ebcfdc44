// Write one range of a file with several writes in flight. In: a descriptor and bytes. Out: all of them given to the kernel, or
// the first error. Never syncs, and never closes or moves the descriptor.

#include "write_at.h"

#include <cerrno>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "workers.h"

namespace ckpt {
namespace {

constexpr int64_t kBlockBytes = 4096;              // what direct I/O takes; a multiple of every logical block size in use
constexpr int64_t kWriteBytesMax = int64_t{1} << 30;  // of one system call; Linux takes 2 GiB less a page

#ifdef O_DIRECT
constexpr int kDirect = O_DIRECT;
#else
constexpr int kDirect = 0;
#endif

// What the threads of one call share.
struct Job {
  int fd;
  const char* data;
  int64_t nbytes;
  int64_t offset;
  Pwrite pwrite;
  std::atomic<bool> direct;
  std::atomic<int> error{0};
  std::atomic<int64_t> claimed{0};
};

// Go on through the page cache. Writes in flight keep the way they began; the flag belongs to the open file, not to a thread.
void leave_direct(Job* job) {
  const int flags = fcntl(job->fd, F_GETFL);
  if (flags >= 0 && fcntl(job->fd, F_SETFL, flags & ~kDirect) == 0)
    job->direct.store(false);
  else
    job->error.store(errno);
}

void write_slice(Job* job, int64_t start, int64_t stop) {
  while (start < stop && job->error.load() == 0) {
    const bool direct = job->direct.load();
    const auto count = static_cast<size_t>(std::min(stop - start, kWriteBytesMax));
    const int64_t done = job->pwrite(job->fd, job->data + start, count, job->offset + start);
    if (done > 0) {
      start += done;
      // A short write: the next position is not on a block. The last slice ends where the caller's bytes end.
      if (direct && start < stop && done % kBlockBytes != 0) leave_direct(job);
    } else if (done == 0) {
      job->error.store(EIO);
    } else if (errno == EINVAL && direct) {
      leave_direct(job);
    } else if (errno != EINTR) {
      job->error.store(errno);
    }
  }
}

}  // namespace

ckpt_status write_at(int fd, const void* data, int64_t nbytes, int64_t offset, int64_t slice_bytes, int32_t in_flight,
                     Pwrite pwrite, int32_t* direct, int32_t* error) {
  int64_t end;
  if (!direct || !error) return CKPT_BAD_ARGUMENT;
  *direct = *error = 0;
  if ((!data && nbytes > 0) || nbytes < 0 || offset < 0 || slice_bytes < kBlockBytes || slice_bytes % kBlockBytes != 0 ||
      slice_bytes > kWriteBytesMax || __builtin_add_overflow(offset, nbytes, &end) || end > INT64_MAX - slice_bytes * CKPT_THREADS_MAX)
    return CKPT_BAD_ARGUMENT;
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0) {
    *error = errno;
    return CKPT_SYSTEM_ERROR;
  }
  Job job{fd, static_cast<const char*>(data), nbytes, offset, pwrite, {(flags & kDirect) != 0}};
  const int64_t slices = nbytes / slice_bytes + (nbytes % slice_bytes != 0);
  const int64_t threads = std::clamp<int64_t>(std::min<int64_t>(in_flight, slices), 1, CKPT_THREADS_MAX);
  const int64_t slice = threads == 1 ? std::max<int64_t>(nbytes, 1) : slice_bytes;  // one writer needs no cuts
  run_workers(threads, [&job, slice] {
    for (int64_t at = job.claimed.fetch_add(slice); at < job.nbytes && job.error.load() == 0; at = job.claimed.fetch_add(slice))
      write_slice(&job, at, at + std::min(slice, job.nbytes - at));
  });
  *direct = job.direct.load() ? 1 : 0;
  *error = job.error.load();
  return *error ? CKPT_SYSTEM_ERROR : CKPT_OK;
}

}  // namespace ckpt

ckpt_status ckpt_write_at(int32_t fd, const void* data, int64_t nbytes, int64_t offset, int64_t slice_bytes, int32_t in_flight,
                          int32_t* direct, int32_t* error) {
  const ckpt::Pwrite system = [](int file, const void* from, size_t count, int64_t at) -> int64_t {
    return pwrite(file, from, count, static_cast<off_t>(at));
  };
  return ckpt::write_at(fd, data, nbytes, offset, slice_bytes, in_flight, system, direct, error);
}
