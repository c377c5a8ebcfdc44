"""Goal: whatever the number of data-parallel ranks does, and however far apart they are, no sample is lost or repeated.

Method: hypothesis draws phases of (degree, progress of each rank); everything that was delivered is compared with the
stream itself, computed here by a plain list; the same degree is compared with an undisturbed run.
"""

from __future__ import annotations

import collections
import hashlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ckpt.errors import DamagedError, InvalidInputError, MismatchError
from ckpt.format.objects import decode, encode
from ckpt.state.deal import epoch_order
from ckpt.state.elastic import ElasticLoader, ElasticSampler


def through_bytes(state: Any) -> Any:
    return decode(encode(state, name="loader"), name="loader")


def begin(num_samples: int, size: int, **options: Any) -> list[ElasticSampler]:
    return [ElasticSampler(num_samples, dp_rank=rank, dp_size=size, **options) for rank in range(size)]


def reshard(samplers: list[ElasticSampler], size: int, **options: Any) -> list[ElasticSampler]:
    """What a load does: every rank of the new degree makes its state of all saved ones."""
    states = [through_bytes(sampler.state_dict()) for sampler in samplers]
    new = begin(samplers[0].num_samples, size, **options)
    for rank, sampler in enumerate(new):
        sampler.load_state_dict(through_bytes(sampler.reshard_state(states, dp_rank=rank, dp_size=size)))
    return new


def advance(sampler: ElasticSampler, count: int) -> list[int]:
    """The next `count` items, over as many passes as it takes."""
    out: list[int] = []
    for _ in range(1000):
        for index in sampler:
            if len(out) == count:
                raise AssertionError("took one too many")
            out.append(index)
            if len(out) == count:
                return out
        if count == 0:
            return out
    raise AssertionError("the sampler gives nothing")


def stream(num_samples: int, seed: int, num_epochs: int) -> list[int]:
    return [index for epoch in range(num_epochs) for index in epoch_order(num_samples, seed, epoch).tolist()]


def take(sampler: ElasticSampler, count: int) -> list[int]:
    return advance(sampler, count) if count else []


phases = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.integers(0, 9), min_size=5, max_size=5)), min_size=1, max_size=6
)


@settings(max_examples=200, deadline=None)
@given(phases, st.integers(1, 17) | st.just(500), st.integers(0, 3), st.sampled_from(["carry", "deal"]))
def test_nothing_is_lost_or_repeated_whatever_the_ranks_do(phases: Any, num_samples: int, seed: int, tail: Any) -> None:
    delivered: collections.Counter[int] = collections.Counter()
    samplers = begin(num_samples, phases[0][0], seed=seed, tail=tail)
    for size, progress in phases:
        samplers = reshard(samplers, size, tail=tail)
        for sampler, count in zip(samplers, progress[:size], strict=True):
            delivered.update(take(sampler, count))
    # Level the ranks on one rank: it must get exactly what nobody had, up to the end of some epoch.
    [last] = reshard(samplers, 1, tail=tail)
    farthest = sum(size * max(progress[:size]) for size, progress in phases)  # no position from here on was dealt
    num_epochs = farthest // num_samples + 1
    delivered.update(take(last, num_epochs * num_samples - sum(delivered.values())))
    assert delivered == {index: num_epochs for index in range(num_samples)}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=6), st.integers(1, 17))
def test_level_ranks_keep_the_global_order_at_any_degree(phases: Any, num_samples: int) -> None:
    samplers = begin(num_samples, phases[0][0], seed=5)
    order: list[int] = []
    for size, count in phases:
        samplers = reshard(samplers, size)
        columns = [take(sampler, count) for sampler in samplers]
        order += [index for row in zip(*columns, strict=True) for index in row]
    assert order == stream(num_samples, 5, len(order) // num_samples + 1)[: len(order)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.lists(st.integers(0, 12), min_size=1, max_size=4), st.booleans())
def test_the_same_degree_goes_on_bit_equal_with_an_undisturbed_run(
    size: int, num_samples: int, stops: list[int], shuffle: bool
) -> None:
    for rank in range(size):
        make = lambda: ElasticSampler(num_samples, dp_rank=rank, dp_size=size, seed=9, shuffle=shuffle)  # noqa: B023, E731
        undisturbed, sampler, got = make(), make(), []
        for count in stops:
            got += take(sampler, count)
            state = through_bytes(sampler.state_dict())
            sampler = make()
            sampler.load_state_dict(state)
        assert got == take(undisturbed, len(got))
        assert list(sampler) == list(undisturbed) and sampler.epoch == undisturbed.epoch


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_carry_gives_every_rank_the_same_number_and_loses_nothing(size: int) -> None:
    samplers = begin(10, size)
    passes = [[list(sampler) for sampler in samplers] for _ in range(size)]
    assert all(len({len(items) for items in one}) == 1 for one in passes)
    delivered = collections.Counter(index for one in passes for items in one for index in items)
    assert delivered == dict.fromkeys(range(10), size)  # `size` passes are whole epochs: 10 * size divides by size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 11, 13])
def test_deal_ends_each_pass_with_the_epoch(size: int) -> None:
    samplers = begin(11, size, tail="deal")
    for epoch in range(3):
        items = [list(sampler) for sampler in samplers]
        assert sorted(sum(items, [])) == list(range(11))
        assert max(map(len, items)) - min(map(len, items)) <= 1
        assert {sampler.epoch for sampler in samplers} == {epoch + 1}


def test_the_order_is_the_documented_one() -> None:
    digest = hashlib.sha256(b"ckpt.order/1" + (3).to_bytes(8, "little") + (2).to_bytes(8, "little")).digest()

    def key(index: int) -> int:
        mask = 2**64 - 1
        z = (int.from_bytes(digest[:8], "little") + (index + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert epoch_order(50, 3, 2).tolist() == sorted(range(50), key=key)


def test_epochs_and_seeds_differ_and_look_shuffled() -> None:
    orders = [tuple(epoch_order(1000, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    for order in orders:
        assert sorted(order) == list(range(1000))
        assert abs(np.corrcoef(np.arange(1000), order)[0, 1]) < 0.12


def test_a_state_at_the_end_of_a_pass_does_not_repeat_it() -> None:
    sampler = ElasticSampler(6)
    items = [index for _, index in zip(range(6), sampler, strict=False)]
    assert sorted(items) == list(range(6))
    after = ElasticSampler(6)
    after.load_state_dict(sampler.state_dict())
    after.set_epoch(after.epoch)  # the loop of DistributedSampler, from the saved epoch on
    assert list(after) == [] and after.epoch == 1
    assert sorted(after) == list(range(6))


def test_ranks_in_different_epochs_go_on_in_the_earlier_one() -> None:
    ahead, behind = begin(10, 2, seed=1)
    take(behind, 2)
    head = take(ahead, 7)
    assert (ahead.epoch, behind.epoch) == (1, 0)
    [one] = reshard([ahead, behind], 1, tail="deal")
    assert one.epoch == 0
    rest = list(one)  # what the slow rank had not yet read of epoch 0
    assert rest == stream(10, 1, 1)[5::2] and one.epoch == 1
    assert sorted(head[5:] + list(one)) == list(range(10))


def test_set_epoch_goes_forward_only(caplog: pytest.LogCaptureFixture) -> None:
    sampler = ElasticSampler(6, seed=2)
    sampler.set_epoch(0)
    assert len(list(sampler)) == 6
    sampler.set_epoch(1)
    assert not caplog.records
    next(iter(sampler))
    sampler.set_epoch(3)
    assert [record.__dict__["event"] for record in caplog.records] == ["sampler-epoch-skipped"]
    assert list(sampler) == epoch_order(6, 2, 3).tolist()
    with pytest.raises(InvalidInputError):
        sampler.set_epoch(1)


def test_a_state_taken_while_iterating_counts_what_was_yielded() -> None:
    sampler = ElasticSampler(9, seed=1)
    items = iter(sampler)
    first = [next(items) for _ in range(4)]
    state = sampler.state_dict()
    rest = list(items)
    again = ElasticSampler(9, seed=1)
    again.load_state_dict(state)
    assert list(again) == rest and sorted(first + rest) == list(range(9))


def test_loading_takes_over_the_saved_seed() -> None:
    sampler = ElasticSampler(20, seed=4)
    head = take(sampler, 5)
    other = ElasticSampler(20, seed=77, shuffle=False)
    other.load_state_dict(sampler.state_dict())
    assert head + list(other) == epoch_order(20, 4, 0).tolist()


def test_states_that_do_not_belong_together_are_refused() -> None:
    states = [sampler.state_dict() for sampler in begin(10, 3, seed=1)]
    target = ElasticSampler(10, dp_rank=0, dp_size=2)
    skipped = ElasticSampler(10, dp_rank=1, dp_size=3, seed=1)
    skipped.set_epoch(2)
    for bad, kind in (
        (states[:2], "loader-incomplete"),
        (states[::-1], "loader-incomplete"),
        ([states[0], {**states[1], "seed": 2}, states[2]], "loader-disagrees"),
        ([states[0], skipped.state_dict(), states[2]], "loader-disagrees"),
    ):
        with pytest.raises(MismatchError) as caught:
            target.reshard_state(bad, dp_rank=0, dp_size=2)
        assert caught.value.kind == kind
    with pytest.raises(MismatchError) as caught:
        target.load_state_dict(states[0])
    assert caught.value.kind == "loader-degree"
    with pytest.raises(MismatchError) as caught:
        ElasticSampler(11, dp_size=3).load_state_dict(states[0])
    assert caught.value.kind == "loader-samples"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("order", "other"),
        ("taken", -1),
        ("taken", 2**62),
        ("taken", True),
        ("next", -1),
        ("next", 2**63),
        ("epoch", 2**60),
        ("seed", 2**63),
        ("dp_rank", 1),
        ("dp_size", 0),
        ("left", np.array([3, 3])),
        ("left", [1]),
        ("left", np.array([-1])),
        ("left", np.array([100])),
        ("left", np.array([1.0])),
        ("num_samples", 0),
        ("extra", 1),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(field: str, value: Any) -> None:
    sampler = ElasticSampler(10)
    take(sampler, 3)
    before = encode(sampler.state_dict(), name="x")
    state = {**sampler.state_dict(), "next": 5, field: value}
    with pytest.raises(DamagedError):
        sampler.load_state_dict(state)
    assert encode(sampler.state_dict(), name="x") == before


def test_ranks_very_far_apart_are_refused_before_memory_is_gone() -> None:
    states = [{**sampler.state_dict(), "taken": taken} for sampler, taken in zip(begin(10, 2), (0, 2**40), strict=True)]
    with pytest.raises(InvalidInputError):
        ElasticSampler(10).reshard_state(states, dp_rank=0, dp_size=1)


@pytest.mark.parametrize("options", [{"dp_rank": 1}, {"dp_size": 0}, {"seed": -1}, {"seed": 0.5}, {"tail": "pad"}])
def test_bad_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        ElasticSampler(10, **options)
    with pytest.raises(InvalidInputError):
        ElasticSampler(0)
    with pytest.raises(InvalidInputError):
        ElasticLoader([1], batch_size=0)


# below torch's DataLoader, and ElasticLoader


def test_below_a_data_loader_a_checkpoint_between_batches_is_exact() -> None:
    data = torch.arange(23)
    batches = [batch.tolist() for _ in range(2) for batch in DataLoader(data, batch_size=4, sampler=ElasticSampler(23))]  # type: ignore[arg-type]
    sampler = ElasticSampler(23)
    got = []
    for batch in DataLoader(data, batch_size=4, sampler=sampler):  # type: ignore[arg-type]
        got.append(batch.tolist())
        if len(got) == 3:
            break
    new = ElasticSampler(23)
    new.load_state_dict(through_bytes(sampler.state_dict()))
    loader = DataLoader(data, batch_size=4, sampler=new)  # type: ignore[arg-type]
    assert len(loader) == 3
    got += [batch.tolist() for batch in loader]
    assert got == batches[:6] and sorted(sum(got, [])) == list(range(23))


def loaders(size: int, batch_size: int, data: Any = None, **options: Any) -> list[ElasticLoader]:
    data = range(40) if data is None else data
    return [
        ElasticLoader(data, batch_size=batch_size, dp_rank=rank, dp_size=size, seed=3, collate_fn=list, **options)
        for rank in range(size)
    ]


def test_global_batches_stay_the_same_sets_when_the_degree_changes() -> None:
    def global_batches(ranks: list[ElasticLoader], count: int) -> list[set[int]]:
        return [set().union(*(next(iter(loader)) for loader in ranks)) for _ in range(count)]

    expected = global_batches(loaders(4, 2), 5)
    old = loaders(4, 2)
    got = global_batches(old, 2)
    new = loaders(2, 4)
    states = [through_bytes(loader.state_dict()) for loader in old]
    for loader in new:
        loader.load_state_dict(loader.reshard_state(states, dp_rank=loader.dp_rank, dp_size=2))
    assert got + global_batches(new, 3) == expected


def test_a_loader_gives_full_batches_of_equal_number_and_carries_the_rest() -> None:
    ranks = loaders(3, 4)  # 12 of 40 a step: 3 steps, 4 samples carried; then 44: 3 steps, 8 carried; then 48: 4 steps
    assert [len(loader) for loader in ranks] == [3, 3, 3]
    passes = [[list(loader) for loader in ranks] for _ in range(3)]
    assert [[len(batches) for batches in one] for one in passes] == [[3] * 3, [3] * 3, [4] * 3]
    delivered = collections.Counter(index for one in passes for rank in one for batch in rank for index in batch)
    assert delivered == dict.fromkeys(range(40), 3)


def test_a_loader_that_deals_gives_each_sample_once_per_pass() -> None:
    ranks = loaders(3, 4, tail="deal")
    lengths = [len(loader) for loader in ranks]
    batches = [list(loader) for loader in ranks]
    assert [len(one) for one in batches] == lengths
    assert sorted(index for one in batches for batch in one for index in batch) == list(range(40))


def test_an_error_of_the_data_set_leaves_the_state_at_the_batch_before() -> None:
    class Flaky:
        fail = True

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> int:
            if self.fail and index == broken:
                raise OSError("disk")
            return index

    data = Flaky()
    broken = epoch_order(8, 3, 0).tolist()[5]
    [loader] = loaders(1, 4, data)
    got = []
    with pytest.raises(OSError, match="disk"):
        got.extend(loader)
    assert len(got) == 1 and loader.sampler.taken == 4
    data.fail = False
    got.extend(loader)
    assert sum(got, []) == epoch_order(8, 3, 0).tolist()


def test_the_default_collate_makes_tensors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [batch] = ElasticLoader([(torch.ones(2), 1)] * 3, batch_size=3)
    assert batch[0].shape == (3, 2) and batch[1].tolist() == [1, 1, 1]
