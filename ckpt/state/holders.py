"""What every kind of thing in a state offers to a save and to a load.

In: nothing. Out: the `Holder` protocol and its records. Pure.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ckpt.format.spec import StoredObject, TensorSpec
from ckpt.state.rows import Rows
from ckpt.state.tensors import Part

Action = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a holder puts into a checkpoint."""

    parts: list[Part] = field(default_factory=list)
    objects: list[StoredObject] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a holder wants from a checkpoint."""

    parts: list[Part] = field(default_factory=list)  # writable memory, possibly not yet the user's
    objects: list[str] = field(default_factory=list)
    prepare: Callable[[Rows], list[Action]] = lambda rows: []  # checks rows, changes nothing; the actions install


@dataclass(frozen=True, kw_only=True)
class StoredTensors:
    """The tensors of a checkpoint by name, aliases included."""

    by_name: Mapping[str, TensorSpec]
    names: Sequence[str]  # of `by_name`, sorted

    @staticmethod
    def build(specs: Sequence[TensorSpec]) -> StoredTensors:
        """From the specs of a checkpoint."""
        by_name = {spec.name: spec for spec in specs}
        by_name.update((name, spec) for spec in specs for name in spec.aliases)
        return StoredTensors(by_name=by_name, names=sorted(by_name))

    def below(self, prefix: str) -> list[tuple[str, TensorSpec]]:
        """(rest of the name, spec) of all tensors whose name begins with `prefix`, sorted."""
        start = bisect.bisect_left(self.names, prefix)
        stop = start
        while stop < len(self.names) and self.names[stop].startswith(prefix):
            stop += 1
        return [(name[len(prefix) :], self.by_name[name]) for name in self.names[start:stop]]

    def any_below(self, prefix: str) -> bool:
        """Whether there is a tensor whose name begins with `prefix`."""
        at = bisect.bisect_left(self.names, prefix)
        return at < len(self.names) and self.names[at].startswith(prefix)


class Holder(Protocol):
    """One entry of a state."""

    @property
    def name(self) -> str:
        """Its key; where it is nested, keys joined by `/`."""

    def save(self) -> Saved:
        """Tensors and objects to store. Changes nothing."""

    def load(self, stored: StoredTensors) -> Wanted:
        """Tensors and objects to load. Changes nothing before the actions run."""
