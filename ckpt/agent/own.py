"""This rank's own agent, as its trainer uses it: kept alive, its memory mapped here, images handed over to it.

In: an identity, images with their receipts. Out: shared memory to stage images in, and what became of them (engine/keeper.py).
The training waits for an agent's memory for `agent_begin_timeout_s` and no longer: an agent that does not answer costs snapshots,
not time. One that is gone, or stays silent, is replaced meanwhile by another one, which takes over what lies in memory. Makes no
collective call.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.agent import blob, segments, spawn, wire
from ckpt.agent.flush import options_for_agent
from ckpt.agent.identity import Identity, memory_folder, parity_folder
from ckpt.agent.local import Client, Described, Mapped
from ckpt.agent.pieces import Pieces
from ckpt.commit.complete import Request
from ckpt.config import AGENT_POPULATE_BYTES, AGENT_RECORD_BYTES_MAX, Options
from ckpt.engine.keeper import Checksums
from ckpt.engine.worker import Worker
from ckpt.errors import AgentError, CheckpointError, PeerError, SaveFailedError
from ckpt.format.checksum import piece_bytes_of
from ckpt.snapshot import pinned as pins

_SUMMED_BYTES_PER_S = 200e6  # at least, by an agent on a busy machine
_POLL_S = (0.002, 0.1)  # between two questions to the agent: at first, and at most
_REVIVE_S = 10.0  # between two attempts to start an agent that has died
_CLOSE_S = 5.0  # for threads that may wait for an agent that does not answer
_REST_BYTES = 4 << 20  # room for a receipt beside what the size of the image suggests
_log = logging.getLogger("ckpt")


def capacity_of(image_bytes: int) -> int:
    """Bytes of a segment for an image and what goes with it."""
    return image_bytes + image_bytes // 64 + _REST_BYTES


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """Memory that is being staged in, or was handed over and not released."""

    began: Described
    mapped: Mapped
    client: Client


class _Room:
    """A question for memory that the training does not wait for to the end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered = threading.Event()
        self._left = False
        self.began: Described | None = None
        self.error: CheckpointError | None = None

    def ask(self, client: Client, step: int, attempt: str, *, fits: bool) -> None:
        """On a thread of its own. What comes after `wait` has left is given back."""
        began: Described | None = None
        error: CheckpointError | None = None
        try:
            if fits:
                began = client.begin(step, attempt)
            else:
                client.call("pass_over", {"step": step, "attempt": attempt})
        except CheckpointError as problem:
            error = problem
        with self._lock:
            self.began, self.error, left = began, error, self._left
            self._answered.set()
        if left and began is not None:
            with contextlib.suppress(CheckpointError):  # it is gone: nothing of this trainer counts then
                client.abandon(began)

    @property
    def is_answered(self) -> bool:
        return self._answered.is_set()

    def wait(self, seconds: float) -> bool:
        """Whether there is an answer. If not, it comes too late from now on."""
        self._answered.wait(seconds)
        with self._lock:
            self._left = not self._answered.is_set()
            return not self._left


class OwnAgent:
    """`begin` and `reserve` on the training thread, all else on whoever finishes saves. Made without an agent; see `_start`."""

    def __init__(self, url: str, options: Options, storage: dict[str, Any]) -> None:
        """
        Args:
            url: of the run, as the agent finds it from its own working folder.
        """
        self._url, self._options, self._storage = url, options, storage
        self._identity: Identity  # with `_start`
        self._epoch = 0
        self._rank = 0  # of the job, for messages
        self._client: Client | None = None
        self._own_address = ""
        self._serving: dict[str, Any] = {}  # what the agent was told for its peers: secret and interface
        self._joined: dict[str, Any] = {}  # and of its group
        self._capacity_bytes = 0
        self._pinned = False
        self._mapped: dict[str, Mapped] = {}
        self._touched: set[str] = set()  # segments whose pages are in the tables of this process
        self._taken: dict[int, _Taken] = {}  # by address of the memory
        self._asker = Worker("ckpt-ask", 0)
        self._toucher = Worker("ckpt-touch", options.copy_nice)
        self._asked: _Room | None = None  # that was not answered in time
        self._reviving: threading.Thread | None = None
        self._revive_at = 0.0  # of `time.monotonic`: not before
        self._closing = False
        self._lock = threading.Lock()  # of the client and what is mapped, where an agent is started anew
        self._left = threading.Event()  # the process ends: nobody waits for the agent any more

    def _start(self, identity: Identity, *, rank: int, epoch: int, secret: bytes, host: str) -> Client:
        """Find or start the agent, let it serve its peers, and map what it holds."""
        self._identity, self._rank, self._epoch = identity, rank, epoch
        self._serving = {"secret": secret.hex(), "host": host}
        client = self._client = spawn.start_or_adopt(identity, self._options, epoch=epoch)
        self._own_address = self._listen(client, port=0)
        self._map(client.attach())
        # The pages of what will be read and written soon, while others are waited for: half of the time of a restore else.
        self._toucher.submit(self._touch)
        return client

    def _listen(self, client: Client, *, port: int) -> str:
        """Let the agent serve its peers; its address.

        Args:
            port: where peers look for it already; another one is taken when that is not free.
        """
        return str(client.call("listen", {**self._serving, "port": port})[0]["address"])

    # its memory

    def _map(self, fresh: Sequence[Mapped]) -> dict[str, Mapped]:
        """What the agent passed, by name. Pages that are mapped here already stay where they are."""
        known, out = self._mapped, dict[str, Mapped]()
        for one in fresh:
            held = known.get(one.name)
            if held is not None and held.is_same(one):
                one.close()
                out[one.name] = held
            else:
                out[one.name] = one
                self._touched.discard(one.name)
        self._mapped = out
        return out

    def _touch(self) -> None:
        """Let this process have all pages in its tables: a copy that meets a new page takes three times as long."""
        for name, one in sorted(self._mapped.items()):
            if name in self._touched:
                continue
            self._touched.add(name)
            memory = np.frombuffer(one.memory, np.uint8)
            for low in range(0, len(memory), AGENT_POPULATE_BYTES):
                memory[low : low + AGENT_POPULATE_BYTES : mmap.PAGESIZE].max()

    def _reserve(self, client: Client, capacity_bytes: int, join: dict[str, Any]) -> None:
        fresh = client.reserve(capacity_bytes)
        client.call("join", join, timeout_s=self._options.agent_start_timeout_s + join["parity_bytes"] / 50e6)
        with self._lock:
            mapped = self._map(fresh)
        self._touch()
        if self._pinned:
            for one in mapped.values():
                pins.register(np.frombuffer(one.memory, np.uint8), owner=one)

    def _reserve_now(self, join: dict[str, Any]) -> None:
        """Memory as the job wants it from now on. An agent that is gone or does not answer gets it when it is replaced."""
        client = self._working()
        if client is not None and self._is_silent():
            client.drop()
            client = self._working()
        if client is None:
            return
        try:
            self._reserve(client, self._capacity_bytes, join)
        except AgentError as error:
            if error.kind not in ("agent-gone", "timeout"):
                raise
            _log.warning("no memory was reserved: %s", error.message)

    # whether it lives

    def _is_silent(self) -> bool:
        """Whether a question of the training was not answered in time, nor since."""
        if self._asked is not None and self._asked.is_answered:
            self._asked = None
        return self._asked is not None

    def _working(self) -> Client | None:
        """The agent, unless it has died; then another one is started meanwhile, which takes over what lies in memory."""
        with self._lock:
            client = self._client
            if client is None or client.is_open or self._closing:
                return client
            if self._reviving is None and time.monotonic() >= self._revive_at:
                _log.warning("the agent of rank %d is gone; another one is started", self._rank)
                self._reviving = threading.Thread(target=self._revive, name="ckpt-revive", daemon=True)
                self._reviving.start()
            return None

    def _revive(self) -> None:
        """Start an agent in place of one that has died, and tell its peers where it is."""
        client: Client | None = None
        try:
            client = spawn.start_or_adopt(self._identity, self._options, epoch=self._epoch)
            address = self._listen(client, port=int(self._own_address.rpartition(":")[2]))
            while not self._take_over(client, address):
                pass  # other room was asked for meanwhile
        except CheckpointError as error:
            _log.warning("no agent for rank %d: %s", self._rank, error.message)
            if client is not None:
                client.close()
            with self._lock:
                self._reviving, self._revive_at = None, time.monotonic() + _REVIVE_S
            return
        _log.warning("rank %d has an agent again, pid %s", self._rank, client.agent.get("pid"))

    def _take_over(self, client: Client, address: str) -> bool:
        capacity, joined = self._capacity_bytes, self._joined
        if joined:
            self._reserve(client, capacity, joined)
        with self._lock:
            if joined is not self._joined:
                return False
            self._client, self._own_address, self._reviving = client, address, None
            return True

    # saves (engine/keeper.py)

    def begin(self, step: int, attempt: str, nbytes: int) -> NDArray[np.uint8] | None:
        """As Keeper.begin."""
        client = self._working()
        if client is None or self._is_silent():
            return None
        fits = capacity_of(nbytes) <= self._capacity_bytes
        if not fits:
            _log.warning("step %d: an image of %d bytes does not fit into the agent's memory", step, nbytes)
        room = _Room()
        self._asker.submit(lambda: room.ask(client, step, attempt, fits=fits))
        limit_s = self._options.agent_begin_timeout_s
        if not room.wait(limit_s):
            self._asked = room
            _log.warning(
                "step %d is not kept in memory: the agent of rank %d has not answered for %.1f s, and is not waited for",
                step, self._rank, limit_s,
            )  # fmt: skip
            return None
        if room.error is not None:
            if room.error.kind not in ("busy", "agent-gone", "timeout"):
                raise room.error
            _log.warning("step %d is not kept in memory: %s", step, room.error.message)
        return None if room.began is None else self._take(client, room.began)

    def _take(self, client: Client, began: Described) -> NDArray[np.uint8] | None:
        with self._lock:
            found = self._mapped.get(began.name)
        if found is None or any(found.is_same(other.mapped) for other in self._taken.values()):
            # A copy for the agent that has died still writes there.
            self._asker.submit(lambda: client.abandon(began))
            return None
        memory = np.frombuffer(found.memory, np.uint8)
        self._taken[memory.ctypes.data] = _Taken(began=began, mapped=found, client=client)
        return memory

    def seal(
        self,
        memory: NDArray[np.uint8],
        *,
        image_bytes: int,
        receipt: bytes,
        request: Request,
        changed: bool,
        checksums: Checksums,
    ) -> None:
        """As Keeper.seal."""
        taken = self._taken[memory.ctypes.data]
        rest = blob.pack_rest(receipt, request)
        blob_bytes = image_bytes + len(rest)
        if blob_bytes + AGENT_RECORD_BYTES_MAX > len(memory):
            raise SaveFailedError(
                f"the receipt of step {request.step} has {len(rest):,} bytes, more than there is room for",
                kind="no-room",
            )
        memory[image_bytes:blob_bytes] = np.frombuffer(rest, np.uint8)
        known = Pieces.after_image(checksums(piece_bytes_of(blob_bytes)), image_bytes, rest)
        params = {
            "summed": known.tell(memory[blob_bytes:].data),
            "name": taken.began.name,
            "generation": taken.began.generation,
            "image_bytes": image_bytes,
            "blob_bytes": blob_bytes,
            "changed": changed,
        }
        # It may sum up the blob first.
        timeout_s = self._options.agent_call_timeout_s + blob_bytes / _SUMMED_BYTES_PER_S
        taken.client.call("keep", params, timeout_s=timeout_s)

    def flush(self, memory: NDArray[np.uint8]) -> None:
        """As Keeper.flush."""
        taken = self._taken[memory.ctypes.data]
        params = {
            "name": taken.began.name,
            "generation": taken.began.generation,
            "url": self._url,
            "storage_options": self._storage,
            "options": options_for_agent(self._options),
        }
        taken.client.call("flush", params)

    def take_back(self, memory: NDArray[np.uint8]) -> bool:
        """As Keeper.take_back."""
        client = self._taken[memory.ctypes.data].client
        client.drop()
        try:
            spawn.end(client.agent_pid)
        except AgentError as error:
            _log.warning("%s", error.message)
            return False
        return client.agent_pid > 0  # else it is of another pid namespace: nobody knows

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
        taken = self._taken.pop(memory.ctypes.data)
        if not sealed and taken.client.is_open:
            try:
                taken.client.abandon(taken.began)
            except CheckpointError as error:
                _log.warning("the agent did not hear that step %d was given up: %s", taken.began.step, error.message)

    def leave(self) -> None:
        """As Keeper.leave."""
        self._left.set()

    def close(self, *, over: bool) -> None:
        """As Keeper.close."""
        with self._lock:
            self._closing, reviving = True, self._reviving
        if reviving is not None:
            reviving.join(self._options.agent_start_timeout_s)
        silent = self._is_silent()
        client, self._client = self._client, None
        try:
            if client is not None and silent:
                client.drop()
                if over:
                    spawn.end(client.agent_pid)
            elif client is not None and over:
                client.bye()
            elif client is not None:
                client.close()
        except CheckpointError as error:
            _log.warning("the agent did not take its leave: %s", error.message)
        self._asker.close(_CLOSE_S)
        self._toucher.close(_CLOSE_S)
        if over:
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """What an agent left that died, when the job ends before there is another one to take it over."""
        for folder in (memory_folder(self._options), parity_folder(self._options)):
            for left in segments.leftovers(folder):
                if left.header is not None and left.header.belongs_to(self._identity):
                    segments.remove(left)
