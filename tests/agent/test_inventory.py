"""Which snapshot can be had back from what is left: every loss of every small group, and records that lie."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable

import pytest

from ckpt.agent.inventory import Card, Inventory, Parity, candidates, newest
from ckpt.errors import InvalidInputError


def card(
    rank: int, members: tuple[int, ...], *, step: int = 5, attempt: str = "a", parity: int = 1, world: int = 8
) -> Card:
    return Card(
        rank=rank,
        world=world,
        step=step,
        attempt=attempt,
        image_bytes=100 + rank,
        blob_bytes=120 + rank,
        crc32c=rank,
        members=members,
        parity=parity,
    )


def agents(
    groups: Iterable[tuple[int, ...]],
    *,
    step: int = 5,
    attempt: str = "a",
    parity: int = 1,
    without_parity: bool = False,
) -> dict[int, Inventory]:
    """One agent per rank, holding its blob and its parity."""
    groups = list(groups)
    world = sum(map(len, groups))
    out = {}
    for members in groups:
        cards = tuple(card(r, members, step=step, attempt=attempt, parity=parity, world=world) for r in members)
        for place, rank in enumerate(members):
            made = () if without_parity else (Parity(rank=rank, cards=cards, block_bytes=4096),)
            out[rank] = Inventory(address=f"host:{rank + 1}", blobs=(cards[place],), parities=made)
    return out


@pytest.mark.parametrize("parity", [1, 2, 3])
def test_every_loss_of_up_to_parity_members_is_recoverable_and_no_more(parity: int) -> None:
    groups = [(0, 2, 4, 6), (1, 3, 5, 7)]
    held = agents(groups, parity=parity)
    for number in range(6):
        for lost in itertools.combinations(range(8), number):
            left = [one for rank, one in held.items() if rank not in lost]
            found = newest(left)
            survivable = all(len(set(lost) & set(members)) <= parity for members in groups)
            assert (found is not None) == survivable, lost
            if found is not None:
                assert found.lost == lost


def test_without_parity_only_what_everybody_holds_is_recoverable() -> None:
    held = agents([(0, 1, 2, 3)], without_parity=True)
    whole = newest(list(held.values()))
    assert whole is not None and whole.lost == ()
    assert newest([held[0], held[1], held[2]]) is None


def test_the_newest_step_that_is_complete_everywhere_is_chosen() -> None:
    older, newer = agents([(0, 1, 2)], step=5), agents([(0, 1, 2)], step=6, attempt="b")
    both = [
        Inventory(
            address=f"host:{rank + 1}",
            blobs=older[rank].blobs + (newer[rank].blobs if rank == 0 else ()),
            parities=older[rank].parities,
        )
        for rank in range(3)
    ]
    found = newest(both)
    assert found is not None and (found.step, found.attempt) == (5, "a")
    assert [one.step for one in candidates(both)] == [6, 5]


def test_two_attempts_at_a_step_never_mix() -> None:
    """Half of each attempt is left: more bytes than one attempt needs, and no snapshot."""
    one, other = agents([(0, 1, 2, 3)], attempt="a"), agents([(0, 1, 2, 3)], attempt="b")
    assert newest([one[0], one[1], other[2], other[3]]) is None


def test_parity_of_other_blobs_does_not_count() -> None:
    """Parity that was made of a blob with another checksum would decode to garbage."""
    held = agents([(0, 1, 2)])
    wrong = tuple(
        Card.from_fields({**c.fields(), "crc32c": c.crc32c + (c.rank == 1)}) for c in held[2].parities[0].cards
    )
    liar = Inventory(address="host:3", blobs=held[2].blobs, parities=(Parity(rank=2, cards=wrong, block_bytes=4096),))
    found = newest([held[0], held[1], liar])
    assert found is not None and found.lost == ()  # nobody is lost, nothing needs decoding
    assert newest([held[0], liar]) is None


def test_a_rank_of_which_no_card_is_left_is_told() -> None:
    held = agents([(0, 1), (2, 3)], without_parity=True)
    (found,) = candidates([held[0], held[1], held[2]])
    assert (found.recoverable, found.lost) == (False, (2, 3))


def test_the_order_of_inventories_does_not_matter() -> None:
    held = list(agents([(0, 2), (1, 3)]).values())
    expected = candidates(held)
    for order in itertools.permutations(held):
        assert candidates(order) == expected


def test_records_come_back_from_json() -> None:
    for one in agents([(0, 1, 2)], parity=2).values():
        assert Inventory.from_fields(json.loads(json.dumps(one.fields()))) == one


BAD = {
    "rank": -1,
    "world": 0,
    "step": -1,
    "image_bytes": 1000,
    "crc32c": 1 << 32,
    "members": [1, 2],
    "parity": 3,
    "attempt": 3,
    "blob_bytes": "much",
}


@pytest.mark.parametrize("field", BAD)
def test_a_card_with_a_bad_field_is_refused(field: str) -> None:
    fields = {**card(0, (0, 1, 2)).fields(), field: BAD[field]}
    with pytest.raises(InvalidInputError):
        Card.from_fields(fields)


def test_a_record_of_parity_of_two_groups_is_refused() -> None:
    mixed = {"rank": 0, "block_bytes": 4096, "cards": [card(0, (0, 1)).fields(), card(2, (2, 3)).fields()]}
    with pytest.raises(InvalidInputError):
        Parity.from_fields(mixed)
