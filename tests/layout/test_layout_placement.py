"""Goal: every rank's boxes are exactly what torch cuts, also uneven, empty, strided, fused and padded.

Method: fill a tensor with its own element numbers, cut it with torch.chunk or with torch's own `_StridedShard`, and
compare element by element with what the boxes say. hypothesis draws shapes, meshes and placements.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import placement_types as theirs

from ckpt.errors import InvalidInputError
from ckpt.layout import placement as ours
from ckpt.layout.box import Box
from ckpt.layout.placement import (
    Placed,
    Replicate,
    Shard,
    StridedShard,
    dtensor_boxes,
    dtensor_placement,
    merge_ranges,
    place_flat_range,
    place_ranges,
    shard_parts,
)
from tests.layout.cutting import NOTHING, filled, held, numbered, piece

SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3)
MESHES = st.lists(st.integers(1, 4), min_size=1, max_size=3)


def drawn_placements(data: st.DataObject, num_dims: int, mesh: list[int], *, strided: bool) -> list[ours.DimPlacement]:
    dims = st.integers(0, num_dims - 1)
    kinds: st.SearchStrategy[ours.DimPlacement] = st.one_of(st.just(Replicate()), st.builds(Shard, dims))
    if strided:
        kinds = st.one_of(kinds, st.builds(StridedShard, dims, st.integers(1, 5)))
    return [data.draw(kinds) for _ in mesh]


def torch_cut(
    tensor: torch.Tensor, mesh: list[int], at: tuple[int, ...], placements: list[ours.DimPlacement]
) -> object:
    """Left to right with torch's own classes."""
    for num, index, item in zip(mesh, at, placements, strict=True):
        if isinstance(item, Replicate):
            continue
        if isinstance(item, StridedShard):
            kind: theirs.Placement = theirs._StridedShard(item.dim, split_factor=item.split_factor)
        else:
            kind = theirs.Shard(item.dim)
        pieces, _ = kind._split_tensor(tensor, num, with_padding=False)  # type: ignore[attr-defined]
        tensor = pieces[index]
    return tensor


@settings(deadline=None, max_examples=200)
@given(data=st.data(), shape=SHAPES, mesh=MESHES)
def test_boxes_are_what_torch_cuts(data: st.DataObject, shape: list[int], mesh: list[int]) -> None:
    placements = drawn_placements(data, len(shape), mesh, strided=True)
    for at in itertools.product(*(range(n) for n in mesh)):
        local = torch_cut(numbered(shape), mesh, at, placements)
        mine = dtensor_placement(shape, mesh, at, placements, strided="split")
        assert filled(mine, shape).tolist() == local.tolist()  # type: ignore[attr-defined]
        assert mine.local_shape == tuple(local.shape)  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=100)
@given(data=st.data(), shape=SHAPES, order=st.permutations([0, 1, 2]), mesh=st.tuples(*[st.integers(1, 4)] * 3))
def test_strided_shards_are_nested_cuts_in_another_order(
    data: st.DataObject, shape: list[int], order: list[int], mesh: tuple[int, int, int]
) -> None:
    """What fully_shard on tensor-parallel modules holds: each piece cut again, also where that is uneven."""
    dim = data.draw(st.integers(0, len(shape) - 1))
    placements: list[ours.DimPlacement] = []
    for mesh_dim in range(3):
        before = order[: order.index(mesh_dim)]
        factor = math.prod(mesh[other] for other in before if other > mesh_dim)
        placements.append(StridedShard(dim, factor) if factor > 1 else Shard(dim))
    for at in itertools.product(*(range(n) for n in mesh)):
        local = numbered(shape)
        for mesh_dim in order:
            local = piece(local, mesh[mesh_dim], at[mesh_dim], dim)
        assert filled(dtensor_placement(shape, mesh, at, placements), shape).tolist() == local.tolist()


@settings(deadline=None, max_examples=100)
@given(data=st.data(), shape=SHAPES, mesh=MESHES, strided=st.sampled_from(["order", "split"]))
def test_every_element_is_held_once_per_replica_group(
    data: st.DataObject, shape: list[int], mesh: list[int], strided: str
) -> None:
    placements = drawn_placements(data, len(shape), mesh, strided=True)
    copies = math.prod(n for n, item in zip(mesh, placements, strict=True) if isinstance(item, Replicate))
    elements: list[int] = []
    for at in itertools.product(*(range(n) for n in mesh)):
        elements += held(dtensor_placement(shape, mesh, at, placements, strided=strided), shape)  # type: ignore[arg-type]
    assert sorted(elements) == sorted(list(range(math.prod(shape))) * copies)


def test_the_known_example_of_two_by_two() -> None:
    """torch's own docstring: [8, 8] over dp 2 x tp 2, dp inside of tp."""
    boxes = {
        at: [
            (p.box.offsets[0], p.box.lengths[0])
            for p in dtensor_boxes((8, 8), (2, 2), at, [StridedShard(0, 2), Shard(0)])
        ]
        for at in itertools.product(range(2), range(2))
    }
    assert boxes == {(0, 0): [(0, 2)], (0, 1): [(4, 2)], (1, 0): [(2, 2)], (1, 1): [(6, 2)]}


def test_a_strided_shard_alone_is_several_boxes_with_their_local_places() -> None:
    (first, second) = dtensor_boxes((8, 2), (2,), (1,), [StridedShard(0, 2)])
    assert first == Placed(box=Box(offsets=(2, 0), lengths=(2, 2)), local_offsets=(0, 0))
    assert second == Placed(box=Box(offsets=(6, 0), lengths=(2, 2)), local_offsets=(2, 0))


def test_negative_dims_count_from_the_end_and_others_are_refused() -> None:
    assert dtensor_boxes((4, 6), (2,), (1,), [Shard(-1)]) == dtensor_boxes((4, 6), (2,), (1,), [Shard(1)])
    for dim in (2, -3):
        with pytest.raises(InvalidInputError, match="does not have"):
            dtensor_boxes((4, 6), (2,), (1,), [Shard(dim)])
    with pytest.raises(InvalidInputError):
        dtensor_boxes((4, 6), (2, 2), (1, 1), [Shard(0)])


def test_a_tensor_without_dims_is_one_box_everywhere() -> None:
    (only,) = dtensor_boxes((), (2, 2), (1, 0), [Replicate(), Replicate()])
    assert only == Placed(box=Box(offsets=(), lengths=()), local_offsets=())


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), num=st.integers(1, 4), tail=st.integers(1, 3))
@settings(deadline=None)
def test_fused_parts_are_cut_one_by_one(sizes: list[int], num: int, tail: int) -> None:
    shape = (sum(sizes), tail)
    elements: list[int] = []
    for index in range(num):
        parts = torch.split(numbered(shape), sizes)
        local = torch.cat([piece(part, num, index, 0) for part in parts])
        mine = place_ranges([shard_parts(sizes, num, index), ((0, tail),)], shape)
        assert filled(mine, shape).tolist() == local.tolist()
        elements += held(mine, shape)
    assert sorted(elements) == list(range(math.prod(shape)))


@given(ranges=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda r: (min(r), max(r))), max_size=6))
def test_merging_ranges_keeps_the_elements_and_their_order(ranges: list[tuple[int, int]]) -> None:
    merged = merge_ranges(ranges)
    assert [i for r in merged for i in range(*r)] == [i for r in ranges for i in range(*r)]
    assert all(a[1] != b[0] and a[0] < a[1] for a, b in itertools.pairwise(merged))


@settings(deadline=None, max_examples=150)
@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), mesh=MESHES)
def test_a_flat_range_of_any_local_tensor_is_in_contiguous_pieces(
    data: st.DataObject, shape: list[int], mesh: list[int]
) -> None:
    placements = drawn_placements(data, len(shape), mesh, strided=True)
    at = tuple(data.draw(st.integers(0, n - 1)) for n in mesh)
    whole = dtensor_placement(shape, mesh, at, placements, strided="split")
    local = filled(whole, shape).reshape(-1)
    start = data.draw(st.integers(0, local.size))
    stop = data.draw(st.integers(start, local.size))
    room = data.draw(st.integers(0, 3))
    flat = ours.Placement(
        local_shape=(room + stop - start,), placed=tuple(place_flat_range(whole, start, stop, room)), flat="flat"
    )
    assert filled(flat, shape).tolist() == [NOTHING] * room + local[start:stop].tolist()
