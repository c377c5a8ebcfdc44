"""Write sealed images to the store and complete the checkpoints that they are parts of, also when the trainer is gone.

In: requests of the trainer to flush what it has sealed. Out: published checkpoints, or what stopped them, told to the other ranks
through the store and to the trainer when it asks. One thread writes, one image after the other; the image stays until it is
durable. Others wait for the other ranks: one that will never come, as its node is gone, holds up no later checkpoint.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ckpt import config, failpoints
from ckpt.agent import blob, wire
from ckpt.agent.inventory import Card
from ckpt.agent.process import Agent
from ckpt.agent.segments import Segment
from ckpt.agent.server import Call
from ckpt.commit import names
from ckpt.commit.complete import Completion
from ckpt.commit.waiting import SystemClock
from ckpt.errors import AgentError, CheckpointError, InvalidInputError, SaveFailedError, first_line
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
    world: int = 0
    state: str = "running"  # then stored, or failed
    changed: bool = False
    error: dict[str, Any] | None = None
    given_up: threading.Event = field(default_factory=threading.Event)

    def check(self, step: int) -> None:
        """SaveFailedError when it was given up."""
        if self.given_up.is_set():
            raise SaveFailedError(
                f"step {step} was given up: the agent ends, or ranks that it needs are gone", kind="abandoned"
            )


class _Clock(SystemClock):
    """Waits that end when the flush is given up."""

    def __init__(self, outcome: _Outcome, step: int) -> None:
        self._outcome, self._step = outcome, step

    def sleep(self, pause_s: float) -> None:
        self._outcome.given_up.wait(pause_s)
        self._outcome.check(self._step)


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
            outcome = self._outcomes[of] = _Outcome(world=segment.header.world)
            while len(self._outcomes) > _KEPT:
                self._outcomes.popitem(last=False)

        def work() -> None:
            try:
                rest = self._told(of, lambda: self._write(segment, *self._open(url, storage, given), given, outcome))
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

    def running(self, call: Call) -> dict[str, Any]:
        """All flushes that are under way or done: step, attempt, ranks of its job, and whether it is done."""
        with self._lock:
            found = [(of, one) for of, one in self._outcomes.items() if one.state != "failed"]
        return {"flushes": [[*of, one.world, one.state == "stored"] for of, one in found]}

    def settle(self, call: Call) -> dict[str, Any]:
        """Give up the flushes under way but for those in `keep`, and wait until they are over: published, or never to be."""
        keep = {(int(step), str(attempt)) for step, attempt in call.params.get("keep", [])}
        with self._lock:
            others = [one for of, one in self._outcomes.items() if of not in keep and one.state == "running"]
        for one in others:
            one.given_up.set()
        while any(one.state == "running" for one in others):
            if time.monotonic() > call.deadline:
                raise AgentError("the store does not answer: a flush that was given up is not over", kind="timeout")
            time.sleep(0.005)
        return {"given_up": sum(one.state == "failed" for one in others)}

    def give_up_later(self, step: int) -> None:
        """Those of later steps than the one that the job goes on from: they are of a course that it has left."""
        with self._lock:
            later = [one for of, one in self._outcomes.items() if of[0] > step and one.state == "running"]
        for one in later:
            one.given_up.set()

    def stop(self, deadline: float) -> None:
        """Finish what is under way until `deadline`, then abandon it: what lies there no reader takes for a checkpoint."""
        while time.monotonic() < deadline and any(one.state == "running" for one in list(self._outcomes.values())):
            time.sleep(0.01)
        self._stopping.set()
        for one in list(self._outcomes.values()):
            one.given_up.set()
        self._thread.shutdown(cancel_futures=True)
        for store, _ in self._opened.values():
            store.close()

    def _told(self, of: tuple[int, str], work: Callable[[], _Value]) -> _Value | None:
        """What `work` gives; None when it failed, which is told to the trainer, the other ranks and the log."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - as said above
            known = error if isinstance(error, CheckpointError) else SaveFailedError(first_line(error))
            outcome = self._outcomes.get(of) or _Outcome()
            outcome.error = wire.described(known)
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

    def _write(
        self, segment: Segment, store: Store, rate: TokenBucket, options: config.Options, outcome: _Outcome
    ) -> Callable[[], bool]:
        """The image is durable when this returns. The rest: receipt, then as rank 0 publish; whether a structure changed."""
        payload = segment.payload()[: segment.header.image_bytes]
        what = f"the image of step {segment.header.step}"
        record, nbytes = blob.read_record(payload, what=what)
        card = Card.from_fields(record)
        receipt, request = blob.unpack_rest(bytes(payload[card.image_bytes : nbytes]), what=what)
        clock = _Clock(outcome, card.step)
        completion = Completion(store, options, rank=card.rank, world=card.world, clock=clock)

        def check() -> None:
            outcome.check(card.step)

        with completion.telling_others(card.step, card.attempt):
            key = f"{names.attempt_folder(card.step, card.attempt)}/{names.image_name(card.rank, card.world)}"
            self._write_image(store, rate, key, payload[: card.image_bytes], options, check)

        def rest() -> bool:
            with completion.telling_others(card.step, card.attempt):
                return completion.complete(request, card.attempt, receipt, Timeline(), decide=check)

        return rest

    def _write_image(
        self,
        store: Store,
        rate: TokenBucket,
        key: str,
        image: memoryview,
        options: config.Options,
        check: Callable[[], None],
    ) -> None:
        writer = store.open_writer(key, nbytes=len(image))
        write = getattr(writer, "write_lasting", writer.write)
        try:
            for low in range(0, len(image), options.chunk_bytes):
                check()
                part = image[low : low + options.chunk_bytes]
                time.sleep(rate.take(len(part), now_s=time.monotonic()))
                write(part)
                failpoints.hit("agent.in-flush")
            writer.commit()
        except BaseException:
            writer.abort()
            raise


def options_for_agent(options: config.Options) -> dict[str, Any]:
    """Those that differ from the defaults, for a request."""
    default = config.Options()
    mine = dataclasses.asdict(options)
    out = {name: value for name, value in mine.items() if value != getattr(default, name)}
    if any(not isinstance(value, str | int | float | bool | None) for value in out.values()):
        raise InvalidInputError("options for an agent must be plain values")
    return out
