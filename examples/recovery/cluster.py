"""Nodes with a torchrun each, and their loss.

In: a network, a folder. Out: nodes that can be started and lost with all that is on them: link, torchrun, trainer, agent, shared
memory. Ends only processes that it started, or that those started, each by its id.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch.distributed as dist

from ckpt.agent import discover
from ckpt.config import Options
from examples.recovery.network import Network, Place

ROOT = Path(__file__).resolve().parents[2]
# Least and most; more than half, or fresh nodes would start by themselves before the others have noticed.
NODES = (3, 4)
LAST_CALL_S = 5  # after which a start waits no longer for more nodes
END_S = 60.0  # for what has been killed, or told that the job is over


@dataclass(kw_only=True)
class Node:
    """One node that runs."""

    name: str
    number: int
    place: Place
    runtime: Path
    memory: Path
    log: Path
    torchrun: subprocess.Popen[bytes]
    processes: list[psutil.Process] = field(default_factory=list)  # at the last look

    def trainers(self) -> list[psutil.Process]:
        """Those that torchrun has started and that live."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.torchrun.pid).children(recursive=True)
        return []

    def agents(self) -> list[psutil.Process]:
        """Agents that live there."""
        out = []
        options = Options(agent_runtime_folder=str(self.runtime), agent_memory_folder=str(self.memory))
        for found in discover.agents(options):
            with suppress(psutil.NoSuchProcess):
                if found.status:
                    out.append(psutil.Process(found.status["pid"]))
        return out


class Cluster:
    """All nodes of one demo, and the rendezvous that torchrun meets at: in this process, which is not lost."""

    def __init__(self, network: Network, out: Path, arguments: Sequence[str]) -> None:
        self._network, self._out, self._arguments = network, out, list(arguments)
        self._runtime = Path(tempfile.mkdtemp(prefix="ckd", dir="/tmp"))
        self._memory = Path(tempfile.mkdtemp(prefix="ckpt-demo-", dir="/dev/shm"))
        self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        self.nodes: dict[str, Node] = {}
        self._count = 0
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def add(self, *, failpoint: str = "") -> Node:
        """A fresh node. The failpoint is its agent's."""
        self._count += 1
        number = self._count
        name = f"node-{number}"
        place = self._network.add(number)
        runtime, memory = self._runtime / str(number), self._memory / str(number)
        runtime.mkdir(mode=0o700)
        memory.mkdir()
        environment = {
            **os.environ,
            **place.environment,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "CKPT_NODE": name,
            "CKPT_AGENT_RUNTIME_FOLDER": str(runtime),
            "CKPT_AGENT_MEMORY_FOLDER": str(memory),
            "CKPT_AGENT_RESERVE_BYTES": "0",
            "CKPT_TERMINATE_GRACE_S": "2",
            # With a shared store, torchrun would give the second start the addresses of the first one's ranks.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        if failpoint:
            environment["CKPT_FAILPOINT"] = failpoint
        log = self._out / "logs" / f"{name}.jsonl"
        with (self._out / "logs" / f"{name}.txt").open("wb") as stream:
            torchrun = subprocess.Popen(
                [*place.prefix, *self._torchrun(place), "--events", str(log), *self._arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        node = Node(name=name, number=number, place=place, runtime=runtime, memory=memory, log=log, torchrun=torchrun)
        self.nodes[name] = node
        return node

    def _torchrun(self, place: Place) -> list[str]:
        conf = {"is_host": "false", "last_call_timeout": LAST_CALL_S, "join_timeout": 120}
        conf |= {"keep_alive_interval": 1, "keep_alive_max_attempt": 3}
        least, most = NODES
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", f"{least}:{most}", "--nproc-per-node", "1"),
            *("--max-restarts", "50", "--monitor-interval", "0.1", "--rdzv-backend", "c10d", "--rdzv-id", "demo"),
            *("--rdzv-endpoint", f"{self._network.host}:{self._store.port}", "--local-addr", place.address),
            *("--rdzv-conf", ",".join(f"{name}={value}" for name, value in conf.items())),
            *("-m", "examples.recovery.train"),
        ]

    def kill_trainer(self, node: Node) -> None:
        """SIGKILL to the training process alone."""
        for process in node.trainers():
            _kill(process)

    def lose(self, nodes: Sequence[Node]) -> None:
        """The whole nodes at once: first their links, then all that runs there, then their memory."""
        doomed = [(node, [*node.trainers(), *node.agents()]) for node in nodes]
        for node in nodes:
            self._network.cut(node.number)
        for node, processes in doomed:
            _kill(psutil.Process(node.torchrun.pid))
            for process in processes:
                _kill(process)
        for node, processes in doomed:
            node.torchrun.wait(END_S)
            psutil.wait_procs(processes, timeout=END_S)
            shutil.rmtree(node.memory)
            shutil.rmtree(node.runtime, ignore_errors=True)
            self._network.remove(node.number)
            del self.nodes[node.name]

    def close(self) -> None:
        """Everything of all nodes. May be called twice."""
        family = []
        for node in self.nodes.values():
            family += [*node.trainers(), *node.agents()]
            if node.torchrun.poll() is None:
                node.torchrun.kill()
        for process in family:
            _kill(process)
        for node in self.nodes.values():
            node.torchrun.wait(END_S)
        psutil.wait_procs(family, timeout=END_S)
        self.nodes.clear()
        self._network.close()
        shutil.rmtree(self._memory, ignore_errors=True)
        shutil.rmtree(self._runtime, ignore_errors=True)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs. One that has ended counts as gone, also before somebody has waited for it."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """TimeoutError when it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.02)
