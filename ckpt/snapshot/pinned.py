"""Host memory that is registered with CUDA, so that copies from a device need no hidden buffer of the driver's.

In: memory, and who owns it. Out: nothing; what is registered is let go of with its owner, before its pages are. Where CUDA
refuses, copies go on, slower, and the log says so. Imports torch only when there is something to register. Any thread.
"""

from __future__ import annotations

import logging
import weakref

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger("ckpt")
_registered: dict[int, int] = {}  # address -> bytes


def register(memory: NDArray[np.uint8], *, owner: object) -> bool:
    """Register with CUDA (`cudaHostRegister`), if it is not yet. Whether it is now.

    Args:
        owner: what keeps the mapping: it must not end while it is registered.
    """
    import torch

    address = memory.ctypes.data
    if is_registered(memory):
        return True
    error = torch.cuda.cudart().cudaHostRegister(address, len(memory), 0)  # type: ignore[no-untyped-call]
    if int(error):
        _log.warning(
            "CUDA refused to register %d bytes of host memory (error %d): copies are slower", len(memory), error
        )
        return False
    _registered[address] = len(memory)
    weakref.finalize(owner, _unregister, address)
    return True


def is_registered(memory: NDArray[np.uint8]) -> bool:
    """Whether all of it is."""
    return _registered.get(memory.ctypes.data, -1) >= len(memory)


def unregister(memory: NDArray[np.uint8]) -> None:
    """Let go of it; nothing when it is not registered."""
    _unregister(memory.ctypes.data)


def _unregister(address: int) -> None:
    if _registered.pop(address, None) is not None:
        import torch

        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
