"""Goal: replicated state is written once, evenly: no writer has over 5 % more than the best plan that there could be.

Method: the best is what no plan can beat: the fragments that only the ranks of a set hold, divided by the number of those ranks,
for the worst of all sets (max-flow min-cut; every set is tried). It is compared with the boxes that the ranks really write, for
structures of known kinds of parallelism and for arbitrary ones. Sizes are of real models: nothing here is in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.format.spec import TensorSpec
from ckpt.layout.box import Box, BoxTable, pad_dims
from ckpt.plan.cover import not_tiled
from ckpt.plan.records import make_records
from ckpt.plan.save import plan_save, rows_of_rank

RATIO_MAX = 1.05
ROUNDING = 16 << 10  # bytes: a writer of a few pages need not be even to a few bytes
WHOLE_MAX = 4096  # bytes: fragments that need not be cut
_ITEMSIZE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One box of one tensor, and who holds it."""

    spec: TensorSpec
    box: Box
    holders: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.box.volume * self.spec.itemsize


def tensor(name: str, shape: Sequence[int], dtype: str = "float32", role: str = "param") -> TensorSpec:
    return TensorSpec(name=name, role=role, dtype=dtype, shape=tuple(shape))


def rows_cut(spec: TensorSpec, holders: Sequence[Sequence[int]]) -> list[Part]:
    """The tensor cut along its first dim into as many parts as there are holder sets."""
    edges = np.linspace(0, spec.shape[0], len(holders) + 1).astype(int).tolist()
    rest = spec.shape[1:]
    return [
        Part(spec=spec, box=Box(offsets=(a, *(0 for _ in rest)), lengths=(b - a, *rest)), holders=tuple(sorted(ranks)))
        for a, b, ranks in zip(edges, edges[1:], holders, strict=False)
        if b > a
    ]


def written(parts: Sequence[Part], num_ranks: int) -> tuple[list[int], int]:
    """Bytes that each rank really writes, and how many boxes all of them; everything is written once."""
    specs = sorted({part.spec.name: part.spec for part in parts}.values(), key=lambda spec: spec.name)
    number = {spec.name: i for i, spec in enumerate(specs)}
    tables = []
    for rank in range(num_ranks):
        own = [(number[part.spec.name], part.box) for part in parts if rank in part.holders]
        tables.append(BoxTable.build(sorted(own, key=lambda item: (item[0], item[1].offsets))))
    plan = plan_save([make_records(specs, table) for table in tables])
    rows = [rows_of_rank(plan, rank, specs, table)[0] for rank, table in enumerate(tables)]
    for rank, table in enumerate(rows):
        held = [part for part in parts if rank in part.holders]
        assert set(table.tensor.tolist()) <= {number[part.spec.name] for part in held}
    dims = max(table.num_dims for table in rows)
    joined = BoxTable(
        tensor=np.concatenate([table.tensor for table in rows]),
        offsets=np.concatenate([pad_dims(table.offsets, dims, 0) for table in rows]),
        lengths=np.concatenate([pad_dims(table.lengths, dims, 1) for table in rows]),
    )
    assert not_tiled(specs, joined) == []
    itemsizes = np.array([spec.itemsize for spec in specs], np.int64)
    return [int((table.volumes() * itemsizes[table.tensor]).sum()) for table in rows], len(joined)


def best(parts: Sequence[Part], num_ranks: int) -> float:
    """The smallest largest load that any division of the parts among their holders could have."""
    sizes: dict[frozenset[int], int] = {}
    for part in parts:
        holders = frozenset(part.holders[:1] if part.spec.role == "buffer" else part.holders)
        sizes[holders] = sizes.get(holders, 0) + part.nbytes
    out = 0.0
    for count in range(1, num_ranks + 1):
        for ranks in itertools.combinations(range(num_ranks), count):
            inside = sum(nbytes for holders, nbytes in sizes.items() if holders <= set(ranks))
            out = max(out, inside / count)
    return out


def check(parts: Sequence[Part], num_ranks: int) -> list[int]:
    loads, num_boxes = written(parts, num_ranks)
    assert max(loads) <= best(parts, num_ranks) * RATIO_MAX + ROUNDING
    assert num_boxes <= len(parts) + 9 * num_ranks * len({part.holders for part in parts})
    return loads


def even(loads: Sequence[int]) -> bool:
    return max(abs(load - sum(loads) / len(loads)) for load in loads) <= 0.05 * sum(loads) / len(loads)


def mesh(*sizes: int) -> np.ndarray[Any, Any]:
    return np.arange(math.prod(sizes)).reshape(sizes)


def gpt(width: int, layers: int, vocabulary: int) -> list[TensorSpec]:
    out = [tensor("embed", (vocabulary, width)), tensor("norm", (width,))]
    for layer in range(layers):
        out += [tensor(f"{layer}.attention", (3 * width, width)), tensor(f"{layer}.mlp", (4 * width, width))]
        out += [tensor(f"{layer}.norm{i}", (width,)) for i in (1, 2)]
    return out


@pytest.mark.parametrize("ranks", [2, 3, 7, 8])
@pytest.mark.parametrize(
    "model", [gpt(768, 12, 50_257), gpt(64, 2, 1000), gpt(8192, 4, 128_256)], ids=["gpt2", "tiny", "large"]
)
def test_data_parallel_replicas_are_even(ranks: int, model: list[TensorSpec]) -> None:
    everyone = tuple(range(ranks))
    parts = [part for spec in model for part in rows_cut(spec, [everyone])]
    assert even(check(parts, ranks))


@pytest.mark.parametrize(("shards", "replicas"), [(2, 4), (4, 2), (8, 1), (3, 3)])
def test_hybrid_sharding_is_even(shards: int, replicas: int) -> None:
    ranks = mesh(replicas, shards)
    parts = [p for spec in gpt(1024, 6, 32_000) for p in rows_cut(spec, [ranks[:, i].tolist() for i in range(shards)])]
    assert even(check(parts, ranks.size))


@pytest.mark.parametrize(("dp", "tp"), [(2, 4), (4, 2), (3, 3), (8, 1), (1, 8)])
def test_tensor_parallel_with_replicas_is_even(dp: int, tp: int) -> None:
    ranks = mesh(dp, tp)
    columns = [ranks[:, i].tolist() for i in range(tp)]
    parts = []
    for spec in gpt(2048, 4, 50_000):
        parts += rows_cut(spec, columns if len(spec.shape) > 1 else [ranks.ravel().tolist()])
    assert even(check(parts, ranks.size))


def test_rows_and_columns_of_a_mesh_are_even() -> None:
    """Some tensors are cut over one axis and held by the other, some the other way round: sets that cross."""
    ranks = mesh(3, 3)
    parts = []
    for i, size in enumerate((9000, 100, 3)):
        parts += rows_cut(tensor(f"row{i}", (999, size)), [ranks[j].tolist() for j in range(3)])
        parts += rows_cut(tensor(f"column{i}", (333, size)), [ranks[:, j].tolist() for j in range(3)])
    assert even(check(parts, 9))


def test_a_chain_of_overlapping_pairs_is_as_even_as_can_be() -> None:
    parts = [part for i in range(7) for part in rows_cut(tensor(f"t{i}", (1000, 1000)), [(i, i + 1)])]
    loads = check(parts, 8)
    assert even(loads)


def test_tied_stages_of_a_pipeline_share_their_weight() -> None:
    """The first and the last stage hold the embedding; the stages between hold more layers."""
    parts = rows_cut(tensor("embed", (50_000, 1024)), [(0, 3)])
    for stage, layers in enumerate((1, 5, 5, 2)):
        parts += [part for i in range(layers) for part in rows_cut(tensor(f"{stage}.{i}", (4096, 2048)), [(stage,)])]
    check(parts, 4)


@pytest.mark.parametrize(
    "shape", [(3, 1 << 24), (1, 1 << 25), (1 << 25,), (2, 3, 1 << 22), (1, 1, 5, 1 << 20), (5, 7, 1 << 20)]
)
@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_one_huge_tensor_is_cut_evenly_whatever_its_rows(shape: tuple[int, ...], ranks: int) -> None:
    loads = check(rows_cut(tensor("huge", shape), [tuple(range(ranks))]), ranks)
    assert even(loads)


def test_a_tensor_of_small_rows_is_cut_between_rows() -> None:
    specs = [tensor("embed", (50_000, 1024))]
    tables = [BoxTable.build([(0, Box(offsets=(0, 0), lengths=(50_000, 1024)))])] * 8
    plan = plan_save([make_records(specs, table) for table in tables])
    for rank, table in enumerate(tables):
        rows, _ = rows_of_rank(plan, rank, specs, table)
        assert len(rows) == 1 and rows.lengths[0, 1] == 1024


def test_many_small_tensors_are_even() -> None:
    generator = np.random.default_rng(0)
    specs = [tensor(f"{i:05d}", (int(n),)) for i, n in enumerate(generator.integers(1, 2000, 20_000))]
    parts = [part for spec in specs for part in rows_cut(spec, [tuple(range(8))])]
    assert even(check(parts, 8))


def test_buffers_come_from_one_rank_and_the_rest_makes_up_for_it() -> None:
    everyone = tuple(range(4))
    parts = rows_cut(tensor("statistics", (1 << 22,), role="buffer"), [everyone])
    parts += [part for spec in gpt(1024, 4, 32_000) for part in rows_cut(spec, [everyone])]
    assert even(check(parts, 4))


@st.composite
def structures(draw: Any) -> tuple[list[Part], int]:
    num_ranks = draw(st.integers(1, 7))
    ranks = st.sets(st.integers(0, num_ranks - 1), min_size=1)
    known = draw(st.lists(ranks, min_size=1, max_size=8))
    parts: list[Part] = []
    for i in range(draw(st.integers(1, 12))):
        big = draw(st.booleans())
        shape = draw(st.lists(st.integers(1, 4096 if big else 40), min_size=1, max_size=3))
        while math.prod(shape) > 1 << 28:
            shape[shape.index(max(shape))] //= 16
        spec = tensor(
            f"t{i}",
            shape,
            draw(st.sampled_from(sorted(_ITEMSIZE))),
            draw(st.sampled_from(["param", "param", "buffer"])),
        )
        holders = [tuple(draw(st.sampled_from(known))) for _ in range(draw(st.integers(1, 3)))]
        parts += rows_cut(spec, holders[: spec.shape[0]])
    return parts, num_ranks


@settings(max_examples=300, deadline=None)
@given(structures())
def test_any_structure_is_within_five_percent_of_the_best(case: tuple[list[Part], int]) -> None:
    check(*case)


@settings(max_examples=50, deadline=None)
@given(structures(), st.randoms())
def test_the_plan_does_not_depend_on_anything_but_the_records(case: tuple[list[Part], int], random: Any) -> None:
    parts, num_ranks = case
    first = written(parts, num_ranks)
    random.shuffle(parts)
    assert written(parts, num_ranks) == first
