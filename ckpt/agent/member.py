"""What an agent does with its group: seal, protect by parity, vote, serve, and tell what it holds.

In: requests of its trainer (local socket) and of peers (transport). Out: snapshots that any `parity` members of the group may be
lost of. One thread protects, one snapshot after the other. A snapshot counts once the agent of rank 0 has the votes of all ranks;
the one before is kept until then. Never pushes a byte to a peer, never calls the trainer.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ckpt import failpoints
from ckpt.agent import blob, protect, segments
from ckpt.agent.ballots import Ballots
from ckpt.agent.flush import Flush
from ckpt.agent.header import State
from ckpt.agent.identity import parity_folder
from ckpt.agent.inventory import Card, Parity
from ckpt.agent.look import Look
from ckpt.agent.memo import Chosen
from ckpt.agent.pieces import Pieces
from ckpt.agent.process import Agent
from ckpt.agent.server import Call
from ckpt.agent.slots import Slots, describe
from ckpt.agent.transport.client import Peer
from ckpt.agent.transport.credentials import SECRET_BYTES, Credentials
from ckpt.agent.transport.server import Server, is_free
from ckpt.agent.transport.wire import Key, is_seconds
from ckpt.config import AGENT_HOLD_S_MAX
from ckpt.errors import AgentError, CheckpointError, InvalidInputError, PeerError, first_line
from ckpt.kernels import crc32c

_KEPT = 16  # snapshots of which an agent remembers how far they are, and which will not come
_VOTE_S = (0.005, 0.25)  # between two questions whether all have voted: at first, and at most
_TELL_S = 2.0  # for a word to a peer that must not hold up anything
_TELLERS = 16  # such words at a time


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Who is who in the job that the trainer belongs to."""

    rank: int
    world: int
    members: tuple[int, ...]  # ranks of this group, in order
    parity: int
    addresses: dict[int, str]  # of agents, by rank: the members', rank 0's, and others for who looks (survey.py)


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
        self._peers: dict[int, Peer] = {}
        self._progress: OrderedDict[tuple[int, str], _Progress] = OrderedDict()
        self._ballots = Ballots(self._is_protected, self._mark_protected)
        self._missed: OrderedDict[tuple[int, str], str] = OrderedDict()  # what will not come here, and why
        self._pieces: dict[str, tuple[int, Pieces]] = {}  # segment -> generation of the blob, and its checksums
        self._newest = ("", -1)  # attempt that the trainer asked memory for last: its session and number
        self._untold: set[int] = set()  # ranks that do not know where this agent is now
        self._stopping = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ckpt-protect")

    def start(self, agent: Agent) -> None:
        """Add the methods, take over parity that an earlier agent left."""
        self._agent = agent
        folder = parity_folder(agent.options)
        self._parity = Slots(folder, agent.identity, agent.options, complete=State.PROTECTED)
        swept = segments.sweep(folder, agent.identity, lease_s=agent.options.agent_lease_s)
        self._parity.take(swept.adopted)
        agent.more_slots.append(self._parity)
        self._abandon_image = agent.server.handlers["abandon"]
        agent.slots.complete = State.PROTECTED
        self._flush = Flush(agent)
        self._look = Look(agent, self._parity, lambda: "" if self._server is None else self._server.address)
        handlers = {
            "meet": self._meet,
            "listen": self._listen,
            "join": self._join,
            "begin": self._begin,
            "abandon": self._abandon,
            "pass_over": self._pass_over,
            "keep": self._keep,
            "progress": self._tell_progress,
            "choose": self._choose,
            "inventory": lambda call: self._look.inventory(fresh=call.params.get("fresh") is not False).fields(),
            "flush": self._flush.begin,
            "flushes": self._flush.running,
            "settle": self._flush.settle,
            "stored": self._flush.stored,
        }
        agent.server.handlers.update(handlers)
        agent.on_loss.append(self._look.ahead)
        agent.server.open_methods |= {"flushes", "settle", "meet", "inventory"}

    def stop(self, deadline: float) -> None:
        """End what is under way, and give the parity back."""
        told_by = min(deadline, time.monotonic() + _TELL_S)
        while self._ballots.unheard and time.monotonic() < told_by:
            time.sleep(_VOTE_S[0])
        self._stopping.set()
        self._flush.stop(deadline)
        self._thread.shutdown(cancel_futures=True)
        if self._server is not None:
            self._server.close()
        for peer in self._peers.values():
            peer.close()
        self._parity.close()

    # the trainer asks

    def _meet(self, call: Call) -> dict[str, Any]:
        """As `known`, and the secret of the run; to the same user only (server.py)."""
        return {**self.known(), "secret": None if self._secret is None else self._secret.hex()}

    def known(self) -> dict[str, Any]:
        """Where peers find this agent and those that it knows, and which rank it is; null for what nobody said yet."""
        membership = self._membership
        return {
            "address": None if self._server is None else self._server.address,
            "rank": None if membership is None else membership.rank,
            "world": None if membership is None else membership.world,
            "addresses": {} if membership is None else {str(r): one for r, one in membership.addresses.items()},
        }

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
                port = call.integer("port", high=65535)
                port = port if port and is_free(host, port) else 0
                self._server = Server(self, self._credentials(), host=host, port=port, options=self._agent.options)
            return {"address": self._server.address}

    def _credentials(self) -> Credentials:
        assert self._secret is not None
        identity = self._agent.identity
        return Credentials(run_id=identity.run_id.hex, secret=self._secret, member=f"{os.getpid()}-{identity.label}")

    def _join(self, call: Call) -> dict[str, Any]:
        """Be a member of a group, from now on."""
        given = call.params
        membership = Membership(
            rank=call.integer("rank"),
            world=call.integer("world", low=1),
            members=tuple(int(rank) for rank in given["members"]),
            parity=call.integer("parity"),
            addresses={int(rank): str(address) for rank, address in given["addresses"].items()},
        )
        parity_bytes = call.integer("parity_bytes")
        if parity_bytes and membership.parity:
            self._parity.reserve(parity_bytes)
        with self._lock:
            self._untold = {int(rank) for rank in given.get("tell", {})} - {membership.rank}
            membership.addresses.update({int(rank): str(address) for rank, address in given.get("tell", {}).items()})
            old, self._membership = self._peers, membership
            self._peers = {
                rank: Peer(address, self._credentials(), self._agent.options)
                for rank, address in membership.addresses.items()
                if rank != membership.rank and rank in {0, *membership.members, *self._untold}
            }
        for peer in old.values():
            peer.close()
        self._agent.log.tell("joined", rank=membership.rank, world=membership.world, members=list(membership.members))
        self._tell_address()
        self._resume(membership)
        return {}

    def _resume(self, membership: Membership) -> None:
        """Go on with what an agent before this one had sealed, and may have voted for: others may count on that."""
        for name, header in self._agent.slots.by_name().items():
            of = (header.step, header.attempt)
            fields = self._card(*of) if header.state is State.SEALED else None
            if fields is None:
                continue
            card = Card.from_fields(fields)
            with self._lock:
                same = (card.rank, card.world, card.members) == (membership.rank, membership.world, membership.members)
                if of in self._progress or not same:
                    continue
                self._progress[of] = _Progress()
            self._thread.submit(self._protect, name, header.generation, card)

    def _tell_address(self) -> None:
        """Where this agent is, to those who knew the one before it; who cannot be reached is told before the next snapshot."""
        with self._lock:
            membership, server, untold = self._membership, self._server, sorted(self._untold)
            peers = dict(self._peers)
        if membership is None or server is None:
            return
        if not untold:
            return

        def tell(rank: int) -> None:
            try:
                peers[rank].call("moved", {"rank": membership.rank, "address": server.address}, deadline_s=_TELL_S)
            except CheckpointError as error:
                self._agent.log.tell("address-not-told", rank=rank, error=error.message)
                return
            with self._lock:
                self._untold.discard(rank)

        with ThreadPoolExecutor(min(len(untold), _TELLERS), thread_name_prefix="ckpt-tell") as lanes:
            list(lanes.map(tell, untold))

    def _moved(self, rank: int, address: str) -> None:
        """The agent of a rank was started anew, elsewhere."""
        with self._lock:
            membership = self._membership
            if membership is None or rank not in self._peers:
                return
            old, peer = self._peers[rank], Peer(address, self._credentials(), self._agent.options)
            self._peers = {**self._peers, rank: peer}
            self._membership = dataclasses.replace(membership, addresses={**membership.addresses, rank: address})
        old.close()
        self._agent.log.tell("peer-moved", rank=rank, address=address)

    def _begin(self, call: Call) -> dict[str, Any]:
        """As in methods.py; what was sealed and never protected makes way."""
        step, attempt, session = call.integer("step"), call.text("attempt"), call.session
        slots = self._agent.slots
        self._note(attempt)
        self._drop_failed(slots)
        try:
            segment = slots.begin(step=step, attempt=attempt, epoch=session.epoch, world=session.world)
        except AgentError as error:
            self._miss(step, attempt, error.message)
            raise
        return describe(segment)

    def _abandon(self, call: Call) -> Any:
        """As in methods.py; peers need not wait for it."""
        header = self._agent.slots.by_name().get(call.text("name"))
        answer = self._abandon_image(call)
        if header is not None and header.generation == call.integer("generation"):
            self._miss(header.step, header.attempt, "the trainer gave it up")
        return answer

    def _pass_over(self, call: Call) -> dict[str, Any]:
        """The trainer has no image of this step for its agent."""
        self._note(call.text("attempt"))
        self._miss(call.integer("step"), call.text("attempt"), "the trainer passed it over")
        return {}

    def _miss(self, step: int, attempt: str, why: str) -> None:
        """Peers that ask for this snapshot are told that it will not come, or they would wait in vain and miss the next one."""
        with self._lock:
            self._missed[step, attempt] = why
            while len(self._missed) > _KEPT:
                self._missed.popitem(last=False)

    def _note(self, attempt: str) -> None:
        """The trainer has come to this attempt. It has been at all earlier ones of its session, whether it told or not."""
        session, _, number = attempt.rpartition("-")
        if number.isdecimal():
            self._newest = session, int(number)

    def _why_missed(self, step: int, attempt: str) -> str:
        """Why a snapshot that is not held will not come; nothing while it may."""
        found = self._missed.get((step, attempt), "")
        session, _, number = attempt.rpartition("-")
        is_past = session == self._newest[0] and number.isdecimal() and int(number) < self._newest[1]
        if found or not is_past or any((h.step, h.attempt) == (step, attempt) for h in self._agent.slots.headers()):
            return found
        return "the trainer has gone on to a later one"

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
        """The trainer has written a blob, and mostly its checksums behind it: begin to protect it."""
        membership = self._membership
        if membership is None:
            raise AgentError("the trainer has not joined a group", kind="not-joined")
        name, generation = call.text("name"), call.integer("generation")
        blob_bytes, image_bytes = call.integer("blob_bytes"), call.integer("image_bytes")
        with self._agent.slots.pinned(name, generation) as segment:
            memory = segment.payload()
            if blob_bytes > len(memory):
                raise InvalidInputError(f"a blob of {blob_bytes:,} bytes in a segment of {len(memory):,}")
            summed = call.params.get("summed")
            said = Pieces.told(blob_bytes, memory[blob_bytes:], summed)
            if said is None and summed is not None:
                self._agent.log.tell("checksums-not-read", step=segment.header.step, summed=summed)
            pieces = Pieces.of(memory[:blob_bytes]) if said is None else said
            card = Card(
                rank=membership.rank,
                world=membership.world,
                step=segment.header.step,
                attempt=segment.header.attempt,
                image_bytes=image_bytes,
                blob_bytes=blob_bytes,
                crc32c=pieces.crc,
                members=membership.members,
                parity=membership.parity,
                epoch=segment.header.epoch,
            )
            total, crc = blob.end_payload(memory, blob_bytes, card.crc32c, card.fields())
            of = (card.step, card.attempt)
            self._pieces[name] = generation, pieces
            with self._lock:  # before it is sealed: what is sealed and not on its way makes way for others
                self._progress[of] = _Progress(changed=bool(call.params.get("changed")))
                while len(self._progress) > _KEPT:
                    self._progress.popitem(last=False)
            try:
                self._agent.slots.seal(name, generation, total, crc)
                self._thread.submit(self._protect, name, generation, card)
            except BaseException:
                self._failed(of, "it was not sealed")
                raise
        return {}

    def _failed(self, of: tuple[int, str], text: str) -> None:
        with self._lock:
            self._progress[of] = _Progress(state="failed", error=text)

    def _choose(self, call: Call) -> dict[str, Any]:
        """The job goes on from this snapshot, or (no step) from none. All others must neither stand in the way nor come back."""
        nothing = call.params.get("step") is None
        of = None if nothing else (call.integer("step"), call.text("attempt"))
        step, attempt = (-1, "") if of is None else of
        # First of all, so that whoever comes after a crash in between knows what does not count.
        self._agent.memo.change(chosen=Chosen(epoch=call.session.epoch, step=step, attempt=attempt))
        with self._lock:
            for slots in (self._agent.slots, self._parity):
                for name, header in slots.by_name().items():
                    if header.is_complete and (header.step, header.attempt) != of:
                        slots.discard(name, header.generation)
                    elif header.state is State.SEALED:
                        slots.protect(name, header.generation)
        if call.params.get("goes_on_from") is not None:
            self._flush.give_up_later(call.integer("goes_on_from", low=-1))
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

    def _protect(self, name: str, generation: int, card: Card) -> None:
        of = (card.step, card.attempt)
        start = time.monotonic()
        try:
            self._tell_address()
            facts = self._make_and_vote(name, generation, card)
        except Exception as error:  # noqa: BLE001 - told to the trainer and the log; the snapshot before stands
            self._agent.log.tell("not-protected", step=card.step, attempt=card.attempt, error=first_line(error))
            self._failed(of, first_line(error))
            return
        facts["seconds"] = time.monotonic() - start
        self._agent.log.tell("protected", step=card.step, attempt=card.attempt, **facts)
        with self._lock:
            one = self._progress.setdefault(of, _Progress())
            one.facts, one.state = facts, "protected"

    def _make_and_vote(self, name: str, generation: int, card: Card) -> dict[str, Any]:
        """Parity first, then the vote. What is made stays until something newer needs its place, whatever becomes of the vote."""
        ends_at = time.monotonic() + self._agent.options.protect_timeout_s

        def stopped() -> bool:
            return self._stopping.is_set() or not self._is_sealed(name, generation)

        failpoints.hit("agent.before-parity")
        try:
            facts = self._make_parity(card, ends_at, stopped) if card.parity else {}
        except BaseException as error:
            self._tell_failure(card, first_line(error))
            raise
        failpoints.hit("agent.before-vote")
        changed = self._vote(card, ends_at, stopped)
        failpoints.hit("agent.before-protected")
        with self._lock:
            self._progress.setdefault((card.step, card.attempt), _Progress()).changed |= changed
        if not self._mark_protected(card.step, card.attempt):
            raise PeerError(f"the image of step {card.step} was given up", kind="peer-stopped")
        return facts

    def _make_parity(self, card: Card, ends_at: float, stopped: Callable[[], bool]) -> dict[str, Any]:
        of = (card.step, card.attempt)
        if any(h.is_complete and (h.step, h.attempt) == of for h in self._parity.headers()):
            return {}  # an agent before this one has made it
        cards = protect.cards_of_group(card, self._peers, ends_at=ends_at, stopped=stopped)
        self._drop_failed(self._parity)
        segment = self._parity.begin(step=card.step, attempt=card.attempt, epoch=0, world=card.world)
        generation = segment.header.generation
        try:
            memory = segment.payload()
            done = protect.make_parity(
                cards,
                card.rank,
                self._peers,
                memory,
                run_id=self._agent.identity.run_id.hex,
                options=self._agent.options,
                ends_at=ends_at,
                stopped=stopped,
            )
            nbytes = card.parity * done.parity.block_bytes
            total, crc = blob.end_payload(memory, nbytes, crc32c(memory[:nbytes]), done.parity.fields())
            self._parity.seal(segment.name, generation, total, crc)
        except BaseException:
            self._parity.discard(segment.name, generation)
            raise
        return {"pulled_bytes": done.pulled_nbytes, "pull_s": done.pull_s, "code_s": done.code_s}

    def _is_sealed(self, name: str, generation: int) -> bool:
        """Whether the image still waits for its protection: nobody has chosen it, or another one."""
        header = self._agent.slots.by_name().get(name)
        return header is not None and (header.generation, header.state) == (generation, State.SEALED)

    def _mark_protected(self, step: int, attempt: str) -> bool:
        """All have voted. False: the image is gone. May be called twice."""
        with self._lock:
            for slots in (self._parity, self._agent.slots):
                for name, header in slots.by_name().items():
                    if (header.step, header.attempt) == (step, attempt) and header.state is State.SEALED:
                        slots.protect(name, header.generation)
            return self._is_protected(step, attempt)

    def _vote(self, card: Card, ends_at: float, stopped: Callable[[], bool]) -> bool:
        """Tell rank 0's agent that this rank's part is protected, and wait until all are. Whether a structure changed.

        Once the vote is out, others may count on it: so it is withdrawn when the time is over, which rank 0's agent refuses
        when all had voted. While that agent cannot be reached nobody knows, and both snapshots stay, until it can be, or the
        job begins anew.
        """
        changed = self._progress[card.step, card.attempt].changed
        payload: dict[str, Any] = {
            "step": card.step, "attempt": card.attempt, "world": card.world, "rank": card.rank, "changed": changed,
        }  # fmt: skip
        pause_s, counter, trouble = _VOTE_S[0], None, "not all ranks have protected theirs in time"
        while True:
            late = time.monotonic() > ends_at
            if late:
                payload["failed"] = trouble
            try:
                answer = self._ask_for_votes(card, payload, max(_TELL_S, ends_at - time.monotonic()))
            except PeerError as error:
                trouble = error.message
            else:
                if answer["all"]:
                    return bool(answer["changed"])
                # Its successor holds what it held, and would know if all had voted (`_count`); else it counts anew.
                lost = counter not in (None, answer["counter"]) and not answer["held"]
                counter = answer["counter"]
                if answer["failed"] or lost:
                    why = answer["failed"] or "the agent of rank 0 was started anew"
                    raise PeerError(f"step {card.step} is not protected everywhere: {why}", kind="peer-late")
            if stopped():
                raise PeerError(f"step {card.step} was given up", kind="peer-stopped")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _VOTE_S[1])

    def _ask_for_votes(self, card: Card, payload: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        if card.rank == 0:
            return self._count(payload)
        peer = self._peers.get(0)
        if peer is None:
            raise PeerError("the agent of rank 0 is not known", kind="peer-unreachable")
        return peer.call("vote", payload, deadline_s=deadline_s)

    def _tell_failure(self, card: Card, why: str) -> None:
        """So that the others do not wait for this rank's vote. It was not given, so nothing hangs on whether this arrives."""
        payload = {"step": card.step, "attempt": card.attempt, "world": card.world, "rank": card.rank, "changed": False}
        try:
            self._ask_for_votes(card, {**payload, "failed": why}, _TELL_S)
        except CheckpointError as error:
            self._agent.log.tell("failure-not-told", step=card.step, error=error.message)

    def _count(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Take a vote, or its withdrawal (ballots.py)."""
        of = (int(payload["step"]), str(payload["attempt"]))
        with self._lock:
            ballot = self._ballots.count(payload)
            return {
                "all": ballot.whole,
                "failed": ballot.failed,
                "changed": ballot.changed,
                "counter": str(self._agent.identity.incarnation),
                "held": any(h.is_complete and (h.step, h.attempt) == of for h in self._agent.slots.headers()),
            }

    def _is_protected(self, step: int, attempt: str) -> bool:
        headers = self._agent.slots.headers()
        return any((h.step, h.attempt) == (step, attempt) and h.state is State.PROTECTED for h in headers)

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

    def checksum(self, key: Key, start: int, stop: int) -> int | None:
        """What a range of a blob had when it was sealed; None where that is not known."""
        for name, header in self._agent.slots.by_name().items() if key.kind == "image" else ():
            generation, pieces = self._pieces.get(name, (-1, None))
            if (header.step, header.attempt, header.generation) == (key.step, key.attempt, generation) and pieces:
                return pieces.crc_of(start, stop)
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
            step, attempt = int(payload["step"]), str(payload["attempt"])
            return {"card": self._card(step, attempt), "missed": self._why_missed(step, attempt)}
        if name == "moved":
            self._moved(int(payload["rank"]), str(payload["address"]))
            return {}
        if name == "vote":
            return self._count(payload)
        if name == "inventory":
            return self._look.inventory(fresh=True).fields()
        if name == "known":
            return self.known()
        if name == "hold":
            return {"lease_left_s": self._agent.admission.hold(_hold_s(payload))}
        raise InvalidInputError(f"no such message between agents: {name!r}", kind="unknown-method")

    def _card(self, step: int, attempt: str) -> dict[str, Any] | None:
        for segment in self._agent.slots.all():
            header = segment.header
            if header.is_complete and (header.step, header.attempt) == (step, attempt):
                return blob.read_record(segment.payload()[: header.image_bytes], what=f"segment `{segment.name}`")[0]
        return None


def _hold_s(payload: dict[str, Any]) -> float:
    seconds = payload.get("seconds")
    if not is_seconds(seconds) or seconds > AGENT_HOLD_S_MAX:
        raise InvalidInputError(f"an agent is held for up to {AGENT_HOLD_S_MAX:.0f} s, found {seconds!r}")
    return float(seconds)
