// Run one function on several threads at once. In: a worker that claims its share itself. Out: nothing. Never throws.
#ifndef CKPT_WORKERS_H
#define CKPT_WORKERS_H

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>

#include "ckpt_core.h"

namespace ckpt {

// Calls `worker` on `num_threads` threads, one of them the caller's, and returns when all are done. Where the system refuses a
// thread, those there are do all the work: workers claim pieces from a shared counter, so none is left behind.
template <class Worker>
void run_workers(int64_t num_threads, const Worker& worker) noexcept {
  std::thread threads[CKPT_THREADS_MAX - 1];
  const int64_t wanted = std::clamp<int64_t>(num_threads, 1, CKPT_THREADS_MAX) - 1;
  int64_t started = 0;
  try {
    for (; started < wanted; ++started) threads[started] = std::thread([&worker] { worker(); });
  } catch (const std::system_error&) {
  }
  worker();
  for (int64_t i = 0; i < started; ++i) threads[i].join();
}

}  // namespace ckpt

#endif
