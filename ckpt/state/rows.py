"""Objects as they come back from a checkpoint: one row per rank that stored one, and the rule for which row counts.

In: rows. Out: decoded trees. Pure. Never guesses: rows that differ on a changed world are an error that names the
object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt.errors import DamagedError, MismatchError
from ckpt.format.objects import Tree, decode
from ckpt.format.spec import ObjectKind


@dataclass(frozen=True, kw_only=True)
class StoredObjectRow:
    """One rank's copy of an object."""

    rank: int  # that saved it
    kind: ObjectKind
    payload: bytes
    dp_rank: int = -1  # of a loader; -1: not known
    dp_size: int = -1


@dataclass(frozen=True, kw_only=True)
class SavedWorld:
    """What is known of the ranks that saved."""

    world: int  # number of ranks
    same_layout: bool  # every rank holds now what the rank of its number held then


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All rows of a load, as this rank looks at them."""

    objects: Mapping[str, Sequence[StoredObjectRow]]
    saved: SavedWorld
    rank: int
    world: int

    def of(self, name: str) -> Sequence[StoredObjectRow]:
        """The rows of an object, by rank; none when it is not stored (the engine has reported that already)."""
        return sorted(self.objects.get(name, ()), key=lambda row: row.rank)

    def trees(self, name: str) -> list[tuple[int, Tree]]:
        """(rank, tree) of each distinct payload, under the lowest rank that stored it."""
        first: dict[bytes, int] = {}
        for row in self.of(name):
            first.setdefault(_document(row), row.rank)
        return [(rank, decode(payload, name=name)) for payload, rank in first.items()]

    def chosen(self, name: str) -> StoredObjectRow | None:
        """The row of a `replicated` object that counts here; None when it is not stored.

        All rows equal: any. Rows that differ: this rank's own on an unchanged world and layout, else MismatchError.
        """
        rows = self.of(name)
        if not rows or all(_document(row) == _document(rows[0]) for row in rows):
            return rows[0] if rows else None
        ranks = [row.rank for row in rows]
        if self.saved.world == self.world and self.saved.same_layout:
            own = [row for row in rows if row.rank == self.rank]
            if len(own) != 1:
                raise DamagedError(f"object `{name}` has {len(own)} rows of rank {self.rank}, expected 1")
            return own[0]
        changed = (
            f"there were {self.saved.world} ranks then and are {self.world} now"
            if self.saved.world != self.world
            else "the ranks hold other tensors now than then"
        )
        raise MismatchError(
            f"object `{name}` differs between the ranks that saved it ({ranks[0]} to {ranks[-1]}), and {changed}: "
            "which rank's to load is not known",
            kind="ambiguous-object",
            hints=(
                "leave it out of the state to load the rest",
                "save what ranks do not share under keys of their own, or make it equal on all ranks before saving",
            ),
        )


def _document(row: StoredObjectRow) -> bytes:
    """The payload without the spaces that keep its place in the image when it gets longer."""
    return row.payload.rstrip(b" ")
