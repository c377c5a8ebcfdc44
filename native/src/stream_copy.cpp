// Streaming stores do not read the target's lines first, which is a third of a copy's traffic. Four pages at a time, so that several
// pages of memory are open at once: one page after the other was slower than memcpy (5.3 against 5.7 GB/s), four were 8.9 (Xeon with
// an L3 of 480 MiB, of which glibc takes half before it streams by itself).
//
// Between 2 KiB and a second-level cache glibc takes `rep movsb`, which is slow on some processors when the target lies a little
// behind the source within a page: 4.0 against 8.2 GB/s in copies of 256 KiB with their sums (EPYC of 2024, target 16 bytes behind).
// Arrays of NumPy and messages of gRPC lie like that.

#include "stream_copy.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ckpt {
namespace {

#if defined(__x86_64__)

constexpr std::size_t kVector = 32;
constexpr std::size_t kPage = 4096;
constexpr std::size_t kPages = 4;
constexpr std::size_t kVectorBytesMin = 2 * 1024;
constexpr std::size_t kVectorBytesMax = 1024 * 1024;  // beyond, memcpy has loops of its own

__attribute__((target("avx2"))) void stream_vectors(std::byte* target, const std::byte* source) {
  const auto* from = reinterpret_cast<const __m256i*>(source);
  auto* to = reinterpret_cast<__m256i*>(target);
  const __m256i a = _mm256_loadu_si256(from);
  const __m256i b = _mm256_loadu_si256(from + 1);
  const __m256i c = _mm256_loadu_si256(from + 2);
  const __m256i d = _mm256_loadu_si256(from + 3);
  _mm256_stream_si256(to, a);
  _mm256_stream_si256(to + 1, b);
  _mm256_stream_si256(to + 2, c);
  _mm256_stream_si256(to + 3, d);
}

__attribute__((target("avx2"))) void stream_avx2(std::byte* target, const std::byte* source, std::size_t nbytes) {
  const std::size_t head = -reinterpret_cast<std::uintptr_t>(target) % kVector;
  std::memcpy(target, source, head);
  std::size_t at = head;
  for (; at + kPages * kPage <= nbytes; at += kPages * kPage)
    for (std::size_t line = 0; line < kPage; line += 4 * kVector)
      for (std::size_t page = 0; page < kPages; ++page)
        stream_vectors(target + at + page * kPage + line, source + at + page * kPage + line);
  _mm_sfence();  // before anybody is told that the bytes are there
  std::memcpy(target + at, source + at, nbytes - at);
}

__attribute__((target("avx2"))) void vector_copy_avx2(std::byte* target, const std::byte* source, std::size_t nbytes) {
  const std::size_t head = -reinterpret_cast<std::uintptr_t>(target) % kVector;
  std::memcpy(target, source, head);
  std::size_t at = head;
  for (; at + 4 * kVector <= nbytes; at += 4 * kVector) {
    const auto* from = reinterpret_cast<const __m256i*>(source + at);
    auto* to = reinterpret_cast<__m256i*>(target + at);
    const __m256i a = _mm256_loadu_si256(from);
    const __m256i b = _mm256_loadu_si256(from + 1);
    const __m256i c = _mm256_loadu_si256(from + 2);
    const __m256i d = _mm256_loadu_si256(from + 3);
    _mm256_store_si256(to, a);
    _mm256_store_si256(to + 1, b);
    _mm256_store_si256(to + 2, c);
    _mm256_store_si256(to + 3, d);
  }
  std::memcpy(target + at, source + at, nbytes - at);
}

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") != 0;
  return has;
}

#endif

}  // namespace

void stream_copy(std::byte* target, const std::byte* source, std::size_t nbytes) {
#if defined(__x86_64__)
  if (nbytes >= kStreamBytesMin && has_avx2()) return stream_avx2(target, source, nbytes);
#endif
  std::memcpy(target, source, nbytes);
}

void vector_copy(std::byte* target, const std::byte* source, std::size_t nbytes) {
#if defined(__x86_64__)
  if (nbytes >= kVectorBytesMin && nbytes < kVectorBytesMax && has_avx2()) return vector_copy_avx2(target, source, nbytes);
#endif
  std::memcpy(target, source, nbytes);
}

}  // namespace ckpt
