"""The memory tier as a trainer uses it: its own agent, the group of that, and the way back after a failure.

In: a run's URL, the ranks of the job, `Memory`. Out: shared memory to save into (engine/keeper.py), and the newest snapshot that
can be had back. `connect`, `reserve` and `restorable` exchange a few bytes between all ranks, when a job starts or its structure
changes; a save in between asks nobody but the own agent.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ckpt.agent import discover, protect
from ckpt.agent.groups import Group, Grouping, place
from ckpt.agent.groups import Member as Placed
from ckpt.agent.identity import Identity, places, run_id_of
from ckpt.agent.inventory import Candidate, Inventory, candidates
from ckpt.agent.local import Mapped, connect
from ckpt.agent.memo import Memo
from ckpt.agent.own import OwnAgent, capacity_of
from ckpt.agent.restore import SnapshotStore, own_image
from ckpt.agent.topology import domain_of, read_topology
from ckpt.agent.transport.client import Peer
from ckpt.agent.transport.credentials import SECRET_BYTES, Credentials
from ckpt.config import AGENT_ADDRESSES_MAX, AGENT_RECORD_BYTES_MAX, Memory, Options
from ckpt.engine.keeper import OwnImage
from ckpt.engine.world import World, gather_or_raise
from ckpt.errors import AgentError, CheckpointError, InvalidInputError

_log = logging.getLogger("ckpt")


@dataclass(frozen=True, kw_only=True)
class _Seat:
    """One rank, as all ranks know it."""

    host: str
    domain: str
    address: str  # to bind to
    seat: int = 0  # number of the rank among those of its host


class Tier(OwnAgent):
    """One rank's way to the memory tier. Owned by the training thread; what it inherits says who else may call that."""

    def __init__(
        self, url: str, world: World, memory: Memory, options: Options, storage: Mapping[str, Any] | None
    ) -> None:
        super().__init__(url if "://" in url else os.path.abspath(url), options, dict(storage or {}))
        self._world, self._memory = world, memory
        self._run_id = run_id_of(url)
        self._secret = b""
        self._group: Group | None = None
        self._inventories: list[Inventory] = []
        self._is_settled = (
            False  # equal on all ranks: no agent stored anything when this job began, and it saved nothing since
        )
        self._connect()

    # all ranks together

    def _gather(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        data = np.frombuffer(json.dumps(body).encode(), np.uint8)
        return [json.loads(answer.tobytes()) for answer in self._world.all_gather(data)]

    def _together(self, work: Callable[[], dict[str, Any]], state: str) -> list[dict[str, Any]]:
        """What `work` gives on every rank; when it fails on one, all raise."""
        error: CheckpointError | None = None
        body: dict[str, Any] = {}
        try:
            body = work()
        except CheckpointError as problem:
            error = problem
        answers = gather_or_raise(self._world, json.dumps(body).encode(), error, state)
        return [json.loads(answer) for answer in answers]

    def _connect(self) -> None:
        """Find or start this rank's agent, agree on the secret of the run, and learn what all agents hold. All ranks call."""
        seats = self._together(lambda: self._where(), "no agent was started")
        seats = self._together(lambda: seen_from_outside(seats, self._world.rank, self._memory), "no agent was started")
        counts: Counter[str] = Counter()
        numbers = []
        for one in seats:
            numbers.append(counts[one["host"]])
            counts[one["host"]] += 1
        rank = self._world.rank
        self._seats = [_Seat(**one, seat=number) for one, number in zip(seats, numbers, strict=True)]
        mine = self._seats[rank]
        self._identity = Identity(run_id=self._run_id, rank=mine.seat, world=counts[mine.host])
        known = self._together(self._look, "no agent was started")
        # Also higher than any of a job that nobody here knows of, whose nodes may come back.
        epoch = max(1 + max(int(one["epoch"]) for one in known), min(int(one["now"]) for one in known))
        self._secret = bytes.fromhex(next((one["secret"] for one in known if one["secret"]), ""))
        if not self._secret:
            fresh = self._gather({"secret": secrets.token_hex(SECRET_BYTES) if rank == 0 else ""})
            self._secret = bytes.fromhex(fresh[0]["secret"])
        found = self._together(lambda: self._join_run(epoch, mine), "agents may have been started")
        self._addresses = [str(one["address"]) for one in found]
        self._inventories = [Inventory.from_fields(fields) for one in found for fields in one["held"]]
        self._is_settled = all(is_done for *_, is_done in _all_flushes(found))

    def _where(self) -> dict[str, Any]:
        host = os.environ.get("CKPT_NODE") or socket.gethostname()
        file = self._memory.topology or os.environ.get("CKPT_TOPOLOGY_FILE")
        topology = read_topology(Path(file)) if file else None
        if topology is not None and host not in topology:
            _log.warning(
                "topology file %s does not name host %s, which counts as a failure domain of its own", file, host
            )
        domain = domain_of(host, given=os.environ.get("CKPT_FAILURE_DOMAIN"), topology=topology)
        return {"host": host, "domain": domain, "address": self._memory.address or own_address()}

    def _look(self) -> dict[str, Any]:
        """What an agent of this seat knows already, or the one that has died knew."""
        where, now = places(self._identity, self._options), int(time.time())
        try:
            client = connect(where.socket, self._identity, self._options, role="observer")
            try:
                return {"epoch": client.status()["epoch"], "secret": client.call("meet")[0]["secret"], "now": now}
            finally:
                client.close()
        except AgentError as error:
            if error.kind not in ("no-agent", "agent-gone", "timeout"):
                raise
            return {"epoch": max(0, Memo.read(where.state).epoch), "secret": None, "now": now}

    def _join_run(self, epoch: int, mine: _Seat) -> dict[str, Any]:
        self._start(self._identity, rank=self._world.rank, epoch=epoch, secret=self._secret, host=mine.address)
        return {"address": self._own_address, "held": self._held(fresh=False), **self._flushes()}

    def _held(self, *, fresh: bool) -> list[dict[str, Any]]:
        """What this rank's agent holds, and those of this host whose seat nobody takes.

        Args:
            fresh: they look at every byte now, also of what they looked at a moment ago.
        """
        assert self._client is not None
        timeout_s = self._options.inventory_timeout_s
        held = [self._client.call("inventory", {"fresh": fresh}, timeout_s=timeout_s)[0]]
        if self._seats[self._world.rank].seat == 0:
            found = self._ask_unattached("inventory", {"fresh": fresh}, timeout_s=timeout_s)
            held += [one for one in found if one["address"]]
        return held

    def _ask_unattached(self, method: str, params: dict[str, Any], *, timeout_s: float) -> list[dict[str, Any]]:
        """What agents of this host answer whose seat nobody takes any more."""
        out = []
        num_seats = sum(one.host == self._seats[self._world.rank].host for one in self._seats)
        for found in discover.agents(self._options, run_id=self._run_id, first_rank=num_seats, sizes=False):
            if found.status is None:
                continue
            try:
                client = connect(found.places.socket, found.identity, self._options, role="observer")
                try:
                    out.append(client.call(method, params, timeout_s=timeout_s)[0])
                finally:
                    client.close()
            except CheckpointError as error:
                _log.warning("agent %s of this host does not answer: %s", found.places.socket, error.message)
        return out

    def reserve(self, nbytes: int, *, pinned: bool) -> None:
        """As Keeper.reserve; puts the ranks into groups. All ranks call."""
        self._is_settled = False  # what is saved from now on is stored as well
        capacity = capacity_of(nbytes)
        sizes = self._gather({"capacity": capacity, "address": self._own_address})
        self._addresses = [str(one["address"]) for one in sizes]  # an agent may have been started anew
        grouping = self._groups()
        group = grouping.group_of(self._world.rank) if grouping is not None else None
        members = group.ranks if group is not None else (self._world.rank,)
        parity = group.num_parity if group is not None else 0
        largest = max(int(sizes[rank]["capacity"]) for rank in members)
        room = protect.nbytes_needed(largest, num_members=len(members), parity=parity) if parity else 0
        firsts = [one.ranks[0] for one in grouping.groups] if grouping is not None else []
        known = range(self._world.size) if self._world.size <= AGENT_ADDRESSES_MAX else {*members, *firsts, 0}
        near = {str(rank): self._addresses[rank] for rank in sorted({*members, 0})}
        everybody = {str(rank): address for rank, address in enumerate(self._addresses)}
        params = {
            "rank": self._world.rank,
            "world": self._world.size,
            "members": list(members),
            "parity": parity,
            "addresses": {str(rank): self._addresses[rank] for rank in sorted(known)},
            "parity_bytes": room + AGENT_RECORD_BYTES_MAX if room else 0,
        }

        with self._lock:
            self._capacity_bytes, self._group, self._pinned = capacity, group, pinned
            # All vote at rank 0's agent: of a new one, all must hear.
            self._joined = {**params, "tell": everybody if self._world.rank == 0 else near}

        def work() -> dict[str, Any]:
            self._reserve_now(params)
            return {}

        self._together(work, "nothing was saved")

    def _groups(self) -> Grouping | None:
        """The groups of this job; None for one rank alone, which nobody can protect."""
        if self._world.size == 1:
            _log.warning("one rank has no peers: its snapshots survive its own crash, and not that of its node")
            return None
        members = [Placed(rank=r, host=s.host, domain=s.domain) for r, s in enumerate(self._seats)]
        grouping = self._place(members)
        if self._world.rank == 0:
            for concern in grouping.concerns:
                _log.warning("%s", concern.message)
        return grouping

    def _place(self, members: list[Placed]) -> Grouping:
        """Groups with the parity asked for, or the most that these ranks allow: a job that lost nodes must go on."""
        size, asked = min(self._memory.group_size, len(members)), self._memory.parity
        for parity in range(min(asked, size - 1), 0, -1):
            try:
                grouping = place(members, group_size=size, parity=parity)
            except InvalidInputError as error:
                if parity == 1:
                    raise
                _log.debug("no groups with parity %d: %s", parity, error.message)
                continue
            if parity < asked and self._world.rank == 0:
                hosts = len({member.host for member in members})
                _log.warning(
                    "only %d members of a group may be lost, rather than %d: %d ranks on %d hosts allow no more",
                    parity, asked, len(members), hosts,
                )  # fmt: skip
            return grouping
        raise AssertionError("two ranks allow one parity")

    # the way back

    def settle(self) -> None:
        """As MemoryTier.settle: a flush goes on if all ranks of its job take part, which is known to no agent alone."""
        if self._is_settled:
            return
        found = self._together(self._flushes, "nothing was changed")
        flushes = _all_flushes(found)
        if all(is_done for *_, is_done in flushes):
            return
        taking_part = Counter((step, attempt, world) for step, attempt, world, _ in flushes)
        keep = [[step, attempt] for (step, attempt, world), count in taking_part.items() if count == world]
        self._together(lambda: {"agents": self._ask_all("settle", {"keep": keep})}, "nothing was changed")

    def _flushes(self) -> dict[str, Any]:
        """What this rank's agent, and those of this host whose seat nobody takes, store or have stored."""
        return {"agents": self._ask_all("flushes", {})}

    def _ask_all(self, method: str, params: dict[str, Any]) -> list[dict[str, Any]]:
        assert self._client is not None
        timeout_s = self._options.agent_call_timeout_s
        first = self._seats[self._world.rank].seat == 0
        others = self._ask_unattached(method, params, timeout_s=timeout_s) if first else []
        return [self._client.call(method, params, timeout_s=timeout_s)[0], *others]

    def candidates(self) -> list[Candidate]:
        """What the agents held when this job began, the newest step first. Equal on all ranks."""
        return candidates(self._inventories)

    def look_again(self) -> None:
        """As MemoryTier.look_again."""
        found = self._together(lambda: {"held": self._held(fresh=True)}, "the state may be partly changed")
        self._inventories = [Inventory.from_fields(fields) for one in found for fields in one["held"]]

    def chosen(self, number: int | None, *, step: int) -> None:
        """As MemoryTier.chosen: what else this rank's agent holds is dropped, what it still stores of later steps given up."""
        client = self._working()
        if client is None:
            return
        params: dict[str, Any] = {"goes_on_from": step}
        if number is not None:
            candidate = self.candidates()[number]
            params |= {"step": candidate.step, "attempt": candidate.attempt}
        try:
            client.call("choose", params)
        except AgentError as error:  # this rank alone knows, and all have loaded
            _log.warning("the agent of rank %d did not hear what was restored: %s", self._world.rank, error.message)

    def own(self, number: int) -> OwnImage | None:
        """As MemoryTier.own."""
        candidate = self.candidates()[number]
        rank = self._world.rank
        if candidate.holder(rank) != self._own_address or (mapped := self._local(candidate)) == {}:
            return None
        try:
            return own_image(candidate, rank, mapped[self._own_address])
        except CheckpointError as error:  # the other way tells the same of it
            _log.debug("rank %d does not read its own image alone: %s", rank, error.message)
            return None

    def open(self, number: int) -> SnapshotStore:
        """As MemoryTier.open. All ranks call."""
        candidate = self.candidates()[number]
        credentials = Credentials(
            run_id=self._run_id.hex, secret=self._secret, member=f"trainer-{os.getpid()}-{self._world.rank}"
        )
        peers: dict[str, Peer] = {}

        def peer(address: str) -> Peer:
            if address not in peers:
                peers[address] = Peer(address, credentials, self._options)
            return peers[address]

        return SnapshotStore.open_together(
            candidate,
            run_id=self._run_id.hex,
            peer=peer,
            local=self._local(candidate),
            world=self._world,
            options=self._options,
        )

    def _local(self, candidate: Candidate) -> dict[str, Mapped]:
        """What this rank's own agent holds of a candidate; nothing when it does not answer: others must not wait for that."""
        client = self._working()
        if client is None:
            return {}
        try:
            of = candidate.step, candidate.attempt
            names = [one.name for one in client.segments() if (one.step, one.attempt) == of]
            mapped = self._mapped if set(names) <= set(self._mapped) else self._map(client.attach())
            held = [mapped[name] for name in names]
            return {self._own_address: held[-1]} if held else {}
        except CheckpointError as error:
            _log.warning("rank %d reads nothing out of its own agent's memory: %s", self._world.rank, error.message)
            return {}


def _all_flushes(answers: list[dict[str, Any]]) -> list[tuple[int, str, int, bool]]:
    """(step, attempt, ranks of the job, whether it is stored) of all flushes that agents told of."""
    return [tuple(one) for rank in answers for agent in rank["agents"] for one in agent["flushes"]]


def own_address() -> str:
    """The address of the interface that leads to the job's master, 127.0.0.1 where there is no job."""
    master = os.environ.get("MASTER_ADDR")
    return address_towards(master) if master else "127.0.0.1"


def address_towards(host: str) -> str:
    """The address of the interface that leads to a host. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # any port: a datagram socket connects without a word
            return str(probe.getsockname()[0])
        except OSError as error:
            raise InvalidInputError(
                f"no way to {host}: {error.strerror}",
                kind="no-address",
                hints=("name an address: Memory(address=...)",),
            ) from error


def seen_from_outside(seats: list[dict[str, Any]], rank: int, memory: Memory) -> dict[str, Any]:
    """A rank's seat; where the master's name leads to itself (127.0.1.1, say), with the address towards another host."""
    mine = seats[rank]
    others = [str(one["address"]) for one in seats if one["host"] != mine["host"]]
    outside = [address for address in others if not _is_loopback(address)]
    if memory.address is None and _is_loopback(mine["address"]) and outside:
        return {**mine, "address": address_towards(outside[0])}
    return mine


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name that the user gave
        return False
