"""Goal: a loader gets the state that makes it go on exactly, or a refusal that names it, both degrees and the ways out.

Method: rows as a save would store them, loaders of every kind that tells or does not tell its place: our own, torch's
DistributedSampler, a wrapper, a StatefulDataLoader (the real one where torchdata is installed, always a look-alike).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from ckpt.errors import DamagedError, InvalidInputError, MismatchError
from ckpt.format.objects import decode, encode
from ckpt.state.elastic import ElasticLoader, ElasticSampler
from ckpt.state.loader import Loader, LoaderRow, choose_state, dp_of, is_loader


class LookAlike:
    """The surface of torchdata's StatefulDataLoader: an iterable with a state, and the sampler within reach."""

    def __init__(self, sampler: Any = None) -> None:
        self.sampler = sampler
        self.num_yielded = 0

    def __iter__(self) -> Iterator[int]:
        while self.num_yielded < 10:
            self.num_yielded += 1
            yield self.num_yielded

    def __len__(self) -> int:
        return 10

    def state_dict(self) -> dict[str, Any]:
        return {"_num_yielded": self.num_yielded, "generator": torch.Generator().manual_seed(1).get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_yielded = state["_num_yielded"]


def distributed(rank: int, size: int) -> DistributedSampler[int]:
    return DistributedSampler(range(40), num_replicas=size, rank=rank)  # type: ignore[arg-type]


def rows_of(loaders: list[Any], ranks_per_share: int = 1) -> list[LoaderRow]:
    rows = []
    for number, loader in enumerate(loaders):
        for twin in range(ranks_per_share):
            dp_rank, dp_size = dp_of(loader) or (-1, -1)
            payload = encode(loader.state_dict(), name="loader") + b" " * twin
            rows.append(
                LoaderRow(rank=number * ranks_per_share + twin, dp_rank=dp_rank, dp_size=dp_size, payload=payload)
            )
    return rows


def choose(rows: list[LoaderRow], loader: Any, *, rank: int, world: int, same_layout: bool = True) -> Any:
    return choose_state(rows, loader=loader, name="loader", rank=rank, world=world, same_layout=same_layout)


def advanced(loader: Any, count: int) -> Any:
    for _ in zip(range(count), loader, strict=False):
        pass
    return loader


def test_what_is_a_loader() -> None:
    assert is_loader(LookAlike()) and is_loader(ElasticSampler(3)) and is_loader(ElasticLoader([1], batch_size=1))
    assert is_loader(Loader(LookAlike(), dp_rank=0, dp_size=1))
    assert not any(
        map(is_loader, (DataLoader([1]), torch.nn.Linear(1, 1), torch.nn.ModuleList(), [], {}, LookAlike, None))  # type: ignore[arg-type]
    )


def test_where_the_place_of_a_loader_is_looked_for() -> None:
    wrapped = DataLoader(range(40), batch_sampler=BatchSampler(distributed(2, 4), 2, False))  # type: ignore[arg-type]
    assert dp_of(wrapped) == (2, 4)
    assert dp_of(DataLoader(range(40), sampler=distributed(1, 4))) == (1, 4)  # type: ignore[arg-type]
    assert dp_of(distributed(3, 4)) == (3, 4)
    assert dp_of(LookAlike(ElasticSampler(5, dp_rank=1, dp_size=2))) == (1, 2)
    assert dp_of(ElasticLoader([1], batch_size=1, dp_rank=4, dp_size=6)) == (4, 6)
    assert dp_of(Loader(LookAlike(distributed(0, 4)), dp_rank=1, dp_size=2)) == (1, 2)
    assert dp_of(LookAlike()) is None and dp_of(DataLoader([1])) is None  # type: ignore[arg-type]


def test_a_wrapper_is_the_loader_that_it_wraps() -> None:
    inner = LookAlike()
    loader = Loader(inner, dp_rank=0, dp_size=2)
    assert list(loader) == list(range(1, 11)) and len(loader) == 10 and loader and loader.sampler is None
    assert loader.state_dict()["_num_yielded"] == 10 and not hasattr(loader, "reshard_state")
    assert hasattr(Loader(ElasticSampler(5), dp_rank=0, dp_size=1), "reshard_state")
    assert copy.deepcopy(loader).dp_size == 2
    for bad in ({"dp_rank": 2, "dp_size": 2}, {"dp_rank": -1, "dp_size": 2}, {"dp_rank": 0.0, "dp_size": 2}):
        with pytest.raises(InvalidInputError):
            Loader(inner, **bad)
    with pytest.raises(InvalidInputError, match="DataLoader"):
        Loader(DataLoader([1]), dp_rank=0, dp_size=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [4, 8, 2])
def test_the_same_degree_gets_the_state_of_its_share_on_any_world(world: int) -> None:
    saved = [advanced(LookAlike(distributed(share, 2)), 3 + share) for share in range(2)]
    rows = rows_of(saved, ranks_per_share=2)
    for rank in range(world):
        share = rank % 2
        loader = LookAlike(distributed(share, 2))
        loader.load_state_dict(choose(rows, loader, rank=rank, world=world, same_layout=False))
        assert loader.num_yielded == 3 + share


def test_a_tensor_within_the_state_comes_back() -> None:
    loader = LookAlike(distributed(0, 1))
    state = choose(rows_of([loader]), loader, rank=0, world=1)
    assert torch.equal(state["generator"], loader.state_dict()["generator"])
    for tensor in (
        torch.randn(3).bfloat16(),
        torch.zeros(0, 2),
        torch.tensor(True),
        torch.ones(2, 3).T,
        torch.ones(2) * 1j,
    ):
        again = decode(encode(tensor, name="x"), name="x")
        assert again.dtype == tensor.dtype and torch.equal(again, tensor)
    with pytest.raises(InvalidInputError):
        encode(torch.ones(1, requires_grad=True), name="x")
    with pytest.raises(InvalidInputError):
        encode(torch.nn.Parameter(torch.ones(1)), name="x")


def test_a_changed_degree_is_refused_by_name_with_the_ways_out() -> None:
    rows = rows_of([LookAlike(distributed(share, 4)) for share in range(4)])
    for loader in (LookAlike(distributed(1, 2)), Loader(LookAlike(), dp_rank=1, dp_size=2)):
        with pytest.raises(MismatchError) as caught:
            choose(rows, loader, rank=1, world=2)
        error = caught.value
        assert error.kind == "loader-degree"
        for part in ("`loader`", "degree 4", "now it is 2", "`LookAlike`"):
            assert part in error.message
        assert "ElasticLoader" in str(error) and "reshard_state" in str(error)


def test_a_changed_degree_is_resharded_by_a_loader_that_can() -> None:
    saved = [advanced(ElasticSampler(40, dp_rank=share, dp_size=4, seed=1), 2 + share) for share in range(4)]
    rows = rows_of(saved, ranks_per_share=2)
    delivered = [index for sampler in saved for index in _first(sampler)]
    for share in range(3):
        loader = Loader(ElasticSampler(40, dp_rank=share, dp_size=3, seed=1, tail="deal"), dp_rank=share, dp_size=3)
        loader.load_state_dict(choose(rows, loader, rank=share, world=3))
        delivered += list(loader)
    assert sorted(delivered) == list(range(40))


def test_a_state_that_the_loader_would_refuse_is_refused_before_anything_changes() -> None:
    rows = rows_of([ElasticSampler(9, dp_rank=share, dp_size=2) for share in range(2)])
    for loader in (ElasticSampler(10, dp_size=2), ElasticLoader(range(8), batch_size=2), ElasticSampler(10, dp_size=3)):
        with pytest.raises(MismatchError) as caught:
            choose(rows, loader, rank=0, world=2)
        assert caught.value.kind == "loader-samples"


def _first(sampler: ElasticSampler) -> list[int]:
    again = ElasticSampler(40, dp_rank=sampler.dp_rank, dp_size=sampler.dp_size, seed=1)
    return [index for index, _ in zip(again, range(sampler.taken), strict=False)]


def test_an_unknown_degree_is_exact_on_the_same_layout_and_refused_on_another() -> None:
    rows = rows_of([advanced(LookAlike(), count) for count in (1, 2)])
    loader = LookAlike()
    assert choose(rows, loader, rank=1, world=2)["_num_yielded"] == 2
    for rank, world, same_layout, found in ((0, 1, False, "2 ranks then, 1 now"), (0, 2, False, "cut differently")):
        with pytest.raises(MismatchError, match=found) as caught:
            choose(rows, loader, rank=rank, world=world, same_layout=same_layout)
        assert caught.value.kind == "loader-unknown" and "ckpt.Loader(" in str(caught.value)
    told = Loader(LookAlike(), dp_rank=0, dp_size=2)
    assert choose(rows, told, rank=0, world=2)["_num_yielded"] == 1
    with pytest.raises(MismatchError):
        choose(rows, told, rank=0, world=2, same_layout=False)
    known = rows_of([LookAlike(distributed(share, 2)) for share in range(2)])
    with pytest.raises(MismatchError):
        choose(known, loader, rank=0, world=4, same_layout=False)


def test_ranks_of_one_share_that_are_apart_are_refused() -> None:
    rows = rows_of([advanced(LookAlike(distributed(0, 1)), count) for count in (3, 3, 4)])
    with pytest.raises(MismatchError, match=r"ranks 0 and \[2\]") as caught:
        choose(rows, LookAlike(distributed(0, 1)), rank=0, world=3)
    assert caught.value.kind == "loader-disagrees"


def test_rows_that_miss_a_share_or_disagree_on_the_degree_are_refused() -> None:
    two = rows_of([ElasticSampler(9, dp_rank=share, dp_size=2) for share in range(2)])
    three = rows_of([ElasticSampler(9, dp_rank=share, dp_size=3) for share in range(3)])
    for rows, kind in ((three[:2], "loader-incomplete"), ([*two, three[2]], "loader-disagrees")):
        with pytest.raises(MismatchError) as caught:
            choose(rows, ElasticSampler(9), rank=0, world=1)
        assert caught.value.kind == kind
    with pytest.raises(DamagedError):
        choose([], ElasticSampler(9), rank=0, world=1)
    with pytest.raises(DamagedError):
        choose([LoaderRow(rank=0, dp_rank=5, dp_size=2, payload=b"1")], ElasticSampler(9), rank=0, world=1)


@pytest.mark.skipif(importlib.util.find_spec("torchdata") is None, reason="needs torchdata (pip install --no-deps)")
@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")  # torchdata 0.11 on torch 2.13
def test_the_real_stateful_data_loader_is_exact_at_its_degree_and_refused_at_another() -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    def make(rank: int, size: int) -> Any:
        sampler = StatefulDistributedSampler(range(40), num_replicas=size, rank=rank)  # type: ignore[arg-type]
        return StatefulDataLoader(list(range(40)), batch_size=3, sampler=sampler)

    assert is_loader(make(0, 2)) and dp_of(make(1, 2)) == (1, 2)
    undisturbed = [batch.tolist() for batch in make(1, 2)]
    saved = [advanced(make(share, 2), 3) for share in range(2)]
    rows = rows_of(saved)
    loader = make(1, 2)
    loader.load_state_dict(choose(rows, loader, rank=1, world=2))
    assert [batch.tolist() for batch in loader] == undisturbed[3:]
    with pytest.raises(MismatchError) as caught:
        choose(rows, make(0, 4), rank=0, world=4)
    assert caught.value.kind == "loader-degree" and "StatefulDataLoader" in caught.value.message
