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
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.agent import blob, discover, protect, segments, wire
from ckpt.agent.flush import options_for_agent
from ckpt.agent.groups import Group, Grouping, place
from ckpt.agent.groups import Member as Placed
from ckpt.agent.identity import Identity, memory_folder, parity_folder, places, run_id_of
from ckpt.agent.inventory import Candidate, Inventory, candidates
from ckpt.agent.local import Client, Described, Mapped, connect
from ckpt.agent.process import read_state
from ckpt.agent.restore import SnapshotStore
from ckpt.agent.spawn import start_or_adopt
from ckpt.agent.transport.client import Peer
from ckpt.agent.transport.credentials import SECRET_BYTES, Credentials
from ckpt.commit.complete import Request
from ckpt.config import AGENT_ADDRESSES_MAX, AGENT_RECORD_BYTES_MAX, Memory, Options
from ckpt.engine.world import World, gather_or_raise
from ckpt.errors import AgentError, CheckpointError, InvalidInputError, PeerError, SaveFailedError

_POLL_S = (0.002, 0.1)  # between two questions to the agent: at first, and at most
_REVIVE_S = 10.0  # between two attempts to start an agent that has died
_REST_BYTES = 4 << 20  # room for a receipt beside what the size of the image suggests
_log = logging.getLogger("ckpt")


@dataclass(frozen=True, kw_only=True)
class _Seat:
    """One rank, as all ranks know it."""

    host: str
    domain: str
    address: str  # to bind to
    seat: int = 0  # number of the rank among those of its host


class Tier:
    """One rank's way to the memory tier. Owned by the training thread; `keep`, `flush` and waits by whoever finishes saves."""

    def __init__(
        self, url: str, world: World, memory: Memory, options: Options, storage: Mapping[str, Any] | None
    ) -> None:
        # The agent has another working folder.
        self._url = url if "://" in url else os.path.abspath(url)
        self._world, self._memory, self._options = world, memory, options
        self._storage = dict(storage or {})
        self._run_id = run_id_of(url)
        self._taken: dict[int, tuple[Described, Mapped, Client]] = {}  # address of the memory -> what it is, and whose
        self._mapped: dict[str, Mapped] = {}
        self._client: Client | None = None
        self._secret = b""
        self._group: Group | None = None
        self._capacity_bytes = 0
        self._inventories: list[Inventory] = []
        self._own_address = ""
        self._epoch = 0
        self._joined: dict[str, Any] = {}  # what the agent was told of its group
        self._reviving: threading.Thread | None = None
        self._revive_at = 0.0  # of `time.monotonic`: not before
        self._closing = False
        self._lock = threading.Lock()  # of the client and what is mapped, where an agent is started anew
        self._left = threading.Event()  # the process ends: nobody waits for the agent any more
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
        epoch = 1 + max(int(one["epoch"]) for one in known)
        self._secret = bytes.fromhex(next((one["secret"] for one in known if one["secret"]), ""))
        if not self._secret:
            fresh = self._gather({"secret": secrets.token_hex(SECRET_BYTES) if rank == 0 else ""})
            self._secret = bytes.fromhex(fresh[0]["secret"])
        self._epoch = epoch
        found = self._together(lambda: self._start(epoch, mine), "agents may have been started")
        self._addresses = [str(one["address"]) for one in found]
        self._own_address = self._addresses[rank]
        held = [Inventory.from_fields(fields) for one in found for fields in one["held"]]
        self._inventories = held

    def _where(self) -> dict[str, Any]:
        host = os.environ.get("CKPT_NODE") or socket.gethostname()
        domain = os.environ.get("CKPT_FAILURE_DOMAIN") or host
        return {"host": host, "domain": domain, "address": self._memory.address or own_address()}

    def _look(self) -> dict[str, Any]:
        """What an agent of this seat knows already, or the one that has died knew."""
        where = places(self._identity, self._options)
        try:
            client = connect(where.socket, self._identity, self._options, role="observer")
            try:
                return {"epoch": client.status()["epoch"], "secret": client.call("meet")[0]["secret"]}
            finally:
                client.close()
        except AgentError as error:
            if error.kind not in ("no-agent", "agent-gone"):
                raise
            return {"epoch": max(0, read_state(where)["epoch"]), "secret": None}

    def _start(self, epoch: int, mine: _Seat) -> dict[str, Any]:
        self._client = start_or_adopt(self._identity, self._options, epoch=epoch)
        address = self._listen(self._client, port=0)
        held = [self._client.call("inventory", timeout_s=self._options.inventory_timeout_s)[0]]
        if mine.seat == 0:
            found = self._ask_unattached("inventory", {}, timeout_s=self._options.inventory_timeout_s)
            held += [one for one in found if one["address"]]
        return {"address": address, "held": held}

    def _listen(self, client: Client, *, port: int) -> str:
        """Let the agent serve its peers; its address.

        Args:
            port: where peers look for it already; another one is taken when that is not free.
        """
        mine = self._seats[self._world.rank]
        params = {"secret": self._secret.hex(), "host": mine.address, "port": port}
        return str(client.call("listen", params)[0]["address"])

    def _ask_unattached(self, method: str, params: dict[str, Any], *, timeout_s: float) -> list[dict[str, Any]]:
        """What agents of this host answer whose seat nobody takes any more."""
        out = []
        num_seats = sum(one.host == self._seats[self._world.rank].host for one in self._seats)
        for found in discover.agents(self._options, run_id=self._run_id):
            if found.status is None or found.identity.rank < num_seats:
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
        capacity = nbytes + nbytes // 64 + _REST_BYTES
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
            self._capacity_bytes, self._group = capacity, group
            # All vote at rank 0's agent: of a new one, all must hear.
            self._joined = {**params, "tell": everybody if self._world.rank == 0 else near}

        def work() -> dict[str, Any]:
            client, _ = self._working()
            if client is None:
                return {}  # the one that is started in its place reserves; what is for the store is saved all the same
            try:
                mapped = self._reserve(client, capacity, params)
            except AgentError as error:
                if error.kind not in ("agent-gone", "timeout"):
                    raise
                _log.warning("no memory was reserved: %s", error.message)
                return {}
            with self._lock:
                if client is self._client:
                    self._mapped = mapped
            return {}

        self._together(work, "nothing was saved")

    def _reserve(self, client: Client, capacity_bytes: int, join: dict[str, Any]) -> dict[str, Mapped]:
        mapped = {one.name: one for one in client.reserve(capacity_bytes)}
        client.call("join", join, timeout_s=self._options.agent_start_timeout_s + join["parity_bytes"] / 50e6)
        return mapped

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

    # saves (engine/keeper.py)

    def begin(self, step: int, attempt: str, nbytes: int) -> NDArray[np.uint8] | None:
        """As Keeper.begin."""
        client, mapped = self._working()
        if client is None:
            return None
        try:
            if nbytes + nbytes // 64 + _REST_BYTES > self._capacity_bytes:
                _log.warning("step %d: an image of %d bytes does not fit into the agent's memory", step, nbytes)
                client.call("pass_over", {"step": step, "attempt": attempt})
                return None
            began = client.begin(step, attempt)
            found = mapped[began.name]
            if any(found.is_same(other) for _, other, _ in self._taken.values()):
                # A copy for the agent that has died still writes there.
                client.abandon(began)
                return None
        except AgentError as error:
            if error.kind in ("busy", "agent-gone", "timeout"):
                _log.warning("step %d is not kept in memory: %s", step, error.message)
                return None
            raise
        memory = np.frombuffer(found.memory, np.uint8)
        self._taken[memory.ctypes.data] = began, found, client
        return memory

    def _working(self) -> tuple[Client | None, dict[str, Mapped]]:
        """The agent, unless it has died; then another one is started meanwhile, which takes over what lies in memory."""
        with self._lock:
            client, mapped = self._client, self._mapped
            if client is None or client.is_open or self._closing:
                return client, mapped
            if self._reviving is None and time.monotonic() >= self._revive_at:
                _log.warning("the agent of rank %d is gone; another one is started", self._world.rank)
                self._reviving = threading.Thread(target=self._revive, name="ckpt-revive", daemon=True)
                self._reviving.start()
            return None, mapped

    def _revive(self) -> None:
        """Start an agent in place of one that has died, and tell its peers where it is. No collective call."""
        client: Client | None = None
        try:
            client = start_or_adopt(self._identity, self._options, epoch=self._epoch)
            address = self._listen(client, port=int(self._own_address.rpartition(":")[2]))
            while not self._take_over(client, address):
                pass  # other room was asked for meanwhile
        except CheckpointError as error:
            _log.warning("no agent for rank %d: %s", self._world.rank, error.message)
            if client is not None:
                client.close()
            with self._lock:
                self._reviving, self._revive_at = None, time.monotonic() + _REVIVE_S
            return
        _log.warning("rank %d has an agent again, pid %s", self._world.rank, client.agent.get("pid"))

    def _take_over(self, client: Client, address: str) -> bool:
        capacity, joined = self._capacity_bytes, self._joined
        mapped = self._reserve(client, capacity, joined) if joined else {}
        with self._lock:
            if joined is not self._joined:
                return False
            self._client, self._mapped, self._own_address, self._reviving = client, mapped, address, None
            return True

    def seal(
        self, memory: NDArray[np.uint8], *, image_bytes: int, receipt: bytes, request: Request, changed: bool
    ) -> None:
        """As Keeper.seal."""
        began, _, client = self._taken[memory.ctypes.data]
        rest = blob.pack_rest(receipt, request)
        blob_bytes = image_bytes + len(rest)
        if blob_bytes + AGENT_RECORD_BYTES_MAX > len(memory):
            raise SaveFailedError(
                f"the receipt of step {request.step} has {len(rest):,} bytes, more than there is room for",
                kind="no-room",
            )
        memory[image_bytes:blob_bytes] = np.frombuffer(rest, np.uint8)
        params = {
            "name": began.name,
            "generation": began.generation,
            "image_bytes": image_bytes,
            "blob_bytes": blob_bytes,
            "changed": changed,
        }
        client.call("keep", params)

    def flush(self, memory: NDArray[np.uint8]) -> None:
        """As Keeper.flush."""
        began, _, client = self._taken[memory.ctypes.data]
        params = {
            "name": began.name,
            "generation": began.generation,
            "url": self._url,
            "storage_options": self._storage,
            "options": options_for_agent(self._options),
        }
        client.call("flush", params)

    def stored(self, step: int, attempt: str, timeout_s: float) -> bool:
        """As Keeper.stored."""
        answer = self._poll("stored", step, attempt, ("running",), timeout_s)
        if answer["state"] == "failed":
            raise wire.rebuilt(answer["error"])
        if answer["state"] != "stored":
            raise AgentError(f"the agent does not know of step {step}: it was started anew", kind="agent-gone")
        return bool(answer["changed"])

    def protected(self, step: int, attempt: str, timeout_s: float) -> bool:
        """As Keeper.protected."""
        answer = self._poll("progress", step, attempt, ("protecting",), timeout_s)
        if answer["state"] != "protected":
            raise PeerError(f"step {step} is not protected: {answer['error'] or answer['state']}", kind="peer-failed")
        return bool(answer["changed"])

    def _poll(self, method: str, step: int, attempt: str, running: tuple[str, ...], timeout_s: float) -> dict[str, Any]:
        client = self._client  # one that was started anew knows nothing of it
        assert client is not None
        ends_at, pause_s = time.monotonic() + timeout_s, _POLL_S[0]
        while True:
            if self._left.is_set():
                raise SaveFailedError(f"the process ends; its agent goes on with step {step}", kind="left")
            answer = client.call(method, {"step": step, "attempt": attempt})[0]
            if answer["state"] not in running:
                return answer
            if time.monotonic() > ends_at:
                raise SaveFailedError(f"step {step} is not over after {timeout_s:.0f} s", kind="timeout")
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _POLL_S[1])

    def release(self, memory: NDArray[np.uint8], *, sealed: bool) -> None:
        """As Keeper.release."""
        began, _, client = self._taken.pop(memory.ctypes.data)
        if not sealed and client.is_open:
            try:
                client.abandon(began)
            except CheckpointError as error:
                _log.warning("the agent did not hear that step %d was given up: %s", began.step, error.message)

    def leave(self) -> None:
        """As Keeper.leave."""
        self._left.set()

    def close(self, *, over: bool) -> None:
        """As Keeper.close."""
        with self._lock:
            self._closing, reviving = True, self._reviving
        if reviving is not None:
            reviving.join(self._options.agent_start_timeout_s)
        client, self._client = self._client, None
        try:
            if client is not None and over:
                client.bye()
            elif client is not None:
                client.close()
        except CheckpointError as error:
            _log.warning("the agent did not take its leave: %s", error.message)
        if over:
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """What an agent left that died, when the job ends before there is another one to take it over."""
        for folder in (memory_folder(self._options), parity_folder(self._options)):
            for left in segments.leftovers(folder):
                if left.header is not None and left.header.belongs_to(self._identity):
                    segments.remove(left)

    # the way back

    def settle(self) -> None:
        """As MemoryTier.settle: a flush goes on if all ranks of its job take part, which is known to no agent alone."""
        timeout_s = self._options.agent_call_timeout_s
        mine = self._seats[self._world.rank]

        def ask(method: str, params: dict[str, Any]) -> list[dict[str, Any]]:
            assert self._client is not None
            others = self._ask_unattached(method, params, timeout_s=timeout_s) if mine.seat == 0 else []
            return [self._client.call(method, params, timeout_s=timeout_s)[0], *others]

        found = self._together(lambda: {"agents": ask("flushes", {})}, "nothing was changed")
        flushes = [one for rank in found for agent in rank["agents"] for one in agent["flushes"]]
        if all(is_done for *_, is_done in flushes):
            return
        taking_part = Counter((step, attempt, world) for step, attempt, world, _ in flushes)
        keep = [[step, attempt] for (step, attempt, world), count in taking_part.items() if count == world]
        self._together(lambda: {"agents": ask("settle", {"keep": keep})}, "nothing was changed")

    def candidates(self) -> list[Candidate]:
        """What the agents held when this job began, the newest step first. Equal on all ranks."""
        return candidates(self._inventories)

    def chosen(self, number: int | None) -> None:
        """As MemoryTier.chosen: what else this rank's agent holds is dropped."""
        client, _ = self._working()
        if client is None:
            return
        params: dict[str, Any] = {}
        if number is not None:
            candidate = self.candidates()[number]
            params = {"step": candidate.step, "attempt": candidate.attempt}
        try:
            client.call("choose", params)
        except AgentError as error:  # this rank alone knows, and all have loaded
            _log.warning("the agent of rank %d did not hear what was restored: %s", self._world.rank, error.message)

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
        client, _ = self._working()
        if client is None:
            return {}
        try:
            mapped = {one.name: one for one in client.attach()}
            of = candidate.step, candidate.attempt
            held = [mapped[one.name] for one in client.segments() if (one.step, one.attempt) == of]
            return {self._own_address: held[-1]} if held else {}
        except CheckpointError as error:
            _log.warning("rank %d reads nothing out of its own agent's memory: %s", self._world.rank, error.message)
            return {}


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
