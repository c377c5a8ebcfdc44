"""State that is a rank's own: random streams and data loaders.

In: `RNG`s and loaders. Out: objects of kind `rank` and `loader`; actions that set them. Never decides which saved row a
rank goes on with: rng.py and loader.py do.
"""

from __future__ import annotations

from typing import Any

from ckpt.format.objects import encode
from ckpt.format.spec import StoredObject
from ckpt.state.holders import Action, Saved, StoredTensors, Wanted
from ckpt.state.loader import LoaderRow, choose_state, dp_of
from ckpt.state.rng import RNG
from ckpt.state.rows import Rows


class RngHolder:
    """An `RNG` under one state key."""

    def __init__(self, name: str, rng: RNG) -> None:
        self._name = name
        self._rng = rng

    @property
    def name(self) -> str:
        return self._name

    def save(self) -> Saved:
        payload = encode(self._rng.state_tree(), name=self._name)
        return Saved(objects=[StoredObject(name=self._name, kind=self._rng.kind, payload=payload)])

    def load(self, stored: StoredTensors) -> Wanted:
        return Wanted(objects=[self._name], prepare=self._prepare)

    def _prepare(self, rows: Rows) -> list[Action]:
        pairs = [(row.rank, row.payload) for row in rows.of(self._name)]
        if not pairs:
            return []
        return [lambda: self._rng.load_rows(pairs, rank=rows.rank, world=rows.world, name=self._name)]


class LoaderHolder:
    """A stateful loader or sampler under one state key."""

    def __init__(self, name: str, loader: Any) -> None:
        self._name = name
        self._loader = loader

    @property
    def name(self) -> str:
        return self._name

    def save(self) -> Saved:
        dp_rank, dp_size = dp_of(self._loader) or (-1, -1)
        payload = encode(self._loader.state_dict(), name=self._name)
        item = StoredObject(name=self._name, kind="loader", payload=payload, dp_rank=dp_rank, dp_size=dp_size)
        return Saved(objects=[item])

    def load(self, stored: StoredTensors) -> Wanted:
        return Wanted(objects=[self._name], prepare=self._prepare)

    def _prepare(self, rows: Rows) -> list[Action]:
        found = [
            LoaderRow(rank=row.rank, dp_rank=row.dp_rank, dp_size=row.dp_size, payload=row.payload)
            for row in rows.of(self._name)
        ]
        if not found:
            return []
        tree = choose_state(
            found,
            loader=self._loader,
            name=self._name,
            rank=rows.rank,
            world=rows.world,
            same_layout=rows.saved.same_layout,
        )
        return [lambda: self._loader.load_state_dict(tree)]
