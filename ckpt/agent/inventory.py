"""What agents hold of which step, and which step can be had back from it. Pure: records in, a choice out; all ranks choose alike.

In: the inventories of all agents that could be reached. Out: candidates, newest first, each with the place of every rank's blob:
held as it is, to be decoded from its group, or lost. Never mixes two attempts; never asks whether bytes are right (who holds them
did).

A *blob* is what one rank protects of a step: its image and then its receipt, so that the index can be made again from what is
left.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt.agent.memo import Chosen
from ckpt.agent.stripes import Stripes
from ckpt.errors import InvalidInputError

MEMBERS_MAX = 64  # of a group; what the native coder takes


@dataclass(frozen=True, kw_only=True)
class Card:
    """One rank's blob of one attempt at a step, and the group that protects it."""

    rank: int
    world: int  # ranks of the job that saved it
    step: int
    attempt: str
    image_bytes: int  # the first bytes of the blob
    blob_bytes: int  # image and receipt
    crc32c: int  # of the blob
    members: tuple[int, ...]  # ranks of the group, in order
    parity: int  # members that may be lost
    epoch: int = 0  # of the start of the job that saved it

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world or self.rank not in self.members or len(self.members) > MEMBERS_MAX:
            raise InvalidInputError(f"a card of rank {self.rank} of {self.world} with members {list(self.members)}")
        if not 0 <= self.image_bytes <= self.blob_bytes or self.step < 0 or not 0 <= self.crc32c < 1 << 32:
            raise InvalidInputError(f"a card of {self.image_bytes} and {self.blob_bytes} bytes of step {self.step}")
        if not 0 <= self.parity < max(len(self.members), 1) or len(set(self.members)) != len(self.members):
            raise InvalidInputError(f"a card of {self.parity} parities in a group of {list(self.members)}")

    @property
    def of(self) -> tuple[int, str, int]:
        """Step, attempt and world: equal for cards of one snapshot."""
        return self.step, self.attempt, self.world

    def fields(self) -> dict[str, Any]:
        """As JSON."""
        return {**dataclasses.asdict(self), "members": list(self.members)}

    @classmethod
    def from_fields(cls, fields: Any) -> Card:
        """The card of JSON; InvalidInputError when it is none."""
        names = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or {"epoch", *fields} != set(names):
            raise InvalidInputError(f"not a card: {fields!r}")
        fields = {"epoch": 0, **fields}  # of an agent that does not tell
        members = fields["members"]
        whole = {name for name in names if name not in ("attempt", "members")}
        if any(type(fields[name]) is not int for name in whole) or not isinstance(fields["attempt"], str):
            raise InvalidInputError(f"not a card: {fields!r}")
        if not isinstance(members, list) or any(type(rank) is not int for rank in members):
            raise InvalidInputError(f"not a card: {fields!r}")
        return cls(**{**fields, "members": tuple(members)})


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The rows of parity that one member holds of its group's stripes, with the cards of all members."""

    rank: int  # the holder
    cards: tuple[Card, ...]  # of all members, in the order of the group
    block_bytes: int

    @property
    def of(self) -> tuple[int, str, int]:
        """As `Card.of`."""
        return self.cards[0].of

    def fields(self) -> dict[str, Any]:
        """As JSON."""
        return {"rank": self.rank, "block_bytes": self.block_bytes, "cards": [card.fields() for card in self.cards]}

    @classmethod
    def from_fields(cls, fields: Any) -> Parity:
        """The record of JSON; InvalidInputError when it is none."""
        if not isinstance(fields, dict) or set(fields) != {"rank", "block_bytes", "cards"}:
            raise InvalidInputError(f"not a record of parity: {fields!r}")
        if type(fields["rank"]) is not int or type(fields["block_bytes"]) is not int:
            raise InvalidInputError(f"not a record of parity: {fields!r}")
        cards = tuple(Card.from_fields(card) for card in fields["cards"])
        ranks = tuple(card.rank for card in cards)
        whole = bool(cards) and all(card.of == cards[0].of and card.members == ranks for card in cards)
        if not whole or fields["rank"] not in ranks:
            raise InvalidInputError(f"a record of parity whose cards are not of one group: {fields!r}")
        return cls(rank=fields["rank"], cards=cards, block_bytes=fields["block_bytes"])


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What one agent holds that is whole."""

    address: str  # of the agent, as its peers reach it; equal for nobody else
    blobs: tuple[Card, ...] = ()
    parities: tuple[Parity, ...] = ()
    chosen: Chosen | None = None  # what the job went on from when it started last, as this agent knows

    def fields(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "address": self.address,
            "blobs": [card.fields() for card in self.blobs],
            "parities": [parity.fields() for parity in self.parities],
            "chosen": None if self.chosen is None else self.chosen.fields(),
        }

    @classmethod
    def from_fields(cls, fields: Any) -> Inventory:
        """The inventory of JSON; InvalidInputError when it is none."""
        if not isinstance(fields, dict) or {"chosen", *fields} != {"address", "blobs", "parities", "chosen"}:
            raise InvalidInputError("not an inventory")
        return cls(
            address=str(fields["address"]),
            blobs=tuple(Card.from_fields(card) for card in fields["blobs"]),
            parities=tuple(Parity.from_fields(parity) for parity in fields["parities"]),
            chosen=Chosen.of(fields.get("chosen")),
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """What is left of one group of one snapshot."""

    cards: tuple[Card, ...]  # of all members, in order
    block_bytes: int  # of a stripe; 0 where nobody holds parity
    blobs: Mapping[int, str]  # place in the group -> address of who holds the blob
    parities: Mapping[int, str]  # place in the group -> address of who holds that member's parity

    @property
    def lost(self) -> tuple[int, ...]:
        """Places whose blob nobody holds."""
        return tuple(place for place in range(len(self.cards)) if place not in self.blobs)

    @property
    def incomplete(self) -> tuple[int, ...]:
        """Places whose blob or parity nobody holds: what is left of them does not help to decode others."""
        return tuple(p for p in range(len(self.cards)) if p not in self.blobs or p not in self.parities)

    @property
    def recoverable(self) -> bool:
        """Whether all blobs are held, or those that are not can be decoded (stripes.py)."""
        return not self.lost or len(self.incomplete) <= self.cards[0].parity


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One snapshot as it is left in the memory of agents."""

    step: int
    attempt: str
    world: int
    groups: tuple[Group, ...]
    unknown: tuple[int, ...]  # ranks of which not even a card is left

    @property
    def recoverable(self) -> bool:
        """Whether every rank's blob can be had."""
        return not self.unknown and all(group.recoverable for group in self.groups)

    @property
    def lost(self) -> tuple[int, ...]:
        """Ranks whose blob nobody holds, decodable or not."""
        gone = [group.cards[place].rank for group in self.groups for place in group.lost]
        return tuple(sorted([*gone, *self.unknown]))

    @property
    def decodable(self) -> tuple[int, ...]:
        """Those of `lost` whose group can make their blob again."""
        found = [g.cards[place].rank for g in self.groups if g.recoverable for place in g.lost]
        return tuple(sorted(found))

    @property
    def gone(self) -> tuple[int, ...]:
        """Those of `lost` that nothing makes again."""
        return tuple(sorted({*self.lost} - {*self.decodable}))

    @property
    def held(self) -> tuple[int, ...]:
        """Ranks whose blob somebody holds as it is."""
        return tuple(sorted({*range(self.world)} - {*self.lost}))

    def holder(self, rank: int) -> str | None:
        """The address of who holds the blob of `rank`; None when nobody does."""
        return next(
            (g.blobs.get(place) for g in self.groups for place, card in enumerate(g.cards) if card.rank == rank), None
        )


def candidates(inventories: Sequence[Inventory]) -> list[Candidate]:
    """All snapshots of which anything is left, the newest step first; of one step, the one that more ranks hold first.

    Those that the job had passed over when it started last are left out.
    """
    cards: dict[tuple[int, str, int], dict[int, Card]] = defaultdict(dict)
    blobs: dict[tuple[int, str, int], dict[int, str]] = defaultdict(dict)
    parities: dict[tuple[int, str, int], dict[int, tuple[str, Parity]]] = defaultdict(dict)
    for inventory in sorted(inventories, key=lambda one: one.address):
        for card in inventory.blobs:
            cards[card.of].setdefault(card.rank, card)
            if cards[card.of][card.rank] == card:  # two agents that disagree on a blob: the first one counts
                blobs[card.of].setdefault(card.rank, inventory.address)
        for parity in inventory.parities:
            parities[parity.of].setdefault(parity.rank, (inventory.address, parity))
    for of, found in parities.items():
        for _, parity in found.values():
            for card in parity.cards:
                cards[of].setdefault(card.rank, card)
    chosen = max((one.chosen for one in inventories if one.chosen is not None), key=_order, default=None)
    out = [_candidate(of, cards[of], blobs[of], parities[of]) for of in cards if _counts(cards[of], chosen)]
    return sorted(out, key=lambda one: (-one.step, len(one.lost), one.attempt))


def _order(chosen: Chosen) -> tuple[int, int, str]:
    return chosen.epoch, chosen.step, chosen.attempt


def _counts(cards: Mapping[int, Card], chosen: Chosen | None) -> bool:
    """Whether a snapshot is of the course that the job took: what it has passed over once must not come back, with a node that
    was away when all others dropped it, say."""
    card = next(iter(cards.values()))
    return chosen is None or card.epoch >= chosen.epoch or (card.step, card.attempt) == (chosen.step, chosen.attempt)


def newest(inventories: Sequence[Inventory]) -> Candidate | None:
    """The newest snapshot that can be had back whole."""
    return next((one for one in candidates(inventories) if one.recoverable), None)


def _is_cut_alike(parity: Parity) -> bool:
    """Whether parity was made of blocks as this program cuts them."""
    cards = parity.cards
    stripes = Stripes(image_nbytes=tuple(card.blob_bytes for card in cards), num_parity=cards[0].parity)
    return parity.block_bytes == stripes.block_bytes


def _candidate(
    of: tuple[int, str, int],
    cards: Mapping[int, Card],
    blobs: Mapping[int, str],
    parities: Mapping[int, tuple[str, Parity]],
) -> Candidate:
    step, attempt, world = of
    groups, seen = [], set[int]()
    for rank in sorted(cards):
        members = cards[rank].members
        if rank in seen or not all(member in cards for member in members):
            continue  # of a member without a card not even the size is known
        of_group = tuple(cards[member] for member in members)
        if any(card.members != members or card.parity != cards[rank].parity for card in of_group):
            continue
        # Parity counts only if it was made of the very blobs whose cards these are.
        made = {
            place: parities[m]
            for place, m in enumerate(members)
            if m in parities and parities[m][1].cards == of_group and _is_cut_alike(parities[m][1])
        }
        groups.append(
            Group(
                cards=of_group,
                block_bytes=max((parity.block_bytes for _, parity in made.values()), default=0),
                blobs={place: blobs[m] for place, m in enumerate(members) if m in blobs},
                parities={place: address for place, (address, _) in made.items()},
            )
        )
        seen.update(members)
    unknown = tuple(rank for rank in range(world) if rank not in seen)
    return Candidate(step=step, attempt=attempt, world=world, groups=tuple(groups), unknown=unknown)
