"""The face of the native core: n-d box copy, CRC-32C, and verified reads of files.

In: NumPy columns, addresses, buffers and descriptors. Out: copied bytes and checksums. The environment variable `CKPT_KERNEL`
demands one kernel by name (`reference`, `table`, `sse42`, `arm`) and fails loudly where it is not there; see
ckpt.kernels.choice. Never falls back silently, never imports torch.
"""

from ckpt.kernels.checksum import crc32c, crc32c_combine, crc32c_ranges
from ckpt.kernels.choice import kernel_info
from ckpt.kernels.copy import copy_boxes
from ckpt.kernels.read import Chunks, Outcome, ReadBuffer, ReadMode, ReadOutcome, buffer_nbytes, read_chunks

__all__ = [
    "Chunks",
    "Outcome",
    "ReadBuffer",
    "ReadMode",
    "ReadOutcome",
    "buffer_nbytes",
    "copy_boxes",
    "crc32c",
    "crc32c_combine",
    "crc32c_ranges",
    "kernel_info",
    "read_chunks",
]
