"""What every agent answers: the life of the images in its memory, its own state, and its end.

In: requests of the trainer or of somebody who looks. Out: answers. The methods are listed in docs/reference/agent.md; groups,
transport and flushing add theirs beside these.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from ckpt.agent.identity import PROTOCOL
from ckpt.agent.server import Call, Reply
from ckpt.agent.slots import describe
from ckpt.config import AGENT_HOLD_S_MAX
from ckpt.errors import InvalidInputError

if TYPE_CHECKING:
    from ckpt.agent.process import Agent

_CRC_MAX = (1 << 32) - 1


def install(agent: Agent) -> None:
    """Add the methods to the agent's table."""
    methods = _Methods(agent)
    names = ("reserve", "attach", "begin", "seal", "abandon", "ping", "hold", "status", "stop", "bye")
    agent.server.handlers |= {name: getattr(methods, name) for name in names}
    agent.server.open_methods |= {"ping", "hold", "status", "stop"}


class _Methods:
    """One method of the agent each, by name."""

    def __init__(self, agent: Agent) -> None:
        self._agent, self._slots, self._server = agent, agent.slots, agent.server
        self._started = time.monotonic()

    def reserve(self, call: Call) -> Reply:
        self._slots.reserve(call.integer("image_bytes", low=1))
        return self.attach(call)

    def attach(self, call: Call) -> Reply:
        fds: list[int] = []
        try:
            held = self._slots.all()
            for segment in held:
                fds.append(segment.open_again())
            return Reply(result={"segments": [describe(one) for one in held]}, fds=fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def begin(self, call: Call) -> dict[str, Any]:
        session = call.session
        step, attempt = call.integer("step"), call.text("attempt")
        return describe(self._slots.begin(step=step, attempt=attempt, epoch=session.epoch, world=session.world))

    def seal(self, call: Call) -> dict[str, Any]:
        crc = None if call.params.get("image_crc") is None else call.integer("image_crc", high=_CRC_MAX)
        image_bytes = call.integer("image_bytes")
        return describe(self._slots.seal(call.text("name"), call.integer("generation"), image_bytes, crc))

    def abandon(self, call: Call) -> dict[str, Any]:
        self._slots.abandon(call.text("name"), call.integer("generation"))
        return {}

    def ping(self, call: Call) -> dict[str, Any]:
        return {"lease_left_s": self._agent.admission.lease_left_s}

    def hold(self, call: Call) -> dict[str, Any]:
        seconds = call.integer("seconds", high=int(AGENT_HOLD_S_MAX))
        return {"lease_left_s": self._agent.admission.hold(seconds)}

    def status(self, call: Call) -> dict[str, Any]:
        return {**_facts(self._agent), "uptime_s": time.monotonic() - self._started}

    def stop(self, call: Call) -> dict[str, Any]:
        trainer_pid = self._agent.admission.trainer_pid
        if trainer_pid is not None and not call.session.is_trainer and call.params.get("force") is not True:
            raise InvalidInputError(
                f"a trainer, pid {trainer_pid}, uses this agent",
                kind="trainer-there",
                hints=("end the job, or give --force: then it goes on without snapshots in memory",),
            )
        self._server.stop("stop was asked for")
        return {}

    def bye(self, call: Call) -> dict[str, Any]:
        call.session.is_detached = True
        self._server.stop("the job is over")
        return {}


def _facts(agent: Agent) -> dict[str, Any]:
    identity, admission = agent.identity, agent.admission
    return {
        "pid": os.getpid(),
        "run_id": identity.run_id.hex,
        "rank": identity.rank,
        "world": admission.world,
        "incarnation": identity.incarnation,
        "epoch": admission.epoch,
        "protocol": list(PROTOCOL),
        "state": "serving" if admission.trainer_pid is not None else "waiting",
        "trainer_pid": admission.trainer_pid,
        "lease_left_s": admission.lease_left_s,
        "segments": agent.slots.describe(),
    }
