"""Data-loader state: which saved state a loader goes on with, so that no sample is lost or repeated, or why it cannot.

In: the saved rows of all ranks and the loader of this rank. Out: the state for its `load_state_dict`. Never guesses:
what is not known to be exact is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ckpt.state.inline  # noqa: F401  (loader states hold small tensors)
from ckpt.errors import DamagedError, InvalidInputError, MismatchError
from ckpt.format.objects import Tree, decode


@dataclass(frozen=True, kw_only=True)
class LoaderRow:
    """What one saved rank stored of a loader."""

    rank: int
    dp_rank: int  # -1: not known
    dp_size: int  # -1: not known
    payload: bytes  # ckpt.format.objects


class Loader:
    """A data loader together with its place among the data-parallel ranks, for loaders that do not tell it.

    Iterates, saves and loads as the loader that it wraps; every other attribute is that loader's.

    Args:
        loader: anything with `__iter__`, `state_dict` and `load_state_dict`.
        dp_rank: which share of the data this rank reads, from 0.
        dp_size: into how many shares the data are cut.
    """

    def __init__(self, loader: Any, *, dp_rank: int, dp_size: int) -> None:
        if not is_loader(loader):
            raise InvalidInputError(
                f"a `{type(loader).__name__}` is no stateful loader; expected __iter__, state_dict and load_state_dict",
                hints=(
                    "torchdata's StatefulDataLoader has them, and so have ckpt.ElasticLoader and ckpt.ElasticSampler",
                ),
            )
        check_dp(dp_rank, dp_size)
        self.loader = loader
        self.dp_rank = dp_rank
        self.dp_size = dp_size

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet: while being unpickled or copied
            raise AttributeError(name)
        return getattr(self.loader, name)


def is_loader(obj: Any) -> bool:
    """True for a loader or a sampler with a state: it iterates and has `state_dict` and `load_state_dict`.

    Modules that are containers of others look the same; they are none.
    """
    methods = ("__iter__", "state_dict", "load_state_dict")
    return not isinstance(obj, (type, torch.nn.Module)) and all(callable(getattr(obj, name, None)) for name in methods)


def dp_of(obj: Any) -> tuple[int, int] | None:
    """(dp_rank, dp_size) of a loader, None when it does not tell.

    Looked for on the loader, its `sampler`, its `batch_sampler` and the `sampler` of that, in this order: as `dp_rank`
    and `dp_size`, or as `rank` and `num_replicas` (torch's DistributedSampler).
    """
    batch_sampler = getattr(obj, "batch_sampler", None)
    for place in (obj, getattr(obj, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        for rank_name, size_name in (("dp_rank", "dp_size"), ("rank", "num_replicas")):
            rank, size = getattr(place, rank_name, None), getattr(place, size_name, None)
            if type(rank) is int and type(size) is int:
                check_dp(rank, size)
                return rank, size
    return None


def check_dp(dp_rank: int, dp_size: int) -> None:
    """Raise InvalidInputError unless `0 <= dp_rank < dp_size`."""
    if type(dp_rank) is not int or type(dp_size) is not int or not 0 <= dp_rank < dp_size:
        raise InvalidInputError(f"data-parallel rank {dp_rank!r} of {dp_size!r} does not exist")


def choose_state(
    rows: Sequence[LoaderRow], *, loader: Any, name: str, rank: int, world: int, same_layout: bool
) -> Tree:
    """The state that `loader` of this rank loads, out of the saved rows of all ranks. Changes nothing.

    The same data-parallel degree: the state of the same dp rank. Another degree: what `loader.reshard_state` makes of
    the states of all saved dp ranks. Degree not known, then or now: the state of the same rank, if world and layout are
    those of the save. Everything else is MismatchError, with what to do.

    Args:
        rows: one per saved rank that had the loader.
        loader: of this rank.
        name: its state key, for messages.
        rank: of this process, now.
        world: number of ranks, now.
        same_layout: whether the ranks are cut as they were at the save (mesh and placements).
    """
    if not rows:
        raise DamagedError(f"object `{name}` has no rows")
    tree = _choose(rows, loader, name, rank, world, same_layout)
    check = getattr(loader, "check_state", None)
    if callable(check):
        check(tree)
    return tree


def _choose(rows: Sequence[LoaderRow], loader: Any, name: str, rank: int, world: int, same_layout: bool) -> Tree:
    now, saved_size = dp_of(loader), _saved_dp_size(rows, name)
    if now is None or saved_size is None:
        return _same_rank(rows, loader, name, rank, world, same_layout)
    dp_rank, dp_size = now
    if dp_size == saved_size:
        return decode(_payload_of(rows, dp_rank, name), name=name)
    reshard = getattr(loader, "reshard_state", None)
    if not callable(reshard):
        raise _refuse_degree(loader, name, saved_size, dp_size)
    states = [decode(_payload_of(rows, saved_rank, name), name=name) for saved_rank in range(saved_size)]
    return reshard(states, dp_rank=dp_rank, dp_size=dp_size)


def _saved_dp_size(rows: Sequence[LoaderRow], name: str) -> int | None:
    """The one degree that all rows tell, None when none tells."""
    sizes = sorted({row.dp_size for row in rows})
    if len(sizes) > 1:
        raise MismatchError(
            f"loader `{name}`: the saved ranks tell different data-parallel degrees: {sizes} (-1: not told)",
            kind="loader-disagrees",
        )
    if sizes[0] < 1:
        return None
    if any(not 0 <= row.dp_rank < row.dp_size for row in rows):
        raise DamagedError(f"object `{name}` has a data-parallel rank outside its degree {sizes[0]}")
    return sizes[0]


def _payload_of(rows: Sequence[LoaderRow], dp_rank: int, name: str) -> bytes:
    """The state on which all saved ranks of one dp rank agree."""
    group = [row for row in rows if row.dp_rank == dp_rank]
    if not group:
        raise MismatchError(
            f"loader `{name}`: no saved rank read share {dp_rank} of {rows[0].dp_size}", kind="loader-incomplete"
        )
    payload = group[0].payload.rstrip(b" ")  # an image pads objects with spaces
    differing = [row.rank for row in group if row.payload.rstrip(b" ") != payload]
    if differing:
        raise MismatchError(
            f"loader `{name}`: ranks {group[0].rank} and {differing} read the same share {dp_rank} of "
            f"{rows[0].dp_size} but were at different places in it when saved",
            kind="loader-disagrees",
            hints=("ranks that differ only in tensor, pipeline or expert coordinates must take the same batches",),
        )
    return payload


def _same_rank(rows: Sequence[LoaderRow], loader: Any, name: str, rank: int, world: int, same_layout: bool) -> Tree:
    own = [row for row in rows if row.rank == rank]
    if same_layout and len(rows) == world and len(own) == 1:
        return decode(own[0].payload, name=name)
    what = f"{len(rows)} ranks then, {world} now" if len(rows) != world else "the ranks are cut differently now"
    raise MismatchError(
        f"loader `{name}` (`{type(loader).__name__}`) does not tell its data-parallel rank, and the run changed "
        f"({what}): which samples were read cannot be known",
        kind="loader-unknown",
        hints=(
            "load on the layout of the save, once, with the loader wrapped there: "
            "ckpt.Loader(loader, dp_rank=..., dp_size=...), and save again",
            _LEAVE_OUT.format(name=name),
        ),
    )


def _refuse_degree(loader: Any, name: str, saved: int, now: int) -> MismatchError:
    inner = loader.loader if isinstance(loader, Loader) else loader
    return MismatchError(
        f"loader `{name}` was saved at data-parallel degree {saved}, now it is {now}, and a `{type(inner).__name__}` "
        "cannot split or merge its state: samples would be lost or repeated",
        kind="loader-degree",
        hints=(
            f"load at data-parallel degree {saved}",
            "use ckpt.ElasticLoader or ckpt.ElasticSampler: they go on at any degree",
            "or give the loader a method reshard_state(states, *, dp_rank, dp_size) that returns the state of one rank",
            _LEAVE_OUT.format(name=name),
        ),
    )


_LEAVE_OUT = "or leave `{name}` out of the state that is loaded: the data then begin anew"
