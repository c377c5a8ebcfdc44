"""What an agent does with its group: seal, protect by parity, vote, serve, and tell what it holds.

In: requests of its trainer (local socket) and of peers (transport). Out: snapshots that any `parity` members of the group may be
lost of. One thread protects, one snapshot after the other. A snapshot counts once the agent of rank 0 has the votes of all ranks;
the one before is kept until then. Never pushes a byte to a peer, never calls the trainer.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ckpt import failpoints
from ckpt.agent import blob, protect, segments
from ckpt.agent.flush import Flush
from ckpt.agent.header import State
from ckpt.agent.identity import memory_folder
from ckpt.agent.inventory import Card, Inventory, Parity
from ckpt.agent.process import Agent
from ckpt.agent.segments import Segment
from ckpt.agent.server import Call
from ckpt.agent.slots import Slots, describe
from ckpt.agent.transport.client import Peer
from ckpt.agent.transport.credentials import SECRET_BYTES, Credentials
from ckpt.agent.transport.server import Server
from ckpt.agent.transport.wire import Key
from ckpt.errors import AgentError, CheckpointError, DamagedError, InvalidInputError, PeerError
from ckpt.kernels import crc32c, crc32c_combine

_VOTES_KEPT = 16  # snapshots of which the agent of rank 0 remembers who voted
_VOTE_S = (0.005, 0.25)  # between two questions whether all have voted: at first, and at most
_TELL_S = 2.0  # the agent of rank 0 that ends waits so long for others to ask what became of a vote


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Who is who in the job that the trainer belongs to."""

    rank: int
    world: int
    members: tuple[int, ...]  # ranks of this group, in order
    parity: int
    addresses: dict[int, str]  # of the members' agents and of rank 0's
    peers: dict[int, Peer] = field(repr=False)  # of the same, but for this rank's own
    over: threading.Event = field(default_factory=threading.Event, repr=False)  # the trainer has joined another group

    def end(self) -> None:
        """Stop what is under way with its peers: some may be gone, and would be waited for."""
        self.over.set()
        for peer in self.peers.values():
            peer.close()


@dataclass(kw_only=True)
class _Progress:
    """How far one snapshot is."""

    state: str = "protecting"  # then protected, or failed
    error: str = ""
    changed: bool = False  # a structure, on some rank
    facts: dict[str, Any] = field(default_factory=dict)


class Member:
    """A plugin of process.py. Handlers run on threads of their own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._server: Server | None = None
        self._secret: bytes | None = None
        self._membership: Membership | None = None
        self._progress: OrderedDict[tuple[int, str], _Progress] = OrderedDict()
        self._votes: OrderedDict[tuple[int, str, int], dict[int, bool]] = OrderedDict()
        self._untold: set[int] = set()  # ranks that have not heard that the newest vote is complete
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ckpt-protect")

    def start(self, agent: Agent) -> None:
        """Add the methods, take over parity that an earlier agent left."""
        self._agent = agent
        folder = memory_folder(agent.options)
        folder = folder.with_name(f"{folder.name}-parity")
        self._parity = Slots(folder, agent.identity, agent.options, complete=State.PROTECTED)
        swept = segments.sweep(folder, agent.identity, lease_s=agent.options.agent_lease_s)
        self._parity.take(swept.adopted)
        agent.slots.complete = State.PROTECTED
        self._flush = Flush(agent)
        handlers = {
            "meet": self._meet,
            "listen": self._listen,
            "join": self._join,
            "begin": self._begin,
            "keep": self._keep,
            "progress": self._tell_progress,
            "choose": self._choose,
            "inventory": lambda call: self.inventory().fields(),
            "flush": self._flush.begin,
            "flushes": self._flush.running,
            "settle": self._flush.settle,
            "stored": self._flush.stored,
        }
        agent.server.handlers.update(handlers)
        agent.server.open_methods |= {"meet", "inventory", "flushes", "settle"}

    def stop(self, deadline: float) -> None:
        """End what is under way, and give the parity back."""
        told_by = min(deadline, time.monotonic() + _TELL_S)
        while self._untold and time.monotonic() < told_by:
            time.sleep(_VOTE_S[0])
        if self._membership is not None:
            self._membership.end()
        self._flush.stop(deadline)
        self._thread.shutdown(cancel_futures=True)
        if self._server is not None:
            self._server.close()
        self._parity.close()

    # the trainer asks

    def _meet(self, call: Call) -> dict[str, Any]:
        """Where peers find this agent, and the secret of the run; to the same user only (server.py)."""
        address = None if self._server is None else self._server.address
        return {"address": address, "secret": None if self._secret is None else self._secret.hex()}

    def _listen(self, call: Call) -> dict[str, Any]:
        """Serve peers who know the secret, on one interface; again with another secret or host."""
        secret, host = bytes.fromhex(call.text("secret")), call.text("host")
        if len(secret) != SECRET_BYTES:
            raise InvalidInputError(f"the secret of a run is {SECRET_BYTES} random bytes")
        with self._lock:
            if self._server is None or (secret, host) != (self._secret, self._server.address.rpartition(":")[0]):
                if self._server is not None:
                    self._server.close()
                self._secret = secret
                self._server = Server(
                    self, self._credentials(), host=host, port=call.integer("port"), options=self._agent.options
                )
            return {"address": self._server.address}

    def _credentials(self) -> Credentials:
        assert self._secret is not None
        identity = self._agent.identity
        return Credentials(run_id=identity.run_id.hex, secret=self._secret, member=f"{os.getpid()}-{identity.label}")

    def _join(self, call: Call) -> dict[str, Any]:
        """Be a member of a group, from now on."""
        given, own = call.params, call.integer("rank")
        addresses = {int(rank): str(address) for rank, address in given["addresses"].items()}
        credentials = self._credentials()
        membership = Membership(
            rank=own,
            world=call.integer("world", low=1),
            members=tuple(int(rank) for rank in given["members"]),
            parity=call.integer("parity"),
            addresses=addresses,
            peers={rank: Peer(at, credentials, self._agent.options) for rank, at in addresses.items() if rank != own},
        )
        parity_bytes = call.integer("parity_bytes")
        if parity_bytes and membership.parity:
            self._parity.reserve(parity_bytes)
        with self._lock:
            old, self._membership = self._membership, membership
        if old is not None:
            old.end()
        self._agent.log.tell("joined", rank=membership.rank, world=membership.world, members=list(membership.members))
        return {}

    def _begin(self, call: Call) -> dict[str, Any]:
        """As in methods.py; what was sealed and never protected makes way."""
        step, attempt, session = call.integer("step"), call.text("attempt"), call.session
        slots = self._agent.slots
        self._drop_failed(slots)
        segment = slots.begin(step=step, attempt=attempt, epoch=session.epoch, world=session.world)
        return describe(segment)

    def _drop_failed(self, slots: Slots) -> None:
        """Sealed snapshots whose protection has failed, but for the newest whole one: it may be all that is left."""
        with self._lock:
            running = {of for of, one in self._progress.items() if one.state == "protecting"}
        sealed = [h for h in slots.headers() if h.state is State.SEALED and (h.step, h.attempt) not in running]
        newest = slots.newest()
        keep = max((h.generation for h in sealed), default=-1) if newest is None else -1
        for segment in slots.all():
            header = segment.header
            if header.state is State.SEALED and header in sealed and header.generation != keep:
                slots.discard(segment.name, header.generation)

    def _keep(self, call: Call) -> dict[str, Any]:
        """The trainer has written a blob: take its checksum, and begin to protect it."""
        membership = self._membership
        if membership is None:
            raise AgentError("the trainer has not joined a group", kind="not-joined")
        name, generation = call.text("name"), call.integer("generation")
        blob_bytes, image_bytes = call.integer("blob_bytes"), call.integer("image_bytes")
        with self._agent.slots.pinned(name, generation) as segment:
            memory = segment.payload()
            if blob_bytes > len(memory):
                raise InvalidInputError(f"a blob of {blob_bytes:,} bytes in a segment of {len(memory):,}")
            crc = crc32c(memory[:blob_bytes])
            card = Card(
                rank=membership.rank,
                world=membership.world,
                step=segment.header.step,
                attempt=segment.header.attempt,
                image_bytes=image_bytes,
                blob_bytes=blob_bytes,
                crc32c=crc,
                members=membership.members,
                parity=membership.parity,
            )
            total, crc = _end_payload(memory, blob_bytes, crc, card.fields())
            of = (card.step, card.attempt)
            with self._lock:
                self._progress[of] = _Progress(changed=bool(call.params.get("changed")))
                while len(self._progress) > _VOTES_KEPT:
                    self._progress.popitem(last=False)
            self._agent.slots.seal(name, generation, total, crc)
        self._thread.submit(self._protect, name, generation, card, membership)
        return {}

    def _choose(self, call: Call) -> dict[str, Any]:
        """The job goes on from this snapshot, or from the store (no step): others were given up, and must not stand in the
        way of new ones."""
        of = None if call.params.get("step") is None else (call.integer("step"), call.text("attempt"))
        if self._membership is not None:
            self._membership.end()
        self._thread.submit(lambda: None).result(max(0.0, call.deadline - time.monotonic()))  # what it did is over
        for slots in (self._agent.slots, self._parity):
            for header in slots.headers():
                if header.is_complete and (header.step, header.attempt) != of:
                    name = next(one.name for one in slots.all() if one.header.generation == header.generation)
                    slots.discard(name, header.generation)
                elif header.state is State.SEALED:
                    name = next(one.name for one in slots.all() if one.header.generation == header.generation)
                    slots.protect(name, header.generation)
        self._agent.log.tell("chosen", step=None if of is None else of[0], attempt=None if of is None else of[1])
        return {}

    def _tell_progress(self, call: Call) -> dict[str, Any]:
        """How far a snapshot is: `protecting`, `protected`, `failed`, or `unknown`."""
        with self._lock:
            one = self._progress.get((call.integer("step"), call.text("attempt")))
        if one is None:
            return {"state": "unknown", "error": "", "changed": False, "facts": {}}
        return {"state": one.state, "error": one.error, "changed": one.changed, "facts": one.facts}

    # protecting

    def _protect(self, name: str, generation: int, card: Card, membership: Membership) -> None:
        of = (card.step, card.attempt)
        start = time.monotonic()
        try:
            facts = self._make_and_vote(name, generation, card, membership)
        except Exception as error:  # noqa: BLE001 - told to the trainer and the log; the snapshot before stands
            text = error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            self._agent.log.tell("not-protected", step=card.step, attempt=card.attempt, error=text)
            with self._lock:
                self._progress[of] = _Progress(state="failed", error=text)
            return
        facts["seconds"] = time.monotonic() - start
        self._agent.log.tell("protected", step=card.step, attempt=card.attempt, **facts)
        with self._lock:
            one = self._progress[of]
            one.facts, one.state = facts, "protected"

    def _make_and_vote(self, name: str, generation: int, card: Card, membership: Membership) -> dict[str, Any]:
        options, peers, stopped = self._agent.options, membership.peers, membership.over.is_set
        ends_at = time.monotonic() + options.protect_timeout_s
        facts: dict[str, Any] = {}
        made: tuple[Segment, int] | None = None
        failpoints.hit("agent.before-parity")
        if card.parity:
            cards = protect.cards_of_group(card, peers, ends_at=ends_at, stopped=stopped)
            self._drop_failed(self._parity)
            segment = self._parity.begin(step=card.step, attempt=card.attempt, epoch=0, world=card.world)
            generation_of_parity = segment.header.generation
            try:
                memory = segment.payload()
                done = protect.make_parity(
                    cards,
                    card.rank,
                    peers,
                    memory,
                    run_id=self._agent.identity.run_id.hex,
                    options=options,
                    ends_at=ends_at,
                    stopped=stopped,
                )
                nbytes = len(card.members) and card.parity * done.parity.block_bytes
                total, crc = _end_payload(memory, nbytes, crc32c(memory[:nbytes]), done.parity.fields())
                self._parity.seal(segment.name, generation_of_parity, total, crc)
            except BaseException:
                self._parity.discard(segment.name, generation_of_parity)
                raise
            made = segment, generation_of_parity
            facts = {"pulled_bytes": done.pulled_nbytes, "pull_s": done.pull_s, "code_s": done.code_s}
        # The parity stays when the vote fails, until the next snapshot needs its room: others may have seen it succeed.
        failpoints.hit("agent.before-vote")
        changed = self._vote(card, ends_at, membership)
        with self._lock:
            self._progress[card.step, card.attempt].changed |= changed
        failpoints.hit("agent.before-protected")
        if made is not None:
            self._parity.protect(made[0].name, made[1])
        self._agent.slots.protect(name, generation)
        return facts

    def _vote(self, card: Card, ends_at: float, membership: Membership) -> bool:
        """Tell rank 0's agent that this rank's part is protected, and wait until all are. Whether a structure changed."""
        changed = self._progress[card.step, card.attempt].changed
        payload = {
            "step": card.step, "attempt": card.attempt, "world": card.world, "rank": card.rank, "changed": changed,
        }  # fmt: skip
        pause_s = _VOTE_S[0]
        while True:
            left_s = ends_at - time.monotonic()
            if membership.over.is_set():
                raise PeerError("the group is over", kind="peer-stopped")
            if left_s <= 0:
                raise PeerError(f"not all ranks have protected step {card.step} in time", kind="peer-late")
            if card.rank == 0:
                answer = self._count(payload)
            else:
                answer = membership.peers[0].call("vote", payload, deadline_s=left_s)
            if answer["all"]:
                return bool(answer["changed"])
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _VOTE_S[1])

    def _count(self, payload: dict[str, Any]) -> dict[str, Any]:
        of = (int(payload["step"]), str(payload["attempt"]), int(payload["world"]))
        with self._lock:
            votes = self._votes.setdefault(of, {})
            rank = int(payload["rank"])
            is_last = len(votes) == of[2] - 1 and rank not in votes
            votes[rank] = bool(payload["changed"])
            while len(self._votes) > _VOTES_KEPT:
                self._votes.popitem(last=False)
            if is_last:
                self._untold = set(range(of[2]))
            if len(votes) == of[2]:
                self._untold.discard(rank)
            return {"all": len(votes) == of[2], "changed": any(votes.values())}

    # peers ask

    def held(self, key: Key) -> memoryview | None:
        """The bytes of a blob, or of a row of parity."""
        slots = self._agent.slots if key.kind == "image" else self._parity
        for segment in slots.all():
            header = segment.header
            if not header.is_complete or (header.step, header.attempt) != (key.step, key.attempt):
                continue
            record, nbytes = blob.read_record(segment.payload()[: header.image_bytes], what=f"segment `{segment.name}`")
            found = self._part(record, nbytes, key)
            if found is not None:
                return segment.payload()[found].toreadonly()
        return None

    def _part(self, record: dict[str, Any], nbytes: int, key: Key) -> slice | None:
        if key.kind == "image":
            return slice(0, nbytes) if Card.from_fields(record).rank == key.rank else None
        parity = Parity.from_fields(record)
        place = parity.cards[0].members.index(parity.rank)
        row = (place - (key.stripe or 0)) % len(parity.cards)
        if parity.cards[0].members[0] != key.group or row != key.row or row >= parity.cards[0].parity:
            return None
        return slice(row * parity.block_bytes, (row + 1) * parity.block_bytes)

    def call(self, name: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The answer to a peer."""
        if name == "card":
            return {"card": self._card(int(payload["step"]), str(payload["attempt"]))}
        if name == "vote":
            return self._count(payload)
        if name == "inventory":
            return self.inventory().fields()
        raise InvalidInputError(f"no such message between agents: {name!r}", kind="unknown-method")

    def _card(self, step: int, attempt: str) -> dict[str, Any] | None:
        for segment in self._agent.slots.all():
            header = segment.header
            if header.is_complete and (header.step, header.attempt) == (step, attempt):
                return blob.read_record(segment.payload()[: header.image_bytes], what=f"segment `{segment.name}`")[0]
        return None

    def inventory(self) -> Inventory:
        """What is whole here: every byte is looked at, and what is damaged is dropped and told in the log."""
        blobs, parities = [], []
        for slots in (self._agent.slots, self._parity):
            for segment in slots.all():
                header = segment.header
                if not header.is_complete:
                    continue
                try:
                    if not segment.is_whole:
                        raise DamagedError(f"the checksum of segment `{segment.name}` is wrong", kind="bad-checksum")
                    payload = segment.payload()[: header.image_bytes]
                    record, _ = blob.read_record(payload, what=f"segment `{segment.name}`")
                    if slots is self._parity:
                        parities.append(Parity.from_fields(record))
                    else:
                        blobs.append(Card.from_fields(record))
                except CheckpointError as error:
                    self._agent.log.tell("damaged", step=header.step, segment=segment.name, error=error.message)
                    slots.discard(segment.name, header.generation)
        address = "" if self._server is None else self._server.address
        return Inventory(address=address, blobs=tuple(blobs), parities=tuple(parities))


def _end_payload(memory: memoryview, nbytes: int, crc: int, fields: dict[str, Any]) -> tuple[int, int]:
    """Put the record behind the first `nbytes`, whose checksum is `crc`; size and checksum of it all."""
    record = blob.pack_record(fields)
    total = nbytes + len(record)
    if total > len(memory):
        raise InvalidInputError(f"no room for a record of {len(record)} bytes behind {nbytes:,} in {len(memory):,}")
    memory[nbytes:total] = record
    return total, crc32c_combine(crc, crc32c(record), len(record))
