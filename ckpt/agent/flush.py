"""Write sealed images to the store and complete the checkpoints that they are parts of, also when the trainer is gone.

In: requests of the trainer to flush what it has sealed. Out: published checkpoints, or what stopped them, told to the other ranks
through the store and to the trainer when it asks. One thread writes, one image after the other; the image stays until it is
durable. Others wait for the other ranks: one that will never come, as its node is gone, holds up no later checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ckpt import config
from ckpt.agent import blob
from ckpt.agent.inventory import Card
from ckpt.agent.process import Agent
from ckpt.agent.segments import Segment
from ckpt.agent.server import Call
from ckpt.commit import names
from ckpt.commit.complete import Completion, Request
from ckpt.errors import CheckpointError, InvalidInputError, SaveFailedError
from ckpt.events import Timeline
from ckpt.kernels import set_thread_nice
from ckpt.store.base import Store
from ckpt.store.open import open_store
from ckpt.store.rate import TokenBucket

_KEPT = 16  # flushes whose outcome is remembered
_WAITING_MAX = 8  # that wait for other ranks at a time
_Value = TypeVar("_Value")


@dataclass(kw_only=True)
class _Outcome:
    state: str = "running"  # then stored, or failed
    changed: bool = False
    error: dict[str, Any] | None = None


class Flush:
    """All flushes of one agent. Handlers may be called on any thread."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[tuple[int, str], _Outcome] = OrderedDict()
        self._opened: dict[object, tuple[Store, TokenBucket]] = {}  # by what they were opened with
        self._num_waiting = 0
        self._stopping = threading.Event()
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="ckpt-flush", initializer=set_thread_nice, initargs=(agent.options.flush_nice,)
        )

    def begin(self, call: Call) -> dict[str, Any]:
        """Flush a sealed image into the run at `url`; returns at once."""
        url, storage = call.text("url"), call.params.get("storage_options") or {}
        name, generation = call.text("name"), call.integer("generation")
        given = config.Options(**call.params.get("options", {}))
        pin = self._agent.slots.pinned(name, generation)
        segment = pin.__enter__()
        of = segment.header.step, segment.header.attempt
        with self._lock:
            self._outcomes[of] = _Outcome()
            while len(self._outcomes) > _KEPT:
                self._outcomes.popitem(last=False)

        def work() -> None:
            try:
                rest = self._told(of, lambda: self._write(segment, *self._open(url, storage, given), given))
            finally:
                pin.__exit__(None, None, None)
            if rest is not None:
                self._wait(of, rest)

        try:
            self._thread.submit(work)
        except BaseException:
            pin.__exit__(None, None, None)
            raise
        return {}

    def stored(self, call: Call) -> dict[str, Any]:
        """What became of a flush: `running`, `stored`, `failed`, `unknown`."""
        with self._lock:
            found = self._outcomes.get((call.integer("step"), call.text("attempt")))
            if found is None:
                return {"state": "unknown", "changed": False, "error": None}
            return {"state": found.state, "changed": found.changed, "error": found.error}

    def stop(self, deadline: float) -> None:
        """Finish what is under way until `deadline`, then abandon it: what lies there no reader takes for a checkpoint."""
        while time.monotonic() < deadline and any(one.state == "running" for one in list(self._outcomes.values())):
            time.sleep(0.01)
        self._stopping.set()
        self._thread.shutdown(cancel_futures=True)
        for store, _ in self._opened.values():
            store.close()

    def _told(self, of: tuple[int, str], work: Callable[[], _Value]) -> _Value | None:
        """What `work` gives; None when it failed, which is told to the trainer, the other ranks and the log."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - as said above
            known = error if isinstance(error, CheckpointError) else SaveFailedError(f"{type(error).__name__}: {error}")
            outcome = self._outcomes.get(of) or _Outcome()
            outcome.error = {"class": type(known).__name__, "kind": known.kind, "message": known.message}
            outcome.state = "failed"
            self._agent.log.tell("not-stored", step=of[0], attempt=of[1], error=known.message)
            return None

    def _wait(self, of: tuple[int, str], rest: Callable[[], bool]) -> None:
        """What is left to do, on a thread of its own: it may take as long as the slowest rank. A daemon, for the same reason."""
        start = time.monotonic()

        def work() -> None:
            set_thread_nice(self._agent.options.flush_nice)
            try:
                changed = self._told(of, rest)
            finally:
                with self._lock:
                    self._num_waiting -= 1
            if changed is not None:
                outcome = self._outcomes.get(of) or _Outcome()
                outcome.changed = changed
                outcome.state = "stored"
                self._agent.log.tell("stored", step=of[0], attempt=of[1], seconds=time.monotonic() - start)

        while self._num_waiting >= _WAITING_MAX and not self._stopping.is_set():
            time.sleep(0.01)
        with self._lock:
            self._num_waiting += 1
        threading.Thread(target=work, name="ckpt-flush-wait", daemon=True).start()

    def _open(self, url: str, storage: dict[str, Any], options: config.Options) -> tuple[Store, TokenBucket]:
        """The store, and how fast it may be written to."""
        key = (url, repr(sorted(storage.items())), options)
        if key not in self._opened:
            rate = TokenBucket(
                bytes_per_s=options.write_bytes_per_s_max, burst_bytes=options.chunk_bytes, now_s=time.monotonic()
            )
            self._opened[key] = open_store(url, options=options, storage_options=storage or None), rate
        return self._opened[key]

    def _write(self, segment: Segment, store: Store, rate: TokenBucket, options: config.Options) -> Callable[[], bool]:
        """The image is durable when this returns. The rest: receipt, then as rank 0 publish; whether a structure changed."""
        payload = segment.payload()[: segment.header.image_bytes]
        what = f"the image of step {segment.header.step}"
        record, nbytes = blob.read_record(payload, what=what)
        card = Card.from_fields(record)
        receipt, request = blob.unpack_rest(bytes(payload[card.image_bytes : nbytes]), what=what)
        completion = Completion(store, options, rank=card.rank, world=card.world)
        with completion.telling_others(card.step, card.attempt):
            key = f"{names.attempt_folder(card.step, card.attempt)}/{names.image_name(card.rank, card.world)}"
            self._write_image(store, rate, key, payload[: card.image_bytes], options)

        def rest() -> bool:
            with completion.telling_others(card.step, card.attempt):
                decide = self._refuse_when_stopping(request)
                return completion.complete(request, card.attempt, receipt, Timeline(), decide)

        return rest

    def _write_image(
        self, store: Store, rate: TokenBucket, key: str, image: memoryview, options: config.Options
    ) -> None:
        writer = store.open_writer(key, nbytes=len(image))
        write = getattr(writer, "write_lasting", writer.write)
        try:
            for low in range(0, len(image), options.chunk_bytes):
                if self._stopping.is_set():
                    raise SaveFailedError("the agent ends", kind="abandoned")
                part = image[low : low + options.chunk_bytes]
                time.sleep(rate.take(len(part), now_s=time.monotonic()))
                write(part)
            writer.commit()
        except BaseException:
            writer.abort()
            raise

    def _refuse_when_stopping(self, request: Request) -> Any:
        def decide() -> None:
            if self._stopping.is_set():
                raise SaveFailedError(f"step {request.step} was given up: the agent ends", kind="abandoned")

        return decide


def options_for_agent(options: config.Options) -> dict[str, Any]:
    """Those that differ from the defaults, for a request."""
    import dataclasses

    default = config.Options()
    mine = dataclasses.asdict(options)
    out = {name: value for name, value in mine.items() if value != getattr(default, name)}
    if any(not isinstance(value, str | int | float | bool | None) for value in out.values()):
        raise InvalidInputError("options for an agent must be plain values")
    return out
