// Python's way into the core. Checks shapes, drops the GIL, makes one call, returns (status, row): messages are made in Python.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include "ckpt_core.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Target = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Outcomes = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Outcome = std::pair<int, int64_t>;

void require(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}

Outcome copy_boxes(const Column<uint64_t>& source, const Column<uint64_t>& source_limit, const Column<uint64_t>& target,
                   const Column<uint64_t>& target_limit, const Table& lengths, const Table& source_strides,
                   const Table& target_strides, const Column<int64_t>& itemsize, int32_t threads) {
  const size_t rows = source.shape(0);
  const size_t dims = lengths.shape(1);
  require(source_limit.shape(0) == rows && target.shape(0) == rows && target_limit.shape(0) == rows &&
              itemsize.shape(0) == rows && lengths.shape(0) == rows && source_strides.shape(0) == rows &&
              target_strides.shape(0) == rows && source_strides.shape(1) == dims && target_strides.shape(1) == dims,
          "columns of boxes differ in length");
  const ckpt_boxes boxes{source.data(),         source_limit.data(),   target.data(),   target_limit.data(),
                         lengths.data(),        source_strides.data(), target_strides.data(), itemsize.data(),
                         static_cast<int64_t>(rows), static_cast<int64_t>(dims)};
  int64_t bad_row = -1;
  nb::gil_scoped_release released;
  const ckpt_status status = ckpt_copy_boxes(&boxes, threads, &bad_row);
  return {status, bad_row};
}

std::pair<int, uint32_t> crc32c(int kernel, const Bytes& data, uint32_t value) {
  uint32_t out = 0;
  nb::gil_scoped_release released;
  const ckpt_status status = ckpt_crc32c(static_cast<ckpt_kernel>(kernel), data.data(), data.shape(0), value, &out);
  return {status, out};
}

Outcome crc32c_ranges(int kernel, const Bytes& data, const Column<int64_t>& starts, const Column<int64_t>& stops,
                      const Sums& out, int32_t threads) {
  const size_t ranges = starts.shape(0);
  require(stops.shape(0) == ranges && out.shape(0) == ranges, "columns of ranges differ in length");
  int64_t bad_range = -1;
  nb::gil_scoped_release released;
  const ckpt_status status =
      ckpt_crc32c_ranges(static_cast<ckpt_kernel>(kernel), data.data(), data.shape(0), starts.data(), stops.data(),
                         static_cast<int64_t>(ranges), threads, out.data(), &bad_range);
  return {status, bad_range};
}

int crc32c_join(const Column<uint32_t>& crcs, const Column<int64_t>& nbytes, const Column<int64_t>& firsts, const Sums& out) {
  require(nbytes.shape(0) == crcs.shape(0), "columns of runs differ in length");
  require(firsts.shape(0) == out.shape(0) + 1, "there must be one more first than groups");
  nb::gil_scoped_release released;
  return ckpt_crc32c_join(crcs.data(), nbytes.data(), static_cast<int64_t>(crcs.shape(0)), firsts.data(),
                          static_cast<int64_t>(out.shape(0)), out.data());
}

std::tuple<int, int64_t, int64_t> pack(int kernel, const Target& target, int64_t start, const Column<uint64_t>& source,
                                       const Column<uint64_t>& source_limit, const Column<int64_t>& position,
                                       const Table& lengths, const Table& source_strides, const Column<int64_t>& itemsize,
                                       const Column<int64_t>& segment_starts, const Column<int64_t>& segment_stops,
                                       const Sums& out, int32_t threads) {
  const size_t rows = source.shape(0);
  const size_t dims = lengths.shape(1);
  const size_t segments = segment_starts.shape(0);
  require(source_limit.shape(0) == rows && position.shape(0) == rows && itemsize.shape(0) == rows && lengths.shape(0) == rows &&
              source_strides.shape(0) == rows && source_strides.shape(1) == dims,
          "columns of parts differ in length");
  require(segment_stops.shape(0) == segments && out.shape(0) == segments, "columns of segments differ in length");
  const ckpt_parts parts{source.data(),         source_limit.data(), position.data(),           lengths.data(),
                         source_strides.data(), itemsize.data(),     static_cast<int64_t>(rows), static_cast<int64_t>(dims)};
  int64_t bad_row = -1;
  int64_t bad_segment = -1;
  nb::gil_scoped_release released;
  const ckpt_status status = ckpt_pack(static_cast<ckpt_kernel>(kernel), &parts, target.data(), start,
                                       start + static_cast<int64_t>(target.shape(0)), segment_starts.data(),
                                       segment_stops.data(), static_cast<int64_t>(segments), threads, out.data(), &bad_row,
                                       &bad_segment);
  return {status, bad_row, bad_segment};
}

std::tuple<int, bool, int> write_at(int fd, const Bytes& data, int64_t offset, int64_t slice_bytes, int32_t in_flight) {
  int32_t direct = 0;
  int32_t error = 0;
  nb::gil_scoped_release released;
  const ckpt_status status = ckpt_write_at(fd, data.data(), static_cast<int64_t>(data.shape(0)), offset, slice_bytes,
                                           in_flight, &direct, &error);
  return {status, direct != 0, error};
}

// (status, box at fault, bytes read around the page cache, bytes read through it, whether direct reads were refused)
std::tuple<int, int64_t, int64_t, int64_t, bool> read_chunks(
    const Column<int32_t>& fd, const Column<int32_t>& direct_fd, const Column<uint64_t>& memory,
    const Column<int64_t>& memory_bytes, const Column<int32_t>& file, const Column<int64_t>& start,
    const Column<int64_t>& stop, const Column<int64_t>& block_starts, const Column<int64_t>& block_start,
    const Column<int64_t>& block_stop, const Column<uint32_t>& block_crc, const Column<int64_t>& copy_starts,
    const Column<uint64_t>& source, const Column<uint64_t>& target, const Column<uint64_t>& target_limit,
    const Table& lengths, const Table& source_strides, const Table& target_strides, const Column<int64_t>& itemsize,
    uint64_t buffer, int64_t buffer_bytes, int kernel, int mode, int32_t threads, bool stop_at_first,
    const Outcomes& outcome, const Sums& found_crc) {
  const size_t chunks = file.shape(0), blocks = block_start.shape(0), rows = source.shape(0), dims = lengths.shape(1);
  require(direct_fd.shape(0) == fd.shape(0) && memory.shape(0) == fd.shape(0) && memory_bytes.shape(0) == fd.shape(0),
          "columns of files differ in length");
  require(start.shape(0) == chunks && stop.shape(0) == chunks && outcome.shape(0) == chunks &&
              block_starts.shape(0) == chunks + 1 && copy_starts.shape(0) == chunks + 1,
          "columns of chunks differ in length");
  require(block_stop.shape(0) == blocks && block_crc.shape(0) == blocks && found_crc.shape(0) == blocks &&
              block_starts(chunks) == static_cast<int64_t>(blocks),
          "columns of blocks differ in length");
  require(target.shape(0) == rows && target_limit.shape(0) == rows && itemsize.shape(0) == rows &&
              lengths.shape(0) == rows && source_strides.shape(0) == rows && target_strides.shape(0) == rows &&
              source_strides.shape(1) == dims && target_strides.shape(1) == dims &&
              copy_starts(chunks) == static_cast<int64_t>(rows),
          "columns of boxes differ in length");
  const ckpt_boxes copies{source.data(),         nullptr,               target.data(),   target_limit.data(),
                          lengths.data(),        source_strides.data(), target_strides.data(), itemsize.data(),
                          static_cast<int64_t>(rows), static_cast<int64_t>(dims)};
  const ckpt_reads reads{fd.data(),
                         direct_fd.data(),
                         memory.data(),
                         memory_bytes.data(),
                         static_cast<int64_t>(fd.shape(0)),
                         file.data(),
                         start.data(),
                         stop.data(),
                         static_cast<int64_t>(chunks),
                         block_starts.data(),
                         block_start.data(),
                         block_stop.data(),
                         block_crc.data(),
                         copy_starts.data(),
                         copies,
                         reinterpret_cast<void*>(static_cast<uintptr_t>(buffer)),
                         buffer_bytes,
                         static_cast<ckpt_kernel>(kernel),
                         static_cast<ckpt_read_mode>(mode),
                         threads,
                         stop_at_first ? 1 : 0};
  ckpt_read_results results{outcome.data(), found_crc.data(), 0, 0, 0};
  int64_t bad_row = -1;
  nb::gil_scoped_release released;
  const ckpt_status status = ckpt_read_chunks(&reads, &results, &bad_row);
  return {status, bad_row, results.direct_bytes, results.cached_bytes, results.direct_refused != 0};
}

// (status, matrix of the code in `out`)
int code_matrix(int code, int32_t k, int32_t m, const Target& out) {
  require(k > 0 && m > 0 && out.shape(0) == (static_cast<size_t>(k) + static_cast<size_t>(m)) * static_cast<size_t>(k),
          "a matrix has (k + m) x k coefficients");
  return ckpt_code_matrix(static_cast<ckpt_code>(code), k, m, out.data());
}

int code_rows(const Bytes& matrix, int32_t k, int32_t m, const Column<int32_t>& have, const Column<int32_t>& wanted,
              const Target& out) {
  require(k > 0 && m > 0 && matrix.shape(0) == (static_cast<size_t>(k) + static_cast<size_t>(m)) * static_cast<size_t>(k),
          "a matrix has (k + m) x k coefficients");
  require(have.shape(0) == static_cast<size_t>(k) && out.shape(0) == wanted.shape(0) * static_cast<size_t>(k),
          "columns of pieces differ in length");
  return ckpt_code_rows(matrix.data(), k, m, have.data(), wanted.data(), static_cast<int32_t>(wanted.shape(0)), out.data());
}

Outcome code_count_singular(const Bytes& matrix, int32_t k, int32_t m) {
  require(k > 0 && m > 0 && matrix.shape(0) == (static_cast<size_t>(k) + static_cast<size_t>(m)) * static_cast<size_t>(k),
          "a matrix has (k + m) x k coefficients");
  int64_t count = -1;
  nb::gil_scoped_release released;
  const ckpt_status status = ckpt_code_count_singular(matrix.data(), k, m, &count);
  return {status, count};
}

ckpt_coding coding_of(const Column<uint64_t>& source, const Column<int64_t>& source_bytes, const Column<uint64_t>& target,
                      const Bytes& coefficients, int64_t block_bytes, int64_t tile_bytes, bool add) {
  const size_t sources = source.shape(0), targets = target.shape(0);
  require(sources <= CKPT_CODE_SOURCES_MAX && targets <= CKPT_CODE_TARGETS_MAX, "too many blocks");
  require(source_bytes.shape(0) == sources && coefficients.shape(0) == sources * targets, "columns of blocks differ in length");
  return {source.data(), source_bytes.data(), target.data(), coefficients.data(), static_cast<int32_t>(sources),
          static_cast<int32_t>(targets), block_bytes, tile_bytes, add ? 1 : 0};
}

// (status, source at fault, target at fault); no sums where a column of sums is empty
std::tuple<int, int, int> code_blocks(int coder, int kernel, const Column<uint64_t>& source,
                                      const Column<int64_t>& source_bytes, const Column<uint64_t>& target,
                                      const Bytes& coefficients, int64_t block_bytes, int64_t tile_bytes, bool add,
                                      const Sums& source_crcs, const Sums& target_crcs) {
  const ckpt_coding coding = coding_of(source, source_bytes, target, coefficients, block_bytes, tile_bytes, add);
  const size_t source_sums = source_crcs.shape(0), target_sums = target_crcs.shape(0);
  require((source_sums == 0 || source_sums == source.shape(0)) && (target_sums == 0 || target_sums == target.shape(0)),
          "columns of sums differ in length");
  int32_t bad_source = -1, bad_target = -1;
  nb::gil_scoped_release released;
  const ckpt_status status =
      ckpt_code_blocks(static_cast<ckpt_coder>(coder), static_cast<ckpt_kernel>(kernel), &coding,
                       source_sums ? source_crcs.data() : nullptr, target_sums ? target_crcs.data() : nullptr, &bad_source,
                       &bad_target);
  return {status, bad_source, bad_target};
}

int code_isal_raw(const Column<uint64_t>& source, const Column<int64_t>& source_bytes, const Column<uint64_t>& target,
                  const Bytes& coefficients, int64_t block_bytes, int64_t tile_bytes) {
  const ckpt_coding coding = coding_of(source, source_bytes, target, coefficients, block_bytes, tile_bytes, false);
  nb::gil_scoped_release released;
  return ckpt_code_isal_raw(&coding);
}

using Doubles = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bins = nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// K parts of S sources: tables [K, S] come flat
Outcome mix(int loops, const Column<uint64_t>& source, const Column<int32_t>& dtype, const Column<double>& weight,
            const Column<int64_t>& length, const Column<double>& divisor, const Column<uint64_t>& sum,
            const Column<uint64_t>& target, const Column<int32_t>& target_dtype, const Column<uint8_t>& exact,
            int32_t num_sources, bool go_on, int32_t threads, const Target& bad) {
  const size_t parts = length.shape(0);
  require(num_sources > 0 && num_sources <= CKPT_MERGE_SOURCES_MAX, "too many sources");
  const size_t cells = parts * static_cast<size_t>(num_sources);
  require(source.shape(0) == cells && dtype.shape(0) == cells && weight.shape(0) == cells && divisor.shape(0) == 2 * parts &&
              sum.shape(0) == parts && target.shape(0) == parts && target_dtype.shape(0) == parts && exact.shape(0) == parts &&
              bad.shape(0) == parts,
          "columns of parts differ in length");
  const ckpt_mix_parts columns{source.data(), dtype.data(),        weight.data(), length.data(),
                               divisor.data(), sum.data(),         target.data(), target_dtype.data(),
                               exact.data(),  static_cast<int64_t>(parts), num_sources, go_on ? 1 : 0, threads};
  int64_t bad_part = -1;
  nb::gil_scoped_release released;
  const ckpt_status status = ckpt_mix(static_cast<ckpt_loops>(loops), &columns, bad.data(), &bad_part);
  return {status, bad_part};
}

std::pair<int, bool> all_finite(int loops, uint64_t source, int dtype, int64_t length) {
  int32_t out = 0;
  nb::gil_scoped_release released;
  const ckpt_status status = ckpt_all_finite(static_cast<ckpt_loops>(loops), source, static_cast<ckpt_float>(dtype), length, &out);
  return {status, out != 0};
}

ckpt_tile tile_of(const Column<uint64_t>& source, const Column<int32_t>& dtype, uint64_t base, int base_dtype, int64_t length,
                  int32_t threads) {
  require(source.shape(0) == dtype.shape(0) && source.shape(0) <= CKPT_MERGE_SOURCES_MAX, "columns of sources differ in length");
  return {source.data(), dtype.data(), static_cast<int32_t>(source.shape(0)), base, static_cast<ckpt_float>(base_dtype), length,
          threads};
}

int histogram(int loops, const Column<uint64_t>& source, const Column<int32_t>& dtype, uint64_t base, int base_dtype,
              int64_t length, int32_t threads, int32_t shift, int32_t bits, const Column<int64_t>& prefix, const Bins& bins) {
  const ckpt_tile tile = tile_of(source, dtype, base, base_dtype, length, threads);
  require(bits > 0 && bits <= 24 && prefix.shape(0) == source.shape(0) && bins.shape(0) == source.shape(0) << bits,
          "columns of bins differ in length");
  nb::gil_scoped_release released;
  return ckpt_histogram(static_cast<ckpt_loops>(loops), &tile, shift, bits, prefix.data(), bins.data());
}

int tile_sums(int loops, bool moments, const Column<uint64_t>& source, const Column<int32_t>& dtype, uint64_t base,
              int base_dtype, int64_t length, int32_t threads, const Doubles& scratch, const Doubles& out) {
  const ckpt_tile tile = tile_of(source, dtype, base, base_dtype, length, threads);
  const size_t count = source.shape(0) * (moments ? 4 : source.shape(0));
  const size_t blocks = (static_cast<size_t>(length) + CKPT_SUM_BLOCK - 1) / CKPT_SUM_BLOCK;
  require(length >= 0 && out.shape(0) == count && scratch.shape(0) == blocks * count, "columns of sums differ in length");
  nb::gil_scoped_release released;
  const auto run = moments ? ckpt_moments : ckpt_gram;
  return run(static_cast<ckpt_loops>(loops), &tile, scratch.data(), out.data());
}

// (status, sum of signs, whether some of the target is not finite)
std::tuple<int, int64_t, bool> ties(int loops, const Column<uint64_t>& source, const Column<int32_t>& dtype, uint64_t base,
                                    int base_dtype, int64_t length, int32_t threads, const Column<uint32_t>& threshold,
                                    const Column<double>& weight, double scale, int mode, int32_t zero_sign, uint64_t target,
                                    int target_dtype) {
  const ckpt_tile tile = tile_of(source, dtype, base, base_dtype, length, threads);
  require(threshold.shape(0) == source.shape(0) && weight.shape(0) == source.shape(0), "columns of sources differ in length");
  const ckpt_ties_rule rule{threshold.data(), weight.data(), scale, static_cast<ckpt_ties_mode>(mode), zero_sign};
  int64_t sign_sum = 0;
  uint8_t bad = 0;
  nb::gil_scoped_release released;
  const ckpt_status status = ckpt_ties(static_cast<ckpt_loops>(loops), &tile, &rule, target, static_cast<ckpt_float>(target_dtype),
                                       &sign_sum, &bad);
  return {status, sign_sum, bad != 0};
}

int uniform(int loops, uint64_t key, uint64_t first, const Doubles& out) {
  nb::gil_scoped_release released;
  return ckpt_uniform(static_cast<ckpt_loops>(loops), key, first, static_cast<int64_t>(out.shape(0)), out.data());
}

bool loops_available(int loops) { return ckpt_loops_available(static_cast<ckpt_loops>(loops)) != 0; }

int loops_auto() { return ckpt_loops_auto(); }

bool coder_available(int coder) { return ckpt_coder_available(static_cast<ckpt_coder>(coder)) != 0; }

int coder_auto() { return ckpt_coder_auto(); }

bool kernel_available(int kernel) { return ckpt_kernel_available(static_cast<ckpt_kernel>(kernel)) != 0; }

int kernel_auto() { return ckpt_kernel_auto(); }

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "The native core of ckpt. Use ckpt.kernels, which checks arguments and raises ckpt's errors.";
  module.attr("CORE_VERSION") = CKPT_CORE_VERSION;
  module.attr("DIMS_MAX") = CKPT_DIMS_MAX;
  module.attr("THREADS_MAX") = CKPT_THREADS_MAX;
  module.attr("READ_ALIGN") = CKPT_READ_ALIGN;
  module.attr("MERGE_SOURCES_MAX") = CKPT_MERGE_SOURCES_MAX;
  module.attr("SUM_BLOCK") = CKPT_SUM_BLOCK;
  module.attr("CODE_SOURCES_MAX") = CKPT_CODE_SOURCES_MAX;
  module.attr("CODE_TARGETS_MAX") = CKPT_CODE_TARGETS_MAX;
  module.def("copy_boxes", &copy_boxes, "source"_a.noconvert(), "source_limit"_a.noconvert(), "target"_a.noconvert(),
             "target_limit"_a.noconvert(), "lengths"_a.noconvert(), "source_strides"_a.noconvert(),
             "target_strides"_a.noconvert(), "itemsize"_a.noconvert(), "threads"_a);
  module.def("crc32c", &crc32c, "kernel"_a, "data"_a.noconvert(), "value"_a);
  module.def("crc32c_ranges", &crc32c_ranges, "kernel"_a, "data"_a.noconvert(), "starts"_a.noconvert(),
             "stops"_a.noconvert(), "out"_a.noconvert(), "threads"_a);
  module.def("crc32c_combine", &ckpt_crc32c_combine, "crc_a"_a, "crc_b"_a, "nbytes_b"_a);
  module.def("crc32c_join", &crc32c_join, "crcs"_a.noconvert(), "nbytes"_a.noconvert(), "firsts"_a.noconvert(),
             "out"_a.noconvert());
  module.def("pack", &pack, "kernel"_a, "target"_a.noconvert(), "start"_a, "source"_a.noconvert(),
             "source_limit"_a.noconvert(), "position"_a.noconvert(), "lengths"_a.noconvert(), "source_strides"_a.noconvert(),
             "itemsize"_a.noconvert(), "segment_starts"_a.noconvert(), "segment_stops"_a.noconvert(), "out"_a.noconvert(),
             "threads"_a);
  module.def("write_at", &write_at, "fd"_a, "data"_a.noconvert(), "offset"_a, "slice_bytes"_a, "in_flight"_a);
  module.def("read_chunks", &read_chunks, "fd"_a.noconvert(), "direct_fd"_a.noconvert(), "memory"_a.noconvert(),
             "memory_bytes"_a.noconvert(), "file"_a.noconvert(), "start"_a.noconvert(), "stop"_a.noconvert(), "block_starts"_a.noconvert(), "block_start"_a.noconvert(),
             "block_stop"_a.noconvert(), "block_crc"_a.noconvert(), "copy_starts"_a.noconvert(), "source"_a.noconvert(),
             "target"_a.noconvert(), "target_limit"_a.noconvert(), "lengths"_a.noconvert(),
             "source_strides"_a.noconvert(), "target_strides"_a.noconvert(), "itemsize"_a.noconvert(), "buffer"_a,
             "buffer_bytes"_a, "kernel"_a, "mode"_a, "threads"_a, "stop_at_first"_a, "outcome"_a.noconvert(),
             "found_crc"_a.noconvert());
  module.def("code_matrix", &code_matrix, "code"_a, "k"_a, "m"_a, "out"_a.noconvert());
  module.def("code_rows", &code_rows, "matrix"_a.noconvert(), "k"_a, "m"_a, "have"_a.noconvert(), "wanted"_a.noconvert(),
             "out"_a.noconvert());
  module.def("code_count_singular", &code_count_singular, "matrix"_a.noconvert(), "k"_a, "m"_a);
  module.def("code_blocks", &code_blocks, "coder"_a, "kernel"_a, "source"_a.noconvert(), "source_bytes"_a.noconvert(),
             "target"_a.noconvert(), "coefficients"_a.noconvert(), "block_bytes"_a, "tile_bytes"_a, "add"_a,
             "source_crcs"_a.noconvert(), "target_crcs"_a.noconvert());
  module.def("code_isal_raw", &code_isal_raw, "source"_a.noconvert(), "source_bytes"_a.noconvert(), "target"_a.noconvert(),
             "coefficients"_a.noconvert(), "block_bytes"_a, "tile_bytes"_a);
  module.def("mix", &mix, "loops"_a, "source"_a.noconvert(), "dtype"_a.noconvert(), "weight"_a.noconvert(), "length"_a.noconvert(),
             "divisor"_a.noconvert(), "sum"_a.noconvert(), "target"_a.noconvert(), "target_dtype"_a.noconvert(),
             "exact"_a.noconvert(), "num_sources"_a, "go_on"_a, "threads"_a, "bad"_a.noconvert());
  module.def("all_finite", &all_finite, "loops"_a, "source"_a, "dtype"_a, "length"_a);
  module.def("histogram", &histogram, "loops"_a, "source"_a.noconvert(), "dtype"_a.noconvert(), "base"_a, "base_dtype"_a,
             "length"_a, "threads"_a, "shift"_a, "bits"_a, "prefix"_a.noconvert(), "bins"_a.noconvert());
  module.def("tile_sums", &tile_sums, "loops"_a, "moments"_a, "source"_a.noconvert(), "dtype"_a.noconvert(), "base"_a,
             "base_dtype"_a, "length"_a, "threads"_a, "scratch"_a.noconvert(), "out"_a.noconvert());
  module.def("ties", &ties, "loops"_a, "source"_a.noconvert(), "dtype"_a.noconvert(), "base"_a, "base_dtype"_a, "length"_a,
             "threads"_a, "threshold"_a.noconvert(), "weight"_a.noconvert(), "scale"_a, "mode"_a, "zero_sign"_a, "target"_a,
             "target_dtype"_a);
  module.def("uniform", &uniform, "loops"_a, "key"_a, "first"_a, "out"_a.noconvert());
  module.def("loops_available", &loops_available, "loops"_a);
  module.def("loops_auto", &loops_auto);
  module.def("coder_available", &coder_available, "coder"_a);
  module.def("coder_auto", &coder_auto);
  module.def("coder_isal_library", [] { return std::string(ckpt_coder_isal_library()); });
  module.def("kernel_available", &kernel_available, "kernel"_a);
  module.def("kernel_auto", &kernel_auto);
  module.def("build_info", [] {
    nb::dict info;
    info["compiler"] = ckpt_build_compiler();
    info["build_type"] = ckpt_build_type();
    info["sanitizer"] = ckpt_build_sanitizer();
    return info;
  });
}
