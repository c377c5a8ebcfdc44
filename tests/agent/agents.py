"""Agents for tests: a server in a process of its own, started by exec, and what clients of it need.

Run: `python -m tests.agent.agents SETTINGS`, JSON on the command line. Prints its address, serves until its stdin closes.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ckpt.agent.transport import Credentials, Key, Peer, Server, Tls
from ckpt.config import Options
from ckpt.errors import InvalidInputError

TREE = Path(__file__).resolve().parents[2]
RUN, SECRET = "run-1", bytes(range(32))
NBYTES = 3 * 1024 * 1024 + 17  # what an agent holds, unless it is told otherwise
IMAGE = Key(run_id=RUN, step=7, attempt="a1", kind="image", rank=0)
PARITY = Key(run_id=RUN, step=7, attempt="a1", kind="parity", group=1, stripe=2, row=0)
CHUNK = 64 * 1024
OPTIONS = Options(peer_connect_s=5.0, peer_progress_s=2.0, peer_chunk_bytes=CHUNK)
START_S = 60.0


def content(nbytes: int, seed: int = 0) -> bytes:
    """What an agent holds under every key of the given seed (the kind decides)."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def credentials(member: str = "client", tls: Tls | None = None, **changes: Any) -> Credentials:
    return dataclasses.replace(Credentials(run_id=RUN, secret=SECRET, member=member, tls=tls), **changes)


class Memory:
    """A holder of one image and one parity, which can be told to misbehave."""

    def __init__(self, nbytes: int) -> None:
        self._memory = {}
        for seed, key in enumerate((IMAGE, PARITY)):
            self._memory[key] = mmap.mmap(-1, max(1, nbytes))
            self._memory[key][:nbytes] = content(nbytes, seed)
        self._nbytes = nbytes
        self.asked = 0
        self.forget_after: int | None = None
        self.server: Server | None = None

    def held(self, key: Key) -> memoryview | None:
        self.asked += 1
        if key not in self._memory or (self.forget_after is not None and self.asked > self.forget_after):
            return None
        return memoryview(self._memory[key])[: self._nbytes]

    def call(self, name: str, payload: dict[str, Any]) -> dict[str, Any]:
        if name == "echo":
            return payload
        if name == "sleep":
            time.sleep(payload["s"])
            return {}
        if name == "refuse":
            raise InvalidInputError("no, for a reason", kind="some-kind")
        if name == "crash":
            raise KeyError("an inner secret")
        if name == "forget":  # the second look at the memory of a transfer finds nothing
            self.forget_after = self.asked + 1
            return {}
        if name == "reset-peak":
            Path("/proc/self/clear_refs").write_text("5")
            return {"rss": _status_bytes("VmRSS")}
        assert name == "state" and self.server is not None
        return {
            "asked": self.asked,
            "streams": self.server.streams() - 1,  # without this call
            "counts": self.server.counts(),
            "peak": _status_bytes("VmHWM"),
        }


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Agent:
    """An agent in a process of its own, as seen by a test. `stop` may be called twice."""

    def __init__(self, **settings: Any) -> None:
        command = [sys.executable, "-m", "tests.agent.agents", json.dumps(settings)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=TREE,
            env={**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, "the agent did not start"

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def peer(self, *, member: str = "client", options: Options = OPTIONS, address: str | None = None) -> Peer:
        return Peer(address or self.address, credentials(member), options, member="server")

    def state(self) -> dict[str, Any]:
        return self.peer(member="watcher").call("state", {}, deadline_s=10)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(START_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def main() -> None:
    settings = json.loads(sys.argv[1])
    memory = Memory(settings.get("nbytes", NBYTES))
    tls = Tls(**{name: Path(path) for name, path in settings["tls"].items()}) if "tls" in settings else None
    options = dataclasses.replace(OPTIONS, **settings.get("options", {}))
    own = credentials(settings.get("member", "server"), tls)
    with Server(memory, own, host="127.0.0.1", port=settings.get("port", 0), options=options) as server:
        memory.server = server
        print(server.address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
