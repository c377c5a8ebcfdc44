"""The fence: training waits for copies before it changes what is being copied, and at no other time.

In: optimizers, and what else changes only when they step. Out: a hook before every step: it waits until the copies of that
optimizer's tensors are over. On CUDA its stream waits for an event, not the host. Tensors that no optimizer guards are
copied before a save returns, so that whatever nobody told us of cannot go wrong.

`Checkpointer` attaches the optimizers in its state. An optimizer is attached once, however often it is asked. Called on the
thread that trains; stagings are added and leave on any thread.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckpt.errors import InvalidInputError
from ckpt.format.spec import LocalState
from ckpt.state.fenced import fenced_tensors, storages_of

Storages = NDArray[np.uint64]  # where torch storages begin, which is how pieces and tensors are matched


class Waiting(Protocol):
    """A staging, as the fence sees it."""

    @property
    def copied(self) -> bool: ...

    def hold(self, storages: Storages | None) -> None:
        """Return when everything in `storages` (all of it when None) is copied, or bound to be in time."""


@dataclass(eq=False)
class _Guard:
    optimizer: weakref.ref[Optimizer]
    also: list[Any] = field(default_factory=list)  # weak references to modules and tensors
    handle: Any = None  # of the hook on its `load_state_dict`
    turn: int = 0  # when it stepped last, counted over all optimizers

    def tensors(self) -> list[torch.Tensor]:
        """Everything that changes when the optimizer steps."""
        optimizer = self.optimizer()
        found = [] if optimizer is None else fenced_tensors([optimizer])
        for reference in self.also:
            owner = reference()
            found += [] if owner is None else _tensors_in(owner)
        return found

    def storages(self) -> Storages:
        """Where it lies, ascending."""
        return np.array(sorted(storages_of(self.tensors())), np.uint64)


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """What of a state fences guard. A storage that anything else of the state lies in as well is not guarded at all."""

    turns: list[Storages]  # by optimizer, in the order in which they stepped last; ascending
    tensors: list[torch.Tensor]  # plain or local ones
    storage: Storages  # of each of the tensors


NOTHING = Guarded(turns=[], tensors=[], storage=np.empty(0, np.uint64))

_guards: weakref.WeakKeyDictionary[Optimizer, _Guard] = weakref.WeakKeyDictionary()
_waiting: list[Waiting] = []
_lock = threading.Lock()
_MAY_HOLD = (Optimizer, dict, list, tuple)  # an optimizer, or one inside
_turns = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Attached:
    """What `attach` did. `detach()` takes it back; tensors are then copied before a save returns."""

    optimizers: tuple[Optimizer, ...]

    def detach(self) -> None:
        for optimizer in self.optimizers:
            guard = _guards.pop(optimizer, None)
            if guard is not None and guard.handle is not None:
                guard.handle.remove()
        fence()


def attach(*optimizers: Optimizer, also: Iterable[nn.Module | torch.Tensor] = ()) -> Attached:
    """Let saves copy the tensors of these optimizers while training goes on, until just before their next step.

    Works with every `torch.optim.Optimizer`: for-loop, foreach, fused and capturable ones, ones that step inside backward
    (attach each), and with gradient accumulation. `Checkpointer.step` attaches the optimizers in its state by itself.

    Args:
        also: modules and tensors that are changed only after one of these optimizers has begun its step (an exponential
            moving average of the weights), or after a call of `ckpt.fence()`, or never (frozen weights). They are then copied
            late, too. Buffers of a module that a forward changes do not belong here.

    A step that is replayed from a CUDA graph runs no hooks: call `ckpt.fence()` before each replay.

    Raises:
        InvalidInputError: not an optimizer.
    """
    owners = list(also)
    _watch_all_steps()
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise InvalidInputError(
                f"attach expects torch.optim.Optimizer objects, found {type(optimizer).__name__}",
                hints=("what changes together with an optimizer goes into `also=`",),
            )
        guard = _guards.get(optimizer)
        if guard is None:
            guard = _guards[optimizer] = _Guard(optimizer=weakref.ref(optimizer))
            if hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):  # wrappers of optimizers may be made without
                guard.handle = optimizer.register_load_state_dict_pre_hook(_before_load)
        known = {id(reference()) for reference in guard.also}
        guard.also += [weakref.ref(owner) for owner in owners if id(owner) not in known]
    return Attached(optimizers=tuple(optimizers))


def fence() -> None:
    """Wait until nothing is being copied: call it before changing saved tensors other than by an attached optimizer.

    On CUDA the current stream waits, not the host. Returns at once when no copy is on its way.
    """
    for one in _on_their_way():
        one.hold(None)


def guarded(local: LocalState) -> Guarded:
    """What fences guard of a state that was just collected; nothing where its tensors are not known one by one."""
    guards = sorted(_guards.values(), key=lambda guard: guard.turn)
    tensors, parts, starts = local.seen() if guards else ((), (), ())
    if not tensors:
        return NOTHING
    ids, storage = _ids(tensors), np.array(starts, np.uint64)
    turns = [lies_in(ids, np.sort(_ids(guard.tensors()))) for guard in guards]
    free = np.unique(storage[~np.any(turns, axis=0)])
    late = (storage != 0) & ~lies_in(storage, free)
    return Guarded(
        turns=[np.unique(storage[turn & late]) for turn in turns],
        tensors=list(itertools.compress(parts, late.tolist())),
        storage=storage[late],
    )


def _ids(tensors: Sequence[torch.Tensor]) -> NDArray[np.uint64]:
    return np.fromiter(map(id, tensors), np.uint64, len(tensors))


def lies_in(storage: Storages, storages: Storages) -> NDArray[np.bool_]:
    """[N] which of `storage` are among the ascending `storages`."""
    if not len(storages):
        return np.zeros(len(storage), bool)
    at = np.minimum(np.searchsorted(storages, storage), len(storages) - 1)
    out: NDArray[np.bool_] = storages[at] == storage
    return out


def add(one: Waiting) -> None:
    """From now on the fences hold for this staging, until everything of it is copied."""
    with _lock:
        _waiting[:] = [other for other in _waiting if not other.copied] + [one]


def find_optimizers(state: Any) -> Iterator[Optimizer]:
    """The optimizers in a user's state: values, and those inside lists, tuples and dicts."""
    if isinstance(state, Optimizer):
        yield state
    elif isinstance(state, dict | list | tuple):
        values = list(state.values()) if isinstance(state, dict) else state
        if any(issubclass(kind, _MAY_HOLD) for kind in set(map(type, values))):
            for value in values:
                yield from find_optimizers(value)


def _on_their_way() -> list[Waiting]:
    if not _waiting:  # the usual case, at every step of the training
        return []
    with _lock:
        _waiting[:] = [one for one in _waiting if not one.copied]
        return list(_waiting)


@functools.cache
def _watch_all_steps() -> None:
    """Hold every optimizer of the process, also one that nobody attached: it may be made anew over the same parameters."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    guard = _guards.get(optimizer)
    if guard is not None:
        guard.turn = next(_turns)
    waiting = _on_their_way()
    if not waiting:
        return
    storages = None if guard is None or len(_guards) == 1 else guard.storages()
    for one in waiting:
        one.hold(storages)


def _before_load(optimizer: Optimizer, *_: Any) -> None:
    for one in _on_their_way():
        one.hold(None)


def _tensors_in(owner: Any) -> list[torch.Tensor]:
    return [*owner.parameters(), *owner.buffers()] if isinstance(owner, nn.Module) else [owner]


def _forget_in_child() -> None:
    """A forked process has no thread that copies: nothing that its parent has on its way may hold it."""
    _waiting.clear()


os.register_at_fork(after_in_child=_forget_in_child)
