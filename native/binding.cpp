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

bool kernel_available(int kernel) { return ckpt_kernel_available(static_cast<ckpt_kernel>(kernel)) != 0; }

int kernel_auto() { return ckpt_kernel_auto(); }

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "The native core of ckpt. Use ckpt.kernels, which checks arguments and raises ckpt's errors.";
  module.attr("CORE_VERSION") = CKPT_CORE_VERSION;
  module.attr("DIMS_MAX") = CKPT_DIMS_MAX;
  module.attr("THREADS_MAX") = CKPT_THREADS_MAX;
  module.def("copy_boxes", &copy_boxes, "source"_a.noconvert(), "source_limit"_a.noconvert(), "target"_a.noconvert(),
             "target_limit"_a.noconvert(), "lengths"_a.noconvert(), "source_strides"_a.noconvert(),
             "target_strides"_a.noconvert(), "itemsize"_a.noconvert(), "threads"_a);
  module.def("crc32c", &crc32c, "kernel"_a, "data"_a.noconvert(), "value"_a);
  module.def("crc32c_ranges", &crc32c_ranges, "kernel"_a, "data"_a.noconvert(), "starts"_a.noconvert(),
             "stops"_a.noconvert(), "out"_a.noconvert(), "threads"_a);
  module.def("crc32c_combine", &ckpt_crc32c_combine, "crc_a"_a, "crc_b"_a, "nbytes_b"_a);
  module.def("pack", &pack, "kernel"_a, "target"_a.noconvert(), "start"_a, "source"_a.noconvert(),
             "source_limit"_a.noconvert(), "position"_a.noconvert(), "lengths"_a.noconvert(), "source_strides"_a.noconvert(),
             "itemsize"_a.noconvert(), "segment_starts"_a.noconvert(), "segment_stops"_a.noconvert(), "out"_a.noconvert(),
             "threads"_a);
  module.def("write_at", &write_at, "fd"_a, "data"_a.noconvert(), "offset"_a, "slice_bytes"_a, "in_flight"_a);
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
