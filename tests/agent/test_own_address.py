"""Goal: agents listen where the others reach them. Method: the real routes of this machine, and a seat table made up."""

from __future__ import annotations

import pytest

from ckpt.agent import tier
from ckpt.agent.tier import address_towards, own_address
from ckpt.config import Memory
from ckpt.errors import InvalidInputError


def test_address_is_that_of_the_way_to_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert own_address() == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert own_address() == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(InvalidInputError, match="no way to no-such-host"):
        own_address()
    assert address_towards("127.0.0.7") == "127.0.0.1"


@pytest.mark.parametrize(
    ("mine", "other", "given", "found"),
    [
        ("127.0.1.1", "10.9.8.7", None, "towards 10.9.8.7"),  # the master's name leads the master to itself
        ("127.0.0.1", "127.0.0.1", None, "127.0.0.1"),  # nodes of one machine
        ("10.9.8.6", "10.9.8.7", None, "10.9.8.6"),
        ("127.0.0.1", "10.9.8.7", "127.0.0.1", "127.0.0.1"),  # asked for
    ],
)
def test_loopback_address_is_not_told_to_other_hosts(
    monkeypatch: pytest.MonkeyPatch, mine: str, other: str, given: str | None, found: str
) -> None:
    monkeypatch.setattr(tier, "address_towards", lambda host: f"towards {host}")
    seats = [{"host": "a", "domain": "a", "address": mine}, {"host": "b", "domain": "b", "address": other}]
    own = tier.seen_from_outside(seats, 0, Memory(every=1, address=given))
    assert own == {**seats[0], "address": found}
