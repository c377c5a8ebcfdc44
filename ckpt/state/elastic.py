"""A sampler and a loader that go on at any data-parallel degree without losing or repeating a sample.

In: the number of samples (or a data set), a seed, this rank's place. Out: indices (or batches), and a state that says
exactly what was delivered. No threads, no collectives. Never reads ahead of what it hands out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch.utils.data

from ckpt.errors import CheckpointError, DamagedError, InvalidInputError, MismatchError
from ckpt.format.objects import Tree
from ckpt.layout.box import Int64Array
from ckpt.state.deal import Deal, epoch_order
from ckpt.state.loader import check_dp

Tail = Literal["carry", "deal"]

_VERSION = 1
_ORDER = "sha256-splitmix64/1"
_BLOCK = 4096  # items looked up at once
_ORDERS_MAX = 2  # epochs whose order is held: a batch can have the end of one and the start of the next
SAMPLES_MAX = 2**48
SEED_MAX = 2**63
_POSITION_MAX = 2**61

_log = logging.getLogger("ckpt")


class ElasticSampler(torch.utils.data.Sampler[int]):
    """Indices of a data set, dealt to the data-parallel ranks; any other number of ranks can go on from its state.

    All epochs form one stream: epoch 0 in its seeded order, then epoch 1 in its own, and so on. Item j of the stream
    goes to rank j mod `dp_size`. Iterating goes on from where the state is, to the end of the running pass (epoch), and
    then `epoch` counts up. An item counts as delivered when the sampler yields it: below a `DataLoader` with workers,
    which fetches ahead, use `ElasticLoader` instead.

    Args:
        num_samples: of the data set.
        dp_rank, dp_size: this rank's place. Ranks of one tensor-, pipeline- or expert-parallel group share a dp rank.
        seed: of the order, 0 to 2^63 - 1. Loading a state takes over the saved seed.
        shuffle: False gives the natural order in every epoch.
        tail: what happens when the samples of an epoch do not divide by `dp_size`. "carry": every rank ends its pass
        after the same number of items, and the samples left over (fewer than `dp_size`) open the next pass. "deal": the
        pass ends with the epoch, so ranks may differ by one item (for evaluation; in training with collectives, ranks
        with less data would leave the others waiting).
    """

    def __init__(
        self,
        num_samples: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        tail: Tail = "carry",
    ) -> None:
        check_dp(dp_rank, dp_size)
        if type(num_samples) is not int or not 0 < num_samples < SAMPLES_MAX:
            raise InvalidInputError(f"num_samples must be a positive number, found {num_samples!r}")
        if type(seed) is not int or not 0 <= seed < SEED_MAX:
            raise InvalidInputError(f"seed must lie in 0 .. 2^63 - 1, found {seed!r}")
        if tail not in ("carry", "deal"):
            raise InvalidInputError(f"tail must be `carry` or `deal`, found {tail!r}")
        self.num_samples = num_samples
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.seed = seed
        self.shuffle = shuffle
        self.tail = tail
        self.epoch = 0  # the running pass, or the next one
        self.taken = 0  # items of this rank since the last change of the degree
        self._begin(Deal(left=np.empty(0, np.int64), next=0, dp_size=dp_size), 0, 0)

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        while self.epoch == epoch and self.taken < self._stop:
            index = self._lookup()
            self.taken += 1
            yield index
        if self.epoch == epoch:
            self.end_pass()

    def __len__(self) -> int:
        """Items that this rank still gets in the running pass."""
        return max(0, self._stop - self.taken)

    def __bool__(self) -> bool:
        return True

    def peek(self, num_items: int) -> list[int]:
        """The next items of the running pass, at most `num_items`, without taking them."""
        indices: list[int] = self._indices(self.taken, self.taken + min(num_items, len(self))).tolist()
        return indices

    def take(self, num_items: int) -> None:
        """Count the next items as delivered."""
        self.taken += num_items

    def end_pass(self) -> None:
        """Let the next pass begin."""
        self.epoch += 1
        self._stop = self._find_stop()

    def set_epoch(self, epoch: int) -> None:
        """Skip to the start of a later epoch; nothing for the running one (so the loop of DistributedSampler works).

        All ranks must call it alike. What was not delivered of the epochs before is skipped, with a warning. An earlier
        epoch is InvalidInputError: its samples were delivered already.
        """
        if epoch == self.epoch:
            return
        if epoch < self.epoch:
            raise InvalidInputError(
                f"epoch {epoch} was delivered already; the sampler is in epoch {self.epoch}",
                hints=("begin the loop at `sampler.epoch` after loading a checkpoint",),
            )
        _log.warning(
            "the sampler skips from epoch %d to epoch %d", self.epoch, epoch, extra={"event": "sampler-epoch-skipped"}
        )
        self._begin(Deal(left=np.empty(0, np.int64), next=epoch * self.num_samples, dp_size=self.dp_size), 0, epoch)

    def state_dict(self) -> dict[str, Tree]:
        """What was delivered, as a typed tree (docs/explanation/rng-and-loaders.md)."""
        return {
            "version": _VERSION,
            "order": _ORDER,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self.epoch,
            "dp_rank": self.dp_rank,
            "dp_size": self.dp_size,
            "taken": self.taken,
            "left": self._deal.left.copy(),
            "next": self._deal.next,
        }

    def load_state_dict(self, state: dict[str, Tree]) -> None:
        """Go on from a state of the same dp rank and degree; MismatchError for another (see `reshard_state`)."""
        self.check_state(state)
        self.seed, self.shuffle = state["seed"], state["shuffle"]
        deal = Deal(left=state["left"].copy(), next=state["next"], dp_size=self.dp_size)
        self._begin(deal, state["taken"], state["epoch"])

    def reshard_state(self, states: Sequence[dict[str, Tree]], *, dp_rank: int, dp_size: int) -> dict[str, Tree]:
        """The state of one rank of `dp_size`, out of the states of all saved dp ranks in their order. Changes nothing.

        What any saved rank delivered is delivered; all else is dealt anew in the order of the stream, however far apart
        the ranks were. When they were level, the global order goes on as if nothing had changed.
        """
        check_dp(dp_rank, dp_size)
        for state in states:
            self._check_data(state)
        _check_set(states)
        first = states[0]
        old = Deal(left=first["left"], next=first["next"], dp_size=len(states))
        deal = old.again([state["taken"] for state in states], dp_size)
        return {
            **first,
            "epoch": min(state["epoch"] for state in states),
            "dp_rank": dp_rank,
            "dp_size": dp_size,
            "taken": 0,
            "left": deal.left,
            "next": deal.next,
        }

    def check_state(self, state: Any) -> None:
        """Raise what `load_state_dict` would raise for a state of this rank. Changes nothing."""
        self._check_data(state)
        if (state["dp_rank"], state["dp_size"]) != (self.dp_rank, self.dp_size):
            raise MismatchError(
                f"the sampler is rank {self.dp_rank} of {self.dp_size}, the state is of rank {state['dp_rank']} of "
                f"{state['dp_size']}",
                kind="loader-degree",
                hints=("ckpt.load does this; by hand: reshard_state(states of all ranks, dp_rank=..., dp_size=...)",),
            )

    def _check_data(self, state: Any) -> None:
        _check_fields(state)
        if state["num_samples"] != self.num_samples:
            raise MismatchError(
                f"the data set has {self.num_samples} samples, the state is of one with {state['num_samples']}",
                kind="loader-samples",
                hints=("load with the data set of the save, or leave the loader out of the state",),
            )

    def _begin(self, deal: Deal, taken: int, epoch: int) -> None:
        self._deal, self.taken, self.epoch = deal, taken, epoch
        self._block = np.empty(0, np.int64)  # indices of the items from `_block_start` on
        self._block_start = taken
        self._orders: dict[int, Int64Array] = {}
        self._stop = self._find_stop()

    def _find_stop(self) -> int:
        """The number of items of this rank at which the running pass ends."""
        num_items = self._deal.count_below((self.epoch + 1) * self.num_samples)
        if self.tail == "carry":
            return num_items // self.dp_size
        return max(0, -(-(num_items - self.dp_rank) // self.dp_size))

    def _lookup(self) -> int:
        place = self.taken - self._block_start
        if not 0 <= place < len(self._block):
            self._block = self._indices(self.taken, min(self.taken + _BLOCK, self._stop))
            self._block_start, place = self.taken, 0
        return int(self._block[place])

    def _indices(self, start: int, stop: int) -> Int64Array:
        positions = self._deal.positions(self.dp_rank, start, stop)
        places = positions % self.num_samples
        if not self.shuffle:
            return places
        epochs = positions // self.num_samples
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            places[rows] = self._order(epoch)[places[rows]]
        return places

    def _order(self, epoch: int) -> Int64Array:
        if epoch not in self._orders:
            if len(self._orders) >= _ORDERS_MAX:
                del self._orders[min(self._orders)]
            self._orders[epoch] = epoch_order(self.num_samples, self.seed, epoch)
        return self._orders[epoch]


_FIELDS: dict[str, type] = {
    "version": int,
    "order": str,
    "num_samples": int,
    "seed": int,
    "shuffle": bool,
    "epoch": int,
    "dp_rank": int,
    "dp_size": int,
    "taken": int,
    "left": np.ndarray,
    "next": int,
}


def _check_fields(state: Any) -> None:
    """Raise DamagedError for what is no state of an ElasticSampler, and for numbers that contradict each other."""
    if not isinstance(state, dict) or set(state) != set(_FIELDS):
        raise DamagedError(f"not a state of an ElasticSampler: expected the fields {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if type(state[name]) is not kind:
            raise DamagedError(
                f"sampler state: `{name}` must be a `{kind.__name__}`, found `{type(state[name]).__name__}`"
            )
    if state["version"] != _VERSION or state["order"] != _ORDER:
        raise DamagedError(
            f"sampler state: expected version {_VERSION}, order {_ORDER}, found {state['version']}, {state['order']!r}",
            hints=("a newer ckpt may have written it",),
        )
    left, num_samples = state["left"], state["num_samples"]
    if not (
        0 < num_samples < SAMPLES_MAX
        and 0 <= state["seed"] < SEED_MAX
        and 0 <= state["dp_rank"] < state["dp_size"]
        and 0 <= state["epoch"] * num_samples < _POSITION_MAX
        and 0 <= state["next"] < _POSITION_MAX
        and 0 <= state["taken"] * state["dp_size"] < _POSITION_MAX
        and left.dtype == np.int64
        and left.ndim == 1
        and bool(np.all(np.diff(left, prepend=-1, append=state["next"]) > 0))
    ):
        raise DamagedError("sampler state: its numbers contradict each other")


def _check_set(states: Sequence[dict[str, Tree]]) -> None:
    """The states must be those of all ranks of one deal."""
    for dp_rank, state in enumerate(states):
        if (state["dp_rank"], state["dp_size"]) != (dp_rank, len(states)):
            raise MismatchError(
                f"state {dp_rank} of {len(states)} is of rank {state['dp_rank']} of {state['dp_size']}",
                kind="loader-incomplete",
            )
        for name in ("seed", "shuffle", "next"):
            if state[name] != states[0][name]:
                raise _disagree(name, dp_rank, states[0][name], state[name])
        if not np.array_equal(state["left"], states[0]["left"]):
            raise _disagree("left", dp_rank, states[0]["left"], state["left"])


def _disagree(name: str, dp_rank: int, expected: object, found: object) -> CheckpointError:
    return MismatchError(
        f"the samplers of dp ranks 0 and {dp_rank} do not share one stream: `{name}` is {expected} and {found}",
        kind="loader-disagrees",
        hints=("all ranks must give the same seed and call set_epoch alike",),
    )


class ElasticLoader:
    """Batches of a map-style data set, with the promise of `ElasticSampler`; fetched in this process, when asked for.

    A sample counts as delivered when its batch is returned: an error of the data set leaves the state at the batch
    before. One thread uses it. Iterating goes on from where the state is, to the end of the running pass.

    Args:
        dataset: has `__len__` and `__getitem__`.
        batch_size: samples per rank and batch. May change from one run to the next.
        dp_rank, dp_size, seed, shuffle: as for ElasticSampler.
        tail: "carry": only full batches, the same number on every rank; the samples left over open the next pass.
        "deal": the pass ends with the epoch; its last batch may be short, or missing on some ranks.
        collate_fn: makes a batch of a list of samples; torch's default_collate if None.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        tail: Tail = "carry",
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise InvalidInputError(f"batch_size must be a positive number, found {batch_size!r}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.collate_fn = collate_fn or torch.utils.data.default_collate
        self.sampler = ElasticSampler(
            len(dataset), dp_rank=dp_rank, dp_size=dp_size, seed=seed, shuffle=shuffle, tail=tail
        )
        self.dp_rank = dp_rank
        self.dp_size = dp_size

    @property
    def epoch(self) -> int:
        """The running pass, or the next one."""
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """As ElasticSampler.set_epoch."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Tree]:
        """The state of the sampler: which samples were delivered."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Tree]) -> None:
        """As ElasticSampler.load_state_dict."""
        self.sampler.load_state_dict(state)

    def check_state(self, state: Any) -> None:
        """As ElasticSampler.check_state."""
        self.sampler.check_state(state)

    def reshard_state(self, states: Sequence[dict[str, Tree]], *, dp_rank: int, dp_size: int) -> dict[str, Tree]:
        """As ElasticSampler.reshard_state."""
        return self.sampler.reshard_state(states, dp_rank=dp_rank, dp_size=dp_size)

    def __iter__(self) -> Iterator[Any]:
        epoch = self.sampler.epoch
        while self.sampler.epoch == epoch:
            indices = self.sampler.peek(self.batch_size)
            if not indices or (self.sampler.tail == "carry" and len(indices) < self.batch_size):
                self.sampler.end_pass()
                return
            batch = self.collate_fn([self.dataset[index] for index in indices])
            self.sampler.take(len(indices))
            yield batch

    def __len__(self) -> int:
        """Batches that this rank still gets in the running pass."""
        full, rest = divmod(len(self.sampler), self.batch_size)
        return full + (1 if rest and self.sampler.tail == "deal" else 0)

    def __bool__(self) -> bool:
        return True
