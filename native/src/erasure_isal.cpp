// Erasure coding by Intel ISA-L: linked when the build names a library (CKPT_ISAL_LINKED), else looked for once at run time. Its
// tables belong to the version and the processor, so they never leave the call that made them. In: sources of one tile. Out: its
// targets, the same bytes as the portable coder's.

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "erasure_kernels.h"

#ifdef CKPT_ISAL_LINKED
extern "C" {
void ec_init_tables(int k, int rows, unsigned char* a, unsigned char* gftbls);
void ec_encode_data(int len, int k, int rows, unsigned char* gftbls, unsigned char** data, unsigned char** coding);
void ec_encode_data_update(int len, int k, int rows, int vec_i, unsigned char* g_tbls, unsigned char* data,
                           unsigned char** coding);
int xor_gen(int vects, int len, void** array);
unsigned int crc32_iscsi(unsigned char* buffer, int len, unsigned int init_crc);
}
#endif

namespace ckpt::erasure {
namespace {

constexpr uintptr_t kXorAlign = 32;  // of all of xor_gen's vectors

struct Isal {
  void (*init_tables)(int, int, unsigned char*, unsigned char*) = nullptr;
  void (*encode_data)(int, int, int, unsigned char*, unsigned char**, unsigned char**) = nullptr;
  void (*encode_data_update)(int, int, int, int, unsigned char*, unsigned char*, unsigned char**) = nullptr;
  int (*xor_gen)(int, int, void**) = nullptr;
  unsigned int (*crc32_iscsi)(unsigned char*, int, unsigned int) = nullptr;
  bool sums_right = false;
  char library[4096] = "";
};

template <class Function>
bool find(void* handle, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  return *function != nullptr;
}

#ifdef CKPT_ISAL_LINKED
void load(Isal* isal) {
  isal->init_tables = ::ec_init_tables;
  isal->encode_data = ::ec_encode_data;
  isal->encode_data_update = ::ec_encode_data_update;
  isal->xor_gen = ::xor_gen;
  isal->crc32_iscsi = ::crc32_iscsi;
  std::strcpy(isal->library, "linked");
}
#else
void load(Isal* isal) {
  void* handle = dlopen("libisal.so.2", RTLD_NOW | RTLD_LOCAL);
  if (!handle) return;
  Dl_info where;
  if (!find(handle, "ec_init_tables", &isal->init_tables) || !find(handle, "ec_encode_data", &isal->encode_data) ||
      !find(handle, "ec_encode_data_update", &isal->encode_data_update) || !find(handle, "xor_gen", &isal->xor_gen) ||
      !find(handle, "crc32_iscsi", &isal->crc32_iscsi) ||
      !dladdr(reinterpret_cast<void*>(isal->encode_data), &where)) {
    *isal = Isal{};
    dlclose(handle);
    return;
  }
  char* resolved = realpath(where.dli_fname, nullptr);  // its name ends in the version
  std::strncpy(isal->library, resolved ? resolved : where.dli_fname, sizeof isal->library - 1);
  std::free(resolved);
}
#endif

// Whether its CRC-32C is ours, at lengths on both sides of the steps that its kernels take: some versions chose a wrong one.
bool sums_are_right(const Isal& isal) {
  unsigned char data[4099];
  for (size_t i = 0; i < sizeof data; ++i) data[i] = static_cast<unsigned char>(i * i + i / 256);
  for (const int length : {1, 15, 16, 63, 255, 256, 511, 1024, 3072, 4096, 4099})
    if (isal.crc32_iscsi(data, length, 0x12345678) != crc32c::update_table(0x12345678, data, static_cast<size_t>(length)))
      return false;
  return true;
}

const Isal& isal() {
  static const Isal found = [] {
    Isal made;
    load(&made);
    made.sums_right = made.crc32_iscsi && sums_are_right(made);
    return made;
  }();
  return found;
}

uint32_t update_isal(uint32_t state, const unsigned char* data, size_t nbytes) {
  return isal().crc32_iscsi(const_cast<unsigned char*>(data), static_cast<int>(nbytes), state);
}

void prepare(Rows* rows) { isal().init_tables(rows->num_sources, rows->num_targets, rows->coefficients, rows->tables); }

bool aligned(const uint8_t* address) { return reinterpret_cast<uintptr_t>(address) % kXorAlign == 0; }

bool encode_xor(const Rows& rows, uint8_t* const* sources, uint8_t* target, int64_t nbytes) {
  if (rows.num_sources < 2 || !aligned(target) || !std::all_of(sources, sources + rows.num_sources, aligned)) return false;
  void* vectors[CKPT_CODE_SOURCES_MAX + 1];
  std::copy(sources, sources + rows.num_sources, vectors);
  vectors[rows.num_sources] = target;
  return isal().xor_gen(rows.num_sources + 1, static_cast<int>(nbytes), vectors) == 0;
}

void encode(const Rows& rows, uint8_t* const* sources, uint8_t* const* targets, int64_t nbytes) {
  if (rows.num_targets == 1 && rows.all_ones()) {
    if (!rows.add && encode_xor(rows, sources, targets[0], nbytes)) return;
    return portable_coder()->encode(rows, sources, targets, nbytes);
  }
  auto* tables = const_cast<uint8_t*>(rows.tables);
  auto** from = const_cast<uint8_t**>(sources);
  auto** to = const_cast<uint8_t**>(targets);
  const int len = static_cast<int>(nbytes);
  if (!rows.add) return isal().encode_data(len, rows.num_sources, rows.num_targets, tables, from, to);
  for (int s = 0; s < rows.num_sources; ++s)
    isal().encode_data_update(len, rows.num_sources, rows.num_targets, s, tables, sources[s], to);
}

}  // namespace

const Coder* isal_coder() {
  static const Coder coder{prepare, encode, isal().sums_right ? update_isal : nullptr};
  return isal().encode_data ? &coder : nullptr;
}

}  // namespace ckpt::erasure

const char* ckpt_coder_isal_library(void) { return ckpt::erasure::isal().library; }

ckpt_status ckpt_code_isal_raw(const ckpt_coding* coding) {
  using namespace ckpt::erasure;
  if (!isal_coder()) return CKPT_NO_KERNEL;
  uint8_t coefficients[CKPT_CODE_TARGETS_MAX * CKPT_CODE_SOURCES_MAX];
  alignas(64) uint8_t tables[sizeof coefficients * kTableBytes];
  const int k = coding->num_sources, rows = coding->num_targets;
  if (k < 1 || k > CKPT_CODE_SOURCES_MAX || rows < 1 || rows > CKPT_CODE_TARGETS_MAX || coding->tile_bytes < 1)
    return CKPT_BAD_ARGUMENT;
  std::copy_n(coding->coefficients, rows * k, coefficients);
  isal().init_tables(k, rows, coefficients, tables);
  for (int64_t at = 0; at < coding->block_bytes; at += coding->tile_bytes) {
    uint8_t *sources[CKPT_CODE_SOURCES_MAX], *targets[CKPT_CODE_TARGETS_MAX];
    for (int s = 0; s < k; ++s) sources[s] = reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(coding->source[s])) + at;
    for (int r = 0; r < rows; ++r) targets[r] = reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(coding->target[r])) + at;
    const int64_t len = std::min({coding->tile_bytes, coding->block_bytes - at, int64_t{CKPT_CODE_TILE_BYTES_MAX}});
    isal().encode_data(static_cast<int>(len), k, rows, tables, sources, targets);
  }
  return CKPT_OK;
}
