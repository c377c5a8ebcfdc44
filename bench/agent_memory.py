"""What agents take of memory, beside what is stated. Run: `python -m bench.agent_memory`.

Groups of 2 to 8 agents, without trainers at work, protect one snapshot after another. Counted is the proportional set size (PSS)
of every agent once all of its trainer's maps are gone: shared memory and all else; and how much more it was while a step was
being protected, by samples of its own anonymous memory. Stated are two images and their parity, both times 1 + m / (n - m), and a
constant. What protecting takes of time is told as well, from the hand-over of all images to the last vote, and the processor time
of all agents together.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench import options
from ckpt.agent.identity import Identity
from ckpt.agent.local import Client
from ckpt.agent.protect import nbytes_needed
from ckpt.agent.spawn import start_or_adopt
from ckpt.config import AGENT_BESIDE_BYTES, AGENT_RECORD_BYTES_MAX, MIB, Options

GROUPS = ((2, 1), (3, 1), (4, 1), (4, 2), (6, 2), (8, 2))  # members, parity
STATED_MB = AGENT_BESIDE_BYTES / 1e6  # of an agent beside images and parity
_WAIT_S = 120.0
_SAMPLE_S = 0.01  # pages come and stay for longer than that


class Agent:
    """One agent, and what a trainer has of it."""

    def __init__(self, identity: Identity, chosen: Options, secret: str) -> None:
        self.rank = identity.rank
        self.client: Client = start_or_adopt(identity, chosen, epoch=1)
        self.address = self.client.call("listen", {"secret": secret, "host": "127.0.0.1", "port": 0})[0]["address"]

    def join(self, addresses: Sequence[str], parity: int, image_bytes: int) -> None:
        num = len(addresses)
        room = nbytes_needed(image_bytes, num_members=num, parity=parity) + AGENT_RECORD_BYTES_MAX
        for one in self.client.reserve(image_bytes + 2 * AGENT_RECORD_BYTES_MAX):
            one.close()
        known = {str(rank): address for rank, address in enumerate(addresses)}
        params = {"rank": self.rank, "world": num, "members": list(range(num)), "parity": parity, "addresses": known}
        self.client.call("join", {**params, "parity_bytes": room}, timeout_s=_WAIT_S)

    def stage(self, step: int, image_bytes: int) -> dict[str, Any]:
        """Write an image; what is to be handed over."""
        began = self.client.begin(step, attempt(step))
        mapped = {one.name: one for one in self.client.attach()}
        memory = np.frombuffer(mapped[began.name].memory, np.uint8)
        memory[:image_bytes] = np.random.default_rng((self.rank, step)).integers(0, 256, image_bytes, np.uint8)
        del memory
        for one in mapped.values():
            one.close()
        given = {"name": began.name, "generation": began.generation, "image_bytes": image_bytes}
        return {**given, "blob_bytes": image_bytes, "changed": False}

    def keep(self, given: dict[str, Any]) -> None:
        self.client.call("keep", given, timeout_s=_WAIT_S)

    def state(self, step: int) -> str:
        return str(self.client.call("progress", {"step": step, "attempt": attempt(step)})[0]["state"])

    @property
    def cpu_s(self) -> float:
        """Of all its threads so far."""
        found = psutil.Process(self.client.agent_pid).cpu_times()
        return float(found.user + found.system)

    @property
    def own_bytes(self) -> int:
        """Anonymous memory, which it shares with nobody: quick to ask for."""
        lines = Path(f"/proc/{self.client.agent_pid}/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

    def pss_bytes(self) -> tuple[int, int]:
        """(of its segments, of all else)."""
        parts = psutil.Process(self.client.agent_pid).memory_maps(grouped=True)
        shared = sum(part.pss for part in parts if part.path.endswith(".seg"))
        return shared, sum(part.pss for part in parts) - shared


def attempt(step: int) -> str:
    return f"{'0' * 16}-{step:06d}"


def measure(num: int, parity: int, image_bytes: int, steps: int) -> dict[str, float]:
    """The largest figures of all agents of one group."""
    runtime = Path(tempfile.mkdtemp(prefix="ckb", dir="/tmp"))
    memory = Path(tempfile.mkdtemp(prefix="ckpt-bench-", dir="/dev/shm"))
    chosen = Options(agent_runtime_folder=str(runtime), agent_memory_folder=str(memory))
    run, secret = uuid.uuid4(), secrets.token_hex(32)
    agents: list[Agent] = []
    try:
        agents += [Agent(Identity(run_id=run, rank=r, world=num), chosen, secret) for r in range(num)]
        for agent in agents:
            agent.join([one.address for one in agents], parity, image_bytes)
        with _watched(agents) as most:
            spent = [_protect(agents, step, image_bytes) for step in range(1, steps + 1)]
        more = [peak - agent.own_bytes for peak, agent in zip(most, agents, strict=True)]
        found = [agent.pss_bytes() for agent in agents]
    finally:
        for agent in agents:
            os.kill(agent.client.agent_pid, signal.SIGKILL)
            agent.client.close()
        shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)
    stated = 2 * image_bytes * (1 + parity / (num - parity))
    beside = [shared + rest - stated for shared, rest in found]
    seconds, cpu_s = (statistics.median(column) for column in zip(*spent[1:], strict=True))
    return {
        "stated_mb": stated / 1e6,
        "segments_mb": max(shared for shared, _ in found) / 1e6,
        "constant_mb": max(beside) / 1e6,
        "peak_mb": max(one + over for one, over in zip(beside, more, strict=True)) / 1e6,
        "seconds": seconds,
        "cpu_s": cpu_s,
    }


def _protect(agents: Sequence[Agent], step: int, image_bytes: int) -> tuple[float, float]:
    """(seconds, CPU seconds of all agents) that one step takes once its images are staged."""
    given = [agent.stage(step, image_bytes) for agent in agents]
    cpu_s, start = sum(agent.cpu_s for agent in agents), time.perf_counter()
    with ThreadPoolExecutor(len(agents)) as pool:
        list(pool.map(Agent.keep, agents, given))
    _wait(agents, step)
    return time.perf_counter() - start, sum(agent.cpu_s for agent in agents) - cpu_s


@contextlib.contextmanager
def _watched(agents: Sequence[Agent]) -> Iterator[list[int]]:
    """The most anonymous memory of each agent that was seen meanwhile, in bytes."""
    most, over = [0] * len(agents), threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_S):
            most[:] = [max(peak, agent.own_bytes) for peak, agent in zip(most, agents, strict=True)]

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def _wait(agents: Sequence[Agent], step: int) -> None:
    deadline = time.monotonic() + _WAIT_S
    while (states := {agent.state(step) for agent in agents}) != {"protected"}:
        if "failed" in states or time.monotonic() > deadline:
            raise RuntimeError(f"step {step} is not protected: {states}")
        time.sleep(0.01)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    return run(options.parser(__doc__ or "", repeats=8).parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    image_bytes, groups, steps = 256 * MIB, GROUPS, max(args.repeats, 3)
    if args.tiny:
        image_bytes, groups, steps = 4 * MIB, GROUPS[:1], 3
    args.dir.mkdir(parents=True, exist_ok=True)
    made = options.report("agent_memory", args.dir, {"image_bytes": image_bytes, "steps": steps}, {})
    made["results"] = {f"{n} agents, parity {m}": measure(n, m, image_bytes, steps) for n, m in groups}
    for name, row in made["results"].items():
        print(
            f"{name}: segments {row['segments_mb']:.1f} MB, stated {row['stated_mb']:.1f} MB; all else and rounding"
            f" {row['constant_mb']:.1f} MB, at most {row['peak_mb']:.1f} MB while protecting (stated: {STATED_MB:.0f});"
            f" {row['seconds']:.2f} s and {row['cpu_s']:.2f} CPU-s a step"
        )
    options.keep(made, args.json, args.plot)
    return made


if __name__ == "__main__":
    main()
