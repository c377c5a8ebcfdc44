"""What all agents of a run hold, for somebody who is no trainer of it.

In: a run, options. Out: what every agent that is known says, and who could not be asked. Begins with the agents of this user on
this host, which tell the run's secret and the addresses that they know; then asks those, and those that these know. Every
question has a deadline. Changes nothing, unless it is told to keep the agents from ending (`Holding`).
"""

from __future__ import annotations

import dataclasses
import os
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ckpt.agent import discover
from ckpt.agent.discover import Found
from ckpt.agent.inventory import Inventory
from ckpt.agent.local import Client, connect
from ckpt.agent.transport.client import Peer
from ckpt.agent.transport.credentials import Credentials
from ckpt.config import AGENT_HOLD_S_MAX, Options
from ckpt.errors import CheckpointError, PeerError

_AT_ONCE = 32  # agents that are asked at a time
_ASK_S = 10.0  # a short question
_HOLD_S, _HOLD_EVERY_S = 120, 20.0  # an agent stays so long after it was asked last, and is asked so often

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One agent, and what became of the questions to it."""

    address: str  # as its peers reach it; `here:SEAT` of an agent of this host that listens to no peers
    rank: int | None  # of the job that its trainer belongs or belonged to; None: nobody knows
    found: Found | None = None  # of an agent of this host
    world: int | None = None
    inventory: Inventory | None = None  # None: it could not be asked
    error: str = ""  # why
    trainer_pid: int | None = None  # of an agent of this host that a trainer uses

    @property
    def listens(self) -> bool:
        """Whether bytes can be had from it."""
        return not self.address.startswith("here:")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All that is known of the agents of a run."""

    run_id: uuid.UUID
    agents: tuple[Asked, ...]  # by rank, unknown ones last
    credentials: Credentials | None  # to talk to them; None: no agent of this host knows the secret

    @property
    def inventories(self) -> list[Inventory]:
        """Of those that answered."""
        return [one.inventory for one in self.agents if one.inventory is not None]

    @property
    def silent(self) -> list[Asked]:
        """Those that did not."""
        return [one for one in self.agents if one.inventory is None]


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What an agent answered; `known` as Member.known has it."""

    known: dict[str, Any]
    inventory: Inventory | None
    error: str = ""
    secret: str | None = None


def survey(run_id: uuid.UUID, options: Options, *, hold: bool = False) -> Survey:
    """Ask every agent of the run that can be found from this host.

    Each looks at every byte that it holds and has `inventory_timeout_s` for that; one that is gone costs some seconds.

    Args:
        hold: whether agents are asked to stay until all have answered; then it is time for `Holding`.
    """
    here = discover.agents(options, run_id=run_id)
    answers = _each(lambda one: _ask_here(one, options, hold=hold), here)
    agents: dict[str, Asked] = {}
    ranks: dict[str, int] = {}  # address -> rank, as others say
    secret: str | None = None
    for found, said in zip(here, answers, strict=True):
        one = _asked(said, None, found)
        agents[one.address] = one
        ranks |= _addresses(said.known)
        secret = secret or said.secret
    if secret is None:
        return Survey(run_id=run_id, agents=_sorted(agents.values()), credentials=None)
    credentials = Credentials(run_id=run_id.hex, secret=bytes.fromhex(secret), member=f"recover-{os.getpid()}")
    while missing := [address for address in sorted(ranks) if address not in agents]:
        for address, said in zip(
            missing, _each(lambda one: _ask_there(one, credentials, options, hold=hold), missing), strict=True
        ):
            agents[address] = _asked(said, address, None, rank=ranks[address])
            ranks |= {one: rank for one, rank in _addresses(said.known).items() if one not in ranks}
    return Survey(run_id=run_id, agents=_sorted(_without_stale(agents, ranks)), credentials=credentials)


class Holding:
    """Keeps the agents of a survey from ending while their memory is read. A context manager; ends by itself when this
    process is killed."""

    def __init__(self, surveyed: Survey, options: Options) -> None:
        self._survey, self._options = surveyed, options
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="ckpt-hold", daemon=True)
        self.refused: dict[str, str] = {}  # address -> why it could not be held

    def __enter__(self) -> Holding:
        self._hold()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _go_on(self) -> None:
        while not self._stopping.wait(_HOLD_EVERY_S):
            self._hold()

    def _hold(self) -> None:
        holders = [one for one in self._survey.agents if one.inventory is not None]
        for one, error in zip(holders, _each(self._hold_one, holders), strict=True):
            if error:
                self.refused[one.address] = error

    def _hold_one(self, one: Asked) -> str:
        try:
            if one.found is not None:
                with_client(one.found, self._options, lambda client: client.call("hold", {"seconds": _HOLD_S}))
            elif self._survey.credentials is not None:
                peer = Peer(one.address, self._survey.credentials, self._options)
                try:
                    peer.call("hold", {"seconds": _HOLD_S}, deadline_s=_ASK_S)
                finally:
                    peer.close()
        except CheckpointError as error:
            return error.message
        return ""


def with_client(found: Found, options: Options, work: Callable[[Client], _Answer]) -> _Answer:
    """What `work` gives with a connection to an agent of this host, as an observer."""
    client = connect(found.places.socket, found.identity, options, role="observer", timeout_s=_ASK_S)
    try:
        return work(client)
    finally:
        client.close()


def _ask_here(found: Found, options: Options, *, hold: bool) -> _Said:
    if found.status is None:
        return _Said(known={}, inventory=None, error=found.error)
    known: dict[str, Any] = {}
    try:

        def ask(client: Client) -> Inventory:
            known.update(client.call("meet", timeout_s=_ASK_S)[0])
            if hold:
                client.call("hold", {"seconds": _asking_s(options)}, timeout_s=_ASK_S)
            return Inventory.from_fields(client.call("inventory", timeout_s=options.inventory_timeout_s)[0])

        inventory = with_client(found, options, ask)
        address = inventory.address or _here(found)
        return _Said(known=known, secret=known.get("secret"), inventory=dataclasses.replace(inventory, address=address))
    except CheckpointError as error:
        return _Said(known=known, secret=known.get("secret"), inventory=None, error=error.message)


def _ask_there(address: str, credentials: Credentials, options: Options, *, hold: bool) -> _Said:
    try:
        peer = Peer(address, credentials, options)
        try:
            try:
                known = peer.call("known", {}, deadline_s=_ASK_S)
            except PeerError as error:
                if error.kind != "unknown-method":  # an agent of a version that does not tell
                    raise
                known = {}
            if hold:
                peer.call("hold", {"seconds": _asking_s(options)}, deadline_s=_ASK_S)
            fields = peer.call("inventory", {}, deadline_s=options.inventory_timeout_s)
            return _Said(known=known, inventory=Inventory.from_fields(fields))
        finally:
            peer.close()
    except CheckpointError as error:
        return _Said(known={}, inventory=None, error=error.message)


def _asking_s(options: Options) -> int:
    """What all questions may take, here and there."""
    return min(int(2 * options.inventory_timeout_s) + _HOLD_S, int(AGENT_HOLD_S_MAX))


def _asked(said: _Said, address: str | None, found: Found | None, *, rank: int | None = None) -> Asked:
    own = said.known.get("rank")
    if own is None and said.inventory is not None:
        own = next((card.rank for card in said.inventory.blobs), None)
    place = address or said.known.get("address") or (_here(found) if found is not None else "")
    return Asked(
        address=place,
        rank=own if own is not None else rank,
        world=said.known.get("world"),
        found=found,
        inventory=said.inventory,
        error=said.error,
        trainer_pid=found.status["trainer_pid"] if found is not None and found.status is not None else None,
    )


def _here(found: Found) -> str:
    return f"here:{found.identity.rank}"


def _addresses(known: dict[str, Any]) -> dict[str, int]:
    found = known.get("addresses")
    return {str(address): int(rank) for rank, address in found.items()} if isinstance(found, dict) else {}


def _without_stale(agents: dict[str, Asked], ranks: dict[str, int]) -> list[Asked]:
    """Those that count: a silent address of a rank whose agent answers from another one is that of an agent before."""
    answering = {one.rank for one in agents.values() if one.inventory is not None and one.rank is not None}
    return [one for one in agents.values() if one.inventory is not None or one.found or one.rank not in answering]


def _sorted(agents: Iterable[Asked]) -> tuple[Asked, ...]:
    return tuple(sorted(agents, key=lambda one: (one.rank is None, one.rank or 0, one.address)))


def _each(work: Callable[[_Item], _Answer], items: list[_Item]) -> list[_Answer]:
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ckpt-survey") as pool:
        return list(pool.map(work, items))
