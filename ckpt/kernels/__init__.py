"""The face of the native core: n-d box copy, CRC-32C, both fused, writes to files, verified reads of them, and erasure coding.

In: NumPy columns, addresses, buffers, descriptors. Out: copied, read or written bytes, checksums. The environment variable
`CKPT_KERNEL` demands one kernel by name (`reference`, `table`, `sse42`, `arm`) and `CKPT_CODER` one coder (`reference`,
`portable`, `isal`); both fail loudly where it is not there; see ckpt.kernels.choice. Never falls back
silently, never imports torch.
"""

from ckpt.kernels.checksum import crc32c, crc32c_combine, crc32c_join, crc32c_ranges
from ckpt.kernels.choice import kernel_info
from ckpt.kernels.copy import copy_boxes
from ckpt.kernels.erasure import BlockSums, Code, CodeId, code_blocks, code_for, code_from_record
from ckpt.kernels.pack import pack
from ckpt.kernels.priority import set_thread_nice
from ckpt.kernels.read import Chunks, Outcome, ReadBuffer, ReadMode, ReadOutcome, buffer_nbytes, read_chunks
from ckpt.kernels.write import write_at

__all__ = [
    "BlockSums",
    "Chunks",
    "Code",
    "CodeId",
    "Outcome",
    "ReadBuffer",
    "ReadMode",
    "ReadOutcome",
    "buffer_nbytes",
    "code_blocks",
    "code_for",
    "code_from_record",
    "copy_boxes",
    "crc32c",
    "crc32c_combine",
    "crc32c_join",
    "crc32c_ranges",
    "kernel_info",
    "pack",
    "read_chunks",
    "set_thread_nice",
    "write_at",
]
