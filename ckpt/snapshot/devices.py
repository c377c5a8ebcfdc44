"""Copies from CUDA devices straight into the image, on a side stream, while the training's own streams go on.

In: the tensors that the pieces of a rank lie in, and a pinned image. Out: chunks filled, an event after each. The host enqueues
and returns. A fence makes the training's stream wait for an event; the thread that writes waits for one on the host. Small
tensors are gathered on the device first, so that there is one copy for many of them. Never touches memory of the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ckpt.format.spec import LocalState
from ckpt.snapshot.pack import Packer

GATHER_BYTES_MAX = 256 << 10  # a smaller part is gathered with its neighbours before it is copied


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """One copy from a device: `sources` lie end to end in the image from `start` on."""

    start: int  # bytes
    stop: int
    sources: list[torch.Tensor]


class DeviceCopies:
    """The device part of one staging. `start` and `hold` on the training thread; `wait_for` on any.

    Args:
        local: the state, its tensors on CUDA devices left where they are.
    """

    def __init__(self, local: LocalState) -> None:
        self._owner_of_piece, self._owners = local.pieces.boxes.tensor, local.keep_alive
        none = np.zeros(len(local.pieces.boxes), bool)
        self._on_device: NDArray[np.bool_] = none if local.on_device is None else local.on_device
        self._piece = np.empty(0, np.int64)  # of each part of the program
        self._events: dict[int, list[torch.cuda.Event]] = {}  # of the last copy into each chunk, per device
        self._last: dict[torch.device, torch.cuda.Event] = {}

    @property
    def any(self) -> bool:
        return bool(self._on_device.any())

    @property
    def finished(self) -> bool:
        """True when every copy is over."""
        return all(event.query() for event in self._last.values())  # type: ignore[no-untyped-call]

    def start(self, packer: Packer, image: NDArray[np.uint8], late: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Enqueue all copies behind what the current streams hold. Returns [K] which parts of the program they are.

        Args:
            late: [K] parts that a fence guards. What the current streams do next waits for the copies of the others.
        """
        program = packer.sources.program
        rows = self._on_device[program.piece] if self.any else np.zeros(len(program.piece), bool)
        if not rows.any():
            return rows
        self._piece = program.piece
        target = torch.from_numpy(image)
        for device in sorted({self._tensor(int(row)).device for row in np.flatnonzero(rows)}, key=str):
            ready = torch.cuda.current_stream(device)
            stream = _side_stream(device)
            stream.wait_stream(ready)
            with torch.cuda.stream(stream):
                self._enqueue(packer, rows & ~late, target, device, stream)
                ready.wait_stream(stream)
                self._enqueue(packer, rows & late, target, device, stream)
        return rows

    def _enqueue(
        self,
        packer: Packer,
        rows: NDArray[np.bool_],
        target: torch.Tensor,
        device: torch.device,
        stream: torch.cuda.Stream,
    ) -> None:
        program = packer.sources.program
        for chunk in range(program.num_chunks):
            within = packer.rows_of(chunk)
            mine = [row for row in range(within.start, within.stop) if rows[row] and self._tensor(row).device == device]
            if not mine:
                continue
            for copy in self._copies(packer, mine):
                for source in copy.sources:
                    source.record_stream(stream)
                one = copy.sources[0] if len(copy.sources) == 1 else torch.cat(copy.sources)
                target[copy.start : copy.stop].copy_(one, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            self._events.setdefault(chunk, []).append(event)
            self._last[device] = event

    def _copies(self, packer: Packer, rows: Sequence[int]) -> Iterator[_Copy]:
        """Parts as byte vectors; small neighbours together."""
        start = stop = -1
        sources: list[torch.Tensor] = []
        for row in rows:
            source = self._bytes_of(packer, row)
            at = int(packer.sources.program.position[row])
            if at != stop or max(stop - start, source.numel()) > GATHER_BYTES_MAX:
                if sources:
                    yield _Copy(start=start, stop=stop, sources=sources)
                start, sources = at, []
            sources.append(source)
            stop = at + source.numel()
        if sources:
            yield _Copy(start=start, stop=stop, sources=sources)

    def _bytes_of(self, packer: Packer, row: int) -> torch.Tensor:
        """One part as a contiguous vector of bytes on its device; gathered there when it is not contiguous."""
        program, sources = packer.sources.program, packer.sources
        tensor = self._tensor(row)
        itemsize = int(program.itemsize[row])
        offset = (int(sources.source[row]) - tensor.untyped_storage().data_ptr()) // itemsize
        strides = [int(n) // itemsize for n in sources.strides[row]]
        view = torch.as_strided(tensor.detach(), program.lengths[row].tolist(), strides, offset)
        whole = view.contiguous()  # of one element it may have any strides, and then not be seen as bytes
        return whole.as_strided((whole.numel(),), (1,), whole.storage_offset()).view(torch.uint8)

    def _tensor(self, row: int) -> torch.Tensor:
        tensor = self._owners[int(self._owner_of_piece[self._piece[row]])]
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def hold(self) -> None:
        """Let the training's current streams wait for the copies. The host does not wait."""
        for device, event in self._last.items():
            torch.cuda.current_stream(device).wait_event(event)

    def wait_for(self, chunk: int) -> None:
        """Return when the copies into `chunk` are over. The host waits."""
        for event in self._events.get(chunk, ()):
            event.synchronize()


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for copies of this process on `device`."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]
    return _streams[device]
