"""See that an installed wheel has a native core that works on this machine. Needs numpy, no torch and no network."""

from __future__ import annotations

import sys
import tempfile

import numpy as np

from ckpt import kernels


def main() -> int:
    """0 when copies, checksums and writes are right."""
    info = kernels.kernel_info()
    assert info["native"], info
    assert kernels.crc32c(b"123456789") == 0xE3069283, info
    source = np.arange(12_000_000, dtype=np.uint32).reshape(3000, 4000).T
    target = np.zeros(source.nbytes, np.uint8)
    sums = kernels.pack(
        target,
        source=np.array([source.ctypes.data], np.uint64),
        source_limit=np.array([source.ctypes.data + source.nbytes], np.uint64),
        position=np.array([0]),
        lengths=np.array([source.shape]),
        source_strides=np.array([source.strides]),
        itemsize=np.array([source.itemsize]),
        segment_starts=np.array([0]),
        segment_stops=np.array([target.size]),
        threads=2,
    )
    assert target.tobytes() == source.tobytes()
    assert sums.tolist() == [kernels.crc32c(target)]
    with tempfile.NamedTemporaryFile() as file:
        kernels.write_at(file.fileno(), target, 0, in_flight=2)
        assert file.read() == target.tobytes()
    parity = np.zeros(100_003, np.uint8)
    kernels.code_blocks([target[:100_003], target[100_003:200_000]], [parity], kernels.code_for(2, 1).parity_rows())
    assert (parity[:99_997] == target[:99_997] ^ target[100_003:200_000]).all(), info
    assert (parity[99_997:] == target[99_997:100_003]).all(), info
    print(f"native core works: {info}", file=sys.stderr)  # noqa: T201 - a script
    return 0


if __name__ == "__main__":
    sys.exit(main())
