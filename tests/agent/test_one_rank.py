"""What `Memory` goes together with: incremental saves, a topology file, memory that is registered with CUDA.

Method: one rank with a real agent, in this process. The driver of CUDA is played where there is no GPU, and real where there is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt
from ckpt.agent import segments
from ckpt.agent.identity import memory_folder
from ckpt.agent.tier import Tier
from ckpt.commit import find
from ckpt.config import Memory, Options
from ckpt.engine.pending import PendingSave
from ckpt.errors import DamagedError, InvalidInputError, SaveFailedError
from ckpt.snapshot import pinned
from ckpt.store.open import open_store
from tests.agent.conftest import Make, leave, until
from tests.drill.job import flip


def state(value: float, *, frozen: float = 1.0) -> dict[str, Any]:
    return {"model": {"w": torch.full((2000,), float(value)), "base": torch.full((200_000,), float(frozen))}}


def step(checkpointer: ckpt.Checkpointer, number: int, of: dict[str, Any]) -> str:
    """Save, wait, and say which tier has it."""
    pending = checkpointer.step(number, of)
    assert isinstance(pending, PendingSave)
    return pending.wait(60.0).tier


def test_incremental_saves_and_snapshots_in_memory_go_on_side_by_side(make: Make, tmp_path: Path) -> None:
    checkpointer = make(every=2, incremental=True)
    checkpointer.prepare(state(0))
    tiers = [step(checkpointer, number, state(number)) for number in range(1, 6)]
    assert tiers == ["memory", "store", "memory", "store", "memory"]
    assert find.steps(open_store(tmp_path / "run", options=Options())) == [2, 4]
    sizes = [file.stat().st_size for file in sorted((tmp_path / "run").glob("step-*/*/*.safetensors"))]
    assert sizes[1] < sizes[0] / 5  # `base` was stored once
    leave(checkpointer)
    target, again = state(0, frozen=0), make(every=2, incremental=True)
    assert again.restore(target) == 5
    assert again.restored is not None and again.restored.tier == "memory"
    assert torch.equal(target["model"]["base"], state(5)["model"]["base"])
    assert torch.equal(target["model"]["w"], state(5)["model"]["w"])


def test_an_incremental_save_that_is_newer_than_memory_is_what_the_job_comes_back_from(make: Make) -> None:
    checkpointer = make(every=2, incremental=True)
    checkpointer.prepare(state(0))
    assert [step(checkpointer, number, state(number)) for number in (1, 2)] == ["memory", "store"]
    leave(checkpointer)
    target, again = state(0, frozen=0), make(every=2, incremental=True)
    assert again.restore(target) == 2
    assert again.restored is not None and again.restored.tier == "store"
    assert torch.equal(target["model"]["base"], state(2)["model"]["base"])


def damage(run: Path, number: int) -> None:
    """One bit of the image of a step in the store."""
    (image,) = run.glob(f"step-{number:012d}/*/*.safetensors")
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)


def test_a_step_whose_number_a_damaged_checkpoint_has_is_kept_in_memory_and_the_next_is_stored(
    make: Make, tmp_path: Path
) -> None:
    first = make(every=2, memory=Memory(every=1000))
    assert [step(first, number, state(number)) for number in (2, 4)] == ["store", "store"]
    first.close()
    damage(tmp_path / "run", 4)
    target, second = state(0), make(every=2, memory=Memory(every=1000))
    assert second.restore(target) == 2
    assert [step(second, number, state(number)) for number in (4, 5, 6)] == ["memory", "store", "store"]
    assert second.step(7, state(7)) is None
    assert find.steps(open_store(tmp_path / "run", options=Options())) == [2, 4, 5, 6]


def test_memory_of_the_step_that_is_damaged_in_the_store_brings_the_job_back(make: Make, tmp_path: Path) -> None:
    first = make(every=2, memory=Memory(every=1000))
    assert [step(first, number, state(number)) for number in (2, 4)] == ["store", "store"]
    first.close()
    damage(tmp_path / "run", 4)
    second = make(every=2, memory=Memory(every=1000))
    assert (second.restore(state(0)), step(second, 4, state(44))) == (2, "memory")
    leave(second)
    target, third = state(0), make(every=2, memory=Memory(every=1000))
    assert third.restore(target) == 4
    assert torch.equal(target["model"]["w"], state(44)["model"]["w"])


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_topology_file_says_which_domain_a_host_is_in(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    file = tmp_path / "topology.yaml"
    file.write_text("here: rack-7\nthere: rack-8\n")
    monkeypatch.setenv("CKPT_NODE", "here")
    if how == "environment":
        monkeypatch.setenv("CKPT_TOPOLOGY_FILE", str(file))
    tier = make(memory=Memory(topology=file if how == "argument" else None))._tier
    assert isinstance(tier, Tier)
    assert [(seat.host, seat.domain) for seat in tier._seats] == [("here", "rack-7")]


def test_topology_file_that_is_not_there_is_refused_before_an_agent_starts(
    make: Make, folders: Options, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=r"topology file .*missing\.yaml cannot be read"):
        make(memory=Memory(topology=tmp_path / "missing.yaml"))
    assert list(Path(folders.agent_runtime_folder or "").iterdir()) == []


def test_an_image_that_is_damaged_in_memory_while_it_is_stored_never_becomes_a_checkpoint(
    make: Make, folders: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAILPOINT", "agent.in-flush:delay=3@1")
    checkpointer = make(every=2, options=dataclasses.replace(folders, chunk_bytes=64 * 1024))
    monkeypatch.delenv("CKPT_FAILPOINT")  # of its agent alone
    checkpointer.prepare(state(0))
    pending = checkpointer.step(2, state(2))
    assert pending is not None
    until(lambda: any((tmp_path / "run").glob("step-*/*/*.safetensors*")))
    for path in segments.listing(memory_folder(folders)):
        header = segments.peek(path)
        if header.step == 2:
            flip(path, header, header.image_bytes // 2, bit=3)
    error = pending.outcome(60.0)
    assert isinstance(error, DamagedError) and "rank 0 was damaged in memory and is not stored" in error.message
    assert find.steps(open_store(tmp_path / "run", options=Options())) == []
    with pytest.raises(SaveFailedError, match="damaged in memory"):
        checkpointer.close()


@pytest.mark.parametrize(("goes_on_from", "outcome", "stored"), [(1, "failed", []), (2, "stored", [2])])
def test_a_flush_that_is_left_over_is_given_up_if_the_job_comes_back_from_an_earlier_step(
    make: Make,
    folders: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    goes_on_from: int,
    outcome: str,
    stored: list[int],
) -> None:
    monkeypatch.setenv("CKPT_FAILPOINT", "agent.in-flush:delay=4@1")
    options = dataclasses.replace(folders, chunk_bytes=64 * 1024)
    checkpointer = make(every=2, options=options)
    monkeypatch.delenv("CKPT_FAILPOINT")
    checkpointer.prepare(state(0))
    checkpointer.step(2, state(2))
    until(lambda: any((tmp_path / "run").glob("step-*/*/*.safetensors*")))
    with contextlib.suppress(SaveFailedError):  # nobody waits for what the agent goes on with
        leave(checkpointer)
    tier = make(every=2, options=options)._tier
    assert isinstance(tier, Tier) and tier._client is not None
    client = tier._client
    (step_, attempt, world, done), *_ = client.call("flushes")[0]["flushes"]
    assert (step_, world, done) == (2, 1, False)
    client.call("choose", {"goes_on_from": goes_on_from})
    found = {"step": step_, "attempt": attempt}
    until(lambda: client.call("stored", found)[0]["state"] != "running")
    assert client.call("stored", found)[0]["state"] == outcome
    assert find.steps(open_store(tmp_path / "run", options=Options())) == stored


class Cudart:
    """Takes what a driver would be told."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - as CUDA calls it
        assert address not in self.held and flags == 0
        self.held[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.held[address]
        return 0


def test_agents_memory_is_registered_with_cuda_once_and_let_go_of_before_it_is_unmapped(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    tier = make()._tier
    assert isinstance(tier, Tier)
    tier.reserve(100_000, pinned=True)
    mapped = list(tier._mapped.values())
    assert sorted(cudart.held.values()) == sorted(len(one.memory) for one in mapped)
    tier.reserve(100_000, pinned=True)  # the same segments
    assert len(cudart.held) == len(mapped) == 2
    tier._mapped.clear()
    del mapped
    gc.collect()
    assert cudart.held == {}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_state_on_a_device_is_copied_into_registered_memory_of_the_agent_and_back(make: Make) -> None:
    checkpointer = make()
    source = torch.arange(3_000_000, dtype=torch.int64, device="cuda")
    checkpointer.prepare({"model": {"w": source}})
    tier = checkpointer._tier
    assert isinstance(tier, Tier)
    assert all(pinned.is_registered(np.frombuffer(one.memory, np.uint8)) for one in tier._mapped.values())
    assert step(checkpointer, 1, {"model": {"w": source}}) == "memory"
    leave(checkpointer)
    target = torch.zeros_like(source)
    assert make().restore({"model": {"w": target}}) == 1
    assert torch.equal(target, source)
