"""Write sealed images to the store and complete the checkpoints that they are parts of, also when the trainer is gone.

In: requests of the trainer to flush what it has sealed. Out: published checkpoints, or what stopped them, told to the other ranks
through the store and to the trainer when it asks. One thread, one image after the other; the image stays until it is durable.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ckpt import config, failpoints
from ckpt.agent import blob
from ckpt.agent.inventory import Card
from ckpt.agent.process import Agent
from ckpt.agent.server import Call
from ckpt.commit import names
from ckpt.commit.complete import Completion
from ckpt.commit.waiting import SystemClock
from ckpt.errors import AgentError, CheckpointError, InvalidInputError, SaveFailedError
from ckpt.events import Timeline
from ckpt.kernels import set_thread_nice
from ckpt.store.base import Store
from ckpt.store.open import open_store
from ckpt.store.rate import TokenBucket

_KEPT = 16  # flushes whose outcome is remembered


@dataclass(kw_only=True)
class _Outcome:
    world: int
    state: str = "running"  # then stored, or failed
    changed: bool = False
    error: dict[str, Any] | None = None
    given_up: threading.Event = field(default_factory=threading.Event)

    def check(self, step: int) -> None:
        """SaveFailedError when it was given up."""
        if self.given_up.is_set():
            raise SaveFailedError(f"step {step} was given up: ranks that it needs are gone", kind="abandoned")


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
        self._store: tuple[object, Store] | None = None  # the last one, by what it was opened with
        options = agent.options
        self._rate = TokenBucket(
            bytes_per_s=options.write_bytes_per_s_max, burst_bytes=options.chunk_bytes, now_s=time.monotonic()
        )
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="ckpt-flush", initializer=set_thread_nice, initargs=(options.flush_nice,)
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
            self._outcomes[of] = _Outcome(world=segment.header.world)
            while len(self._outcomes) > _KEPT:
                self._outcomes.popitem(last=False)

        def work() -> None:
            try:
                self._run(of, segment.payload()[: segment.header.image_bytes], url, storage, given)
            finally:
                pin.__exit__(None, None, None)

        self._thread.submit(work)
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

    def stop(self, deadline: float) -> None:
        """Finish what is under way until `deadline`, then abandon it: what lies there no reader takes for a checkpoint."""
        while time.monotonic() < deadline and any(one.state == "running" for one in self._outcomes.values()):
            time.sleep(0.01)
        for one in self._outcomes.values():
            one.given_up.set()
        self._thread.shutdown(cancel_futures=True)
        if self._store is not None:
            self._store[1].close()

    def _run(
        self, of: tuple[int, str], payload: memoryview, url: str, storage: dict[str, Any], options: config.Options
    ) -> None:
        outcome, start = self._outcomes[of], time.monotonic()
        try:
            outcome.check(of[0])
            outcome.changed = self._write(of, payload, self._open(url, storage, options), options, outcome)
            outcome.state = "stored"
            self._agent.log.tell("stored", step=of[0], attempt=of[1], seconds=time.monotonic() - start)
        except Exception as error:  # noqa: BLE001 - told to the trainer, the other ranks and the log
            known = error if isinstance(error, CheckpointError) else SaveFailedError(f"{type(error).__name__}: {error}")
            outcome.error = {"class": type(known).__name__, "kind": known.kind, "message": known.message}
            outcome.state = "failed"
            self._agent.log.tell("not-stored", step=of[0], attempt=of[1], error=known.message)

    def _open(self, url: str, storage: dict[str, Any], options: config.Options) -> Store:
        key = (url, repr(sorted(storage.items())), options)
        if self._store is None or self._store[0] != key:
            if self._store is not None:
                self._store[1].close()
            self._store = key, open_store(url, options=options, storage_options=storage or None)
        return self._store[1]

    def _write(
        self, of: tuple[int, str], payload: memoryview, store: Store, options: config.Options, outcome: _Outcome
    ) -> bool:
        """Image durable, receipt durable, then as rank 0 publishes. Whether a structure changed."""
        record, nbytes = blob.read_record(payload, what=f"the image of step {of[0]}")
        card = Card.from_fields(record)
        receipt, request = blob.unpack_rest(bytes(payload[card.image_bytes : nbytes]), what=f"step {of[0]}")
        clock = _Clock(outcome, card.step)
        completion = Completion(store, options, rank=card.rank, world=card.world, clock=clock)
        with completion.telling_others(card.step, card.attempt):
            key = f"{names.attempt_folder(card.step, card.attempt)}/{names.image_name(card.rank, card.world)}"
            self._write_image(store, key, payload[: card.image_bytes], options, lambda: outcome.check(card.step))
            return completion.complete(
                request, card.attempt, receipt, Timeline(), decide=lambda: outcome.check(card.step)
            )

    def _write_image(
        self, store: Store, key: str, image: memoryview, options: config.Options, check: Callable[[], None]
    ) -> None:
        writer = store.open_writer(key, nbytes=len(image))
        write = getattr(writer, "write_lasting", writer.write)
        try:
            for low in range(0, len(image), options.chunk_bytes):
                check()
                part = image[low : low + options.chunk_bytes]
                time.sleep(self._rate.take(len(part), now_s=time.monotonic()))
                write(part)
                failpoints.hit("agent.in-flush")
            writer.commit()
        except BaseException:
            writer.abort()
            raise


def options_for_agent(options: config.Options) -> dict[str, Any]:
    """Those that differ from the defaults, for a request."""
    import dataclasses

    default = config.Options()
    mine = dataclasses.asdict(options)
    out = {name: value for name, value in mine.items() if value != getattr(default, name)}
    if any(not isinstance(value, str | int | float | bool | None) for value in out.values()):
        raise InvalidInputError("options for an agent must be plain values")
    return out
