"""Goal: a rank's random streams go on bit-exactly, and on a changed world by the stated rule.

Method: draw, restore, draw again; rows of several ranks made by seeding this process as each of them; CUDA's rule with
CPU generators in the place of devices.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ckpt.errors import DamagedError, InvalidInputError, MismatchError
from ckpt.format.objects import decode, encode
from ckpt.state import rng
from ckpt.state.rng import RNG, inherit


@pytest.fixture(autouse=True)
def keep_global_streams() -> Iterator[None]:
    before = RNG().state_tree()
    yield
    RNG().load_state_tree(before)


def named() -> dict[str, Any]:
    return {
        "data": torch.Generator().manual_seed(7),
        "pcg": np.random.default_rng(7),
        "philox": np.random.Generator(np.random.Philox(7)),
        "mt": np.random.Generator(np.random.MT19937(7)),
        "sfc": np.random.Generator(np.random.SFC64(7)),
        "py": random.Random(7),
    }


def draw(generators: dict[str, Any] | None = None) -> list[Any]:
    out = [random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), float(np.random.randn())]
    out += [torch.randn(5).tolist(), torch.randint(9, (3,)).tolist()]
    for generator in (generators or {}).values():
        if isinstance(generator, torch.Generator):
            out.append(torch.rand(3, generator=generator).tolist())
        elif isinstance(generator, random.Random):
            out.append(generator.gauss(0, 1))
        else:
            out.append([generator.normal(), int(generator.integers(99, dtype=np.uint32))])
    return out


def row_of_rank(rank: int) -> tuple[int, bytes]:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    draw()  # an odd number of Gaussians: the spare one is state too
    return rank, encode(RNG().state_tree(), name="rng") + b" " * rank


def test_all_streams_go_on_bit_exactly() -> None:
    generators = named()
    state = RNG(generators)
    draw(generators)
    data = encode(state.state_tree(), name="rng")
    expected = [draw(generators) for _ in range(3)]
    other = named()
    for target in (generators, other):
        RNG(target).load_state_tree(decode(data, name="rng"))
        assert [draw(target) for _ in range(3)] == expected


def test_taking_the_state_draws_nothing() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    first = draw()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    RNG().state_tree()
    assert draw() == first


def test_each_rank_of_the_same_world_gets_its_own_streams() -> None:
    rows = [row_of_rank(rank) for rank in range(3)]
    after = []
    for _, payload in rows:
        RNG().load_state_tree(decode(payload, name="rng"))
        after.append(draw())
    for rank in range(3):
        RNG().load_rows(list(reversed(rows)), rank=rank, world=3)
        assert draw() == after[rank]


@pytest.mark.parametrize(("saved", "world"), [(1, 4), (4, 2), (2, 3), (3, 3)])
def test_ranks_inherit_by_number_and_the_rest_get_fresh_streams(
    saved: int, world: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row_of_rank(rank) for rank in range(saved)]
    drawn = []
    for rank in range(world):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="ckpt"):
            RNG().load_rows(rows, rank=rank, world=world)
        events = [record.__dict__["event"] for record in caplog.records]
        assert events == (["rng-fresh"] if rank >= saved else ["rng-ended"] if rank == 0 and saved > world else [])
        drawn.append(draw())
        chosen = inherit(rows, rank=rank, world=world)
        assert chosen.source_rank == (rank if rank < saved else None)
        RNG().load_state_tree(chosen.tree)
        assert draw() == drawn[-1]
    assert len({str(values) for values in drawn}) == world


def test_the_fresh_seed_is_the_documented_hash() -> None:
    rows = [(0, b"[1]  "), (1, b"[2]")]
    text = (
        b"ckpt.rng/1"
        + (3).to_bytes(8, "little")
        + b"[1]"
        + (3).to_bytes(8, "little")
        + b"[2]"
        + (5).to_bytes(8, "little")
    )
    assert inherit(rows, rank=5, world=6).tree == {"seed": hashlib.sha256(text).hexdigest()}


def test_fresh_named_generators_differ_between_ranks_and_streams() -> None:
    rows = [(0, b"{}")]
    seen = []
    for rank in (1, 2):
        generators = named()
        RNG(generators).load_rows(rows, rank=rank, world=3)
        seen.append(draw(generators))
    assert all(a != b for a, b in zip(*seen, strict=True))


def test_rows_that_are_not_of_all_ranks_are_refused() -> None:
    for rows in ([], [(1, b"{}")], [(0, b"{}"), (2, b"{}")], [(0, b"{}"), (0, b"{}")]):
        with pytest.raises(DamagedError):
            inherit(rows, rank=0, world=1)
    with pytest.raises(InvalidInputError):
        inherit([(0, b"{}")], rank=2, world=2)


def test_other_names_or_kinds_of_generators_are_refused_and_change_nothing() -> None:
    saved = RNG({"a": np.random.default_rng(1), "b": torch.Generator()}).state_tree()
    for generators in (
        {},
        {"a": np.random.default_rng(1)},
        {"a": np.random.Generator(np.random.Philox(1)), "b": torch.Generator()},
        {"a": random.Random(1), "b": torch.Generator()},
    ):
        state = RNG(generators)
        before = encode(state.state_tree(), name="rng")
        with pytest.raises(MismatchError):
            state.load_state_tree(saved)
        with pytest.raises(MismatchError):  # known before anything of a load has changed
            state.prepare_rows([(0, encode(saved, name="rng"))], rank=0, world=1)
        assert encode(state.state_tree(), name="rng") == before
    for bad in (object(), "seed", random.SystemRandom()):
        with pytest.raises(InvalidInputError):
            RNG({"x": bad})  # type: ignore[dict-item]


def test_a_damaged_tree_changes_nothing() -> None:
    good = RNG().state_tree()
    draw()
    before = encode(RNG().state_tree(), name="rng")
    for path, value in (
        ("torch", {"kind": "torch.cpu", "state": np.zeros(3, np.uint8)}),
        ("torch", {"kind": "torch.cpu", "state": np.zeros(5056, np.float64)}),
        ("python", {"kind": "python", "version": 3, "key": np.zeros(2, np.uint32), "gauss": None}),
        ("python", None),
        ("numpy", {"bit_generator": "MT19937"}),
        ("cuda", 3),
        ("named", None),
    ):
        with pytest.raises(DamagedError):
            RNG().load_state_tree({**good, path: value})
        assert encode(RNG().state_tree(), name="rng") == before
    for tree in (None, {}, [1]):
        with pytest.raises(DamagedError):
            RNG().load_state_tree(tree)


class Devices:
    """CPU generators in the place of CUDA devices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generators: list[torch.Generator] = []
        self.current = 0
        monkeypatch.setattr(rng, "_cuda_generators", lambda: self.generators)
        monkeypatch.setattr(rng, "_cuda_current", lambda: self.current)

    def use(self, count: int, current: int, seed: int = 0) -> None:
        self.generators = [torch.Generator().manual_seed(seed + device) for device in range(count)]
        self.current = current

    def draw(self) -> list[float]:
        return [float(torch.rand(1, generator=generator)) for generator in self.generators]


@pytest.mark.parametrize("count", [0, 1, 2, 4])
@pytest.mark.parametrize("current", [0, 1, 3])
def test_devices_inherit_by_index_and_the_current_one_from_the_current(
    count: int, current: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if count and current >= count:
        return
    devices = Devices(monkeypatch)
    devices.use(2, 1, seed=10)
    saved = RNG().state_tree()
    streams = devices.draw()
    devices.use(count, current)
    with caplog.at_level(logging.WARNING, logger="ckpt"):
        RNG().load_state_tree(saved)
    drawn = devices.draw()
    if count:
        assert drawn[current] == streams[1]  # the stream this process used before
        assert sorted(set(drawn) & set(streams)) == sorted(streams[-count:] if count < 2 else streams)
    assert len(set(drawn)) == count
    events = {record.__dict__["event"] for record in caplog.records}
    assert events == ({"rng-ended-device"} if count < 2 else {"rng-fresh-device"} if count > 2 else set())
    devices.use(count, current, seed=99)
    RNG().load_state_tree(saved)
    assert devices.draw() == drawn  # the same on every try


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_streams_go_on_bit_exactly() -> None:
    torch.cuda.manual_seed_all(3)
    torch.randn(5, device="cuda")
    saved = encode(RNG().state_tree(), name="rng")
    expected = torch.randn(5, device="cuda").tolist()
    RNG().load_state_tree(decode(saved, name="rng"))
    assert torch.randn(5, device="cuda").tolist() == expected
