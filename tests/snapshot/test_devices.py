"""Copies from a device fill the image as copies on the host do.

Method: without a device, streams and events are stood in for by ones that do nothing, and tensors of the host pass for tensors
of a device: what is tested is which bytes go where, cut at chunks, gathered, strided. Order on a real device: the marked tests.
"""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from ckpt.format.image import lay_out
from ckpt.snapshot.devices import DeviceCopies
from ckpt.snapshot.pack import Packer, bind, make_program
from ckpt.state import collect


class Nothing:
    """A stream or an event."""

    def __init__(self, **_: object) -> None:
        self.calls: list[str] = []

    def wait_stream(self, _: object) -> None:
        self.calls.append("wait_stream")

    def wait_event(self, _: object) -> None:
        self.calls.append("wait_event")

    def record(self, _: object) -> None:
        self.calls.append("record")

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def query(self) -> bool:
        return True


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Nothing:
    """The training's stream."""
    current = Nothing()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "Stream", Nothing)
    monkeypatch.setattr(torch.cuda, "Event", Nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr("ckpt.snapshot.devices._streams", {})
    return current


@pytest.mark.parametrize("chunk_bytes", [4096, 65536])
def test_the_image_is_the_same(chunk_bytes: int, stream: Nothing) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "wide": torch.randn(300, 70, generator=generator),
        "turned": torch.randn(64, 90, generator=generator).t(),
        "part": torch.randn(50, 40, generator=generator)[5:30, 3:17],
        "bits": torch.randn(77, generator=generator) > 0,
        "half": torch.randn(33, 5, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        **{f"small{i}": torch.randn(i + 1, generator=generator) for i in range(50)},
    }
    local = collect({"t": state}, rank=0, world=1, stage_devices=False)
    layout = lay_out(local.specs, local.pieces.boxes, [])
    program = make_program(
        layout, local.specs, local.pieces.boxes, layout.source, chunk_bytes=chunk_bytes, block_bytes=4096
    )
    packer = Packer(bind(program, local.pieces, local.storage_of_piece), [], threads=1)
    expected = np.zeros(layout.total_bytes, np.uint8)
    packer.copy_parts(np.arange(len(program.piece)), expected, 0)

    elsewhere = dataclasses.replace(local, on_device=np.ones(len(local.pieces.boxes), bool))
    copies, image = DeviceCopies(elsewhere), np.zeros(layout.total_bytes, np.uint8)
    late = np.arange(len(program.piece)) % 2 == 0
    rows = copies.start(packer, image, late)
    for chunk in range(program.num_chunks):
        copies.wait_for(chunk)
    copies.hold()

    assert (rows.all(), copies.finished, stream.calls) == (True, True, ["wait_stream", "wait_event"])
    np.testing.assert_array_equal(image, expected)
