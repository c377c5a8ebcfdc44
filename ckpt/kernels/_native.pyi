"""The compiled module (native/binding.cpp). Statuses and kernels are the numbers of native/include/ckpt_core.h."""

import numpy as np
from numpy.typing import NDArray

CORE_VERSION: int
DIMS_MAX: int
THREADS_MAX: int
READ_ALIGN: int
MERGE_SOURCES_MAX: int
SUM_BLOCK: int
CODE_SOURCES_MAX: int
CODE_TARGETS_MAX: int

def copy_boxes(
    source: NDArray[np.uint64],
    source_limit: NDArray[np.uint64],
    target: NDArray[np.uint64],
    target_limit: NDArray[np.uint64],
    lengths: NDArray[np.int64],
    source_strides: NDArray[np.int64],
    target_strides: NDArray[np.int64],
    itemsize: NDArray[np.int64],
    threads: int,
) -> tuple[int, int]: ...
def crc32c(kernel: int, data: NDArray[np.uint8], value: int) -> tuple[int, int]: ...
def crc32c_ranges(
    kernel: int,
    data: NDArray[np.uint8],
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    out: NDArray[np.uint32],
    threads: int,
) -> tuple[int, int]: ...
def crc32c_combine(crc_a: int, crc_b: int, nbytes_b: int) -> int: ...
def crc32c_join(
    crcs: NDArray[np.uint32], nbytes: NDArray[np.int64], firsts: NDArray[np.int64], out: NDArray[np.uint32]
) -> int: ...
def pack(
    kernel: int,
    target: NDArray[np.uint8],
    start: int,
    source: NDArray[np.uint64],
    source_limit: NDArray[np.uint64],
    position: NDArray[np.int64],
    lengths: NDArray[np.int64],
    source_strides: NDArray[np.int64],
    itemsize: NDArray[np.int64],
    segment_starts: NDArray[np.int64],
    segment_stops: NDArray[np.int64],
    out: NDArray[np.uint32],
    threads: int,
) -> tuple[int, int, int]: ...
def write_at(
    fd: int, data: NDArray[np.uint8], offset: int, slice_bytes: int, in_flight: int
) -> tuple[int, bool, int]: ...
def read_chunks(
    fd: NDArray[np.int32],
    direct_fd: NDArray[np.int32],
    memory: NDArray[np.uint64],
    memory_bytes: NDArray[np.int64],
    file: NDArray[np.int32],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    block_starts: NDArray[np.int64],
    block_start: NDArray[np.int64],
    block_stop: NDArray[np.int64],
    block_crc: NDArray[np.uint32],
    copy_starts: NDArray[np.int64],
    source: NDArray[np.uint64],
    target: NDArray[np.uint64],
    target_limit: NDArray[np.uint64],
    lengths: NDArray[np.int64],
    source_strides: NDArray[np.int64],
    target_strides: NDArray[np.int64],
    itemsize: NDArray[np.int64],
    buffer: int,
    buffer_bytes: int,
    kernel: int,
    mode: int,
    threads: int,
    stop_at_first: bool,
    outcome: NDArray[np.int32],
    found_crc: NDArray[np.uint32],
) -> tuple[int, int, int, int, bool]: ...
def code_matrix(code: int, k: int, m: int, out: NDArray[np.uint8]) -> int: ...
def code_rows(
    matrix: NDArray[np.uint8],
    k: int,
    m: int,
    have: NDArray[np.int32],
    wanted: NDArray[np.int32],
    out: NDArray[np.uint8],
) -> int: ...
def code_count_singular(matrix: NDArray[np.uint8], k: int, m: int) -> tuple[int, int]: ...
def code_blocks(
    coder: int,
    kernel: int,
    source: NDArray[np.uint64],
    source_bytes: NDArray[np.int64],
    target: NDArray[np.uint64],
    coefficients: NDArray[np.uint8],
    block_bytes: int,
    tile_bytes: int,
    add: bool,
    source_crcs: NDArray[np.uint32],
    target_crcs: NDArray[np.uint32],
) -> tuple[int, int, int]: ...
def code_isal_raw(
    source: NDArray[np.uint64],
    source_bytes: NDArray[np.int64],
    target: NDArray[np.uint64],
    coefficients: NDArray[np.uint8],
    block_bytes: int,
    tile_bytes: int,
) -> int: ...
def mix(
    loops: int,
    source: NDArray[np.uint64],
    dtype: NDArray[np.int32],
    weight: NDArray[np.float64],
    length: NDArray[np.int64],
    divisor: NDArray[np.float64],
    sum: NDArray[np.uint64],
    target: NDArray[np.uint64],
    target_dtype: NDArray[np.int32],
    exact: NDArray[np.uint8],
    num_sources: int,
    go_on: bool,
    threads: int,
    bad: NDArray[np.uint8],
) -> tuple[int, int]: ...
def all_finite(loops: int, source: int, dtype: int, length: int) -> tuple[int, bool]: ...
def histogram(
    loops: int,
    source: NDArray[np.uint64],
    dtype: NDArray[np.int32],
    base: int,
    base_dtype: int,
    length: int,
    threads: int,
    shift: int,
    bits: int,
    prefix: NDArray[np.int64],
    bins: NDArray[np.uint64],
) -> int: ...
def tile_sums(
    loops: int,
    moments: bool,
    source: NDArray[np.uint64],
    dtype: NDArray[np.int32],
    base: int,
    base_dtype: int,
    length: int,
    threads: int,
    scratch: NDArray[np.float64],
    out: NDArray[np.float64],
) -> int: ...
def ties(
    loops: int,
    source: NDArray[np.uint64],
    dtype: NDArray[np.int32],
    base: int,
    base_dtype: int,
    length: int,
    threads: int,
    threshold: NDArray[np.uint32],
    weight: NDArray[np.float64],
    scale: float,
    mode: int,
    zero_sign: int,
    target: int,
    target_dtype: int,
) -> tuple[int, int, bool]: ...
def uniform(loops: int, key: int, first: int, out: NDArray[np.float64]) -> int: ...
def loops_available(loops: int) -> bool: ...
def loops_auto() -> int: ...
def coder_available(coder: int) -> bool: ...
def coder_auto() -> int: ...
def coder_isal_library() -> str: ...
def kernel_available(kernel: int) -> bool: ...
def kernel_auto() -> int: ...
def build_info() -> dict[str, str]: ...
