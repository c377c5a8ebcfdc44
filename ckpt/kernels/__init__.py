"""The face of the native core: n-d box copy, CRC-32C, both fused, writes to files, and verified reads of them.

In: NumPy columns, addresses, buffers, descriptors. Out: copied, read or written bytes, checksums. The environment variable
`CKPT_KERNEL` demands one kernel by name (`reference`, `table`, `sse42`, `arm`) and fails loudly where it is not there;
see ckpt.kernels.choice. Never falls back silently, never imports torch.
"""

from ckpt.kernels.checksum import crc32c, crc32c_combine, crc32c_ranges
from ckpt.kernels.choice import kernel_info
from ckpt.kernels.copy import copy_boxes
from ckpt.kernels.pack import pack
from ckpt.kernels.priority import set_thread_nice
from ckpt.kernels.read import Chunks, Outcome, ReadBuffer, ReadMode, ReadOutcome, buffer_nbytes, read_chunks
from ckpt.kernels.write import write_at

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
    "pack",
    "read_chunks",
    "set_thread_nice",
    "write_at",
]
