// What every thread of merging does first. In: nothing. Out: the processor's modes, put back at the end.
#ifndef CKPT_MERGE_THREADS_H
#define CKPT_MERGE_THREADS_H

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace ckpt::merge {

// Denormal numbers count, and rounding is to nearest, whatever the program has set for its own arithmetic (a thread inherits it).
class KeepDenormals {
 public:
  KeepDenormals(const KeepDenormals&) = delete;
  KeepDenormals& operator=(const KeepDenormals&) = delete;
#if defined(__x86_64__)
  KeepDenormals() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~KeepDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  KeepDenormals() {}
#endif
};

}  // namespace ckpt::merge

#endif
