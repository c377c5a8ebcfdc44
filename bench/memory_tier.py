"""Snapshots in the memory of agents: what one costs, and how fast it comes back. Run: `python -m bench.memory_tier`.

4 gloo ranks on one host stand for 4 nodes, each with its own agent and folders, and hold a GPT's state as FSDP2 does. In one run:
CPU seconds of trainers and agents per GB protected, beside the sum of the parts measured alone (of all ranks at once); the time
to restore from the own agents beside a plain memory copy and dcp.load from a cold disk; the rate of decoding a lost blob beside
Flight alone that moves the same bytes; and the memory of the agents (PSS) beside the stated budget. Everything shares this
machine's processors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import ckpt
from bench import options
from bench.floors import drop_cache
from bench.limits import limits, show_limits
from bench.measure import measure
from bench.ranks import Rank, run_ranks
from bench.transport import Bare, pull_flight
from bench.workloads import State, gpt_shapes, local_of, nbytes, scramble, sharded
from ckpt.agent import spawn
from ckpt.agent.decode import Blobs
from ckpt.agent.tier import Tier
from ckpt.config import MIB
from ckpt.kernels import code_blocks, code_for, crc32c

RANKS, PARITY = 4, 1
TARGETS = {
    "restore over memory copy": 0.6,
    "dcp.load over restore": 6.0,
    "decode over Flight": 0.7,
    "CPU over parts": 1.3,
}
_CHUNK = 4 * MIB
_MEMORY = Path("/dev/shm")  # noqa: S108 - where agents keep snapshots


def body(rank: Rank, size: dict[str, int], repeats: int) -> dict[str, Any]:
    """One rank, one node."""
    with node_folders(rank):
        return _measure_all(rank, size, repeats)


@contextlib.contextmanager
def node_folders(rank: Rank) -> Iterator[tuple[Path, Path]]:
    """Make this process a node of its own: (runtime folder, memory folder), gone afterwards with the agents that live there."""
    node = f"bench-{os.getppid()}-{rank.rank}"
    runtime, memory = Path("/tmp") / node, _MEMORY / node  # noqa: S108 - sockets want short paths
    runtime.mkdir(mode=0o700)
    memory.mkdir(mode=0o700)
    os.environ |= {
        "CKPT_NODE": node,
        "CKPT_AGENT_RUNTIME_FOLDER": str(runtime),
        "CKPT_AGENT_MEMORY_FOLDER": str(memory),
    }
    try:
        yield runtime, memory
    finally:
        for pid in agents_below(runtime):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(runtime, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)


def remove_nodes() -> None:
    """Folders of ranks of this benchmark that were killed."""
    for left in (*_MEMORY.glob(f"bench-{os.getpid()}-*"), *Path("/tmp").glob(f"bench-{os.getpid()}-*")):  # noqa: S108
        shutil.rmtree(left, ignore_errors=True)


def _measure_all(rank: Rank, size: dict[str, int], repeats: int) -> dict[str, Any]:
    shapes = gpt_shapes(**size)
    mesh = init_device_mesh("cpu", (rank.size,))
    tensors = sharded(shapes, mesh, {name: (Shard(0),) for name in shapes}, fill=True)
    own = sum(local_of(t).numel() * local_of(t).element_size() for t in tensors.values())
    out: dict[str, Any] = {"limits": limits(rank, tensors, repeats=1), "own_bytes": int(rank.slowest(own))}
    url = rank.folder / "run"
    checkpointer = _checkpointer(url)
    checkpointer.prepare({"model": tensors})
    out |= _protect(rank, checkpointer, tensors, repeats)
    out["parts_cpu_s_per_gb"] = _parts(rank, own)
    out |= _agent_memory(rank, own)
    out |= _restore(rank, url, checkpointer, tensors, repeats)
    out |= _decode(rank, url, repeats)
    return out


def _checkpointer(url: Path) -> ckpt.Checkpointer:
    memory = ckpt.Memory(every=1, parity=PARITY, group_size=RANKS)
    return ckpt.Checkpointer(url, every=1 << 40, memory=memory)


def agents_below(runtime: Path) -> list[int]:
    """Process ids of the agents that have their sockets below `runtime`."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "environ"]):
        environ = process.info["environ"] or {}
        if "ckpt.agent" in (process.info["cmdline"] or []) and environ.get("CKPT_AGENT_RUNTIME_FOLDER") == str(runtime):
            found.append(int(process.info["pid"]))
    return found


def _agent() -> psutil.Process:
    (pid,) = agents_below(Path(os.environ["CKPT_AGENT_RUNTIME_FOLDER"]))
    return psutil.Process(pid)


def _protect(rank: Rank, checkpointer: ckpt.Checkpointer, tensors: State, repeats: int) -> dict[str, Any]:
    """Snapshots one after the other, each waited for."""
    seconds, cpu, stalls = [], [], []
    agent = _agent()
    total = rank.total(sum(local_of(t).numel() * local_of(t).element_size() for t in tensors.values()))
    for step in range(1, repeats + 2):
        rank.together()
        agent_before, own_before, start = _cpu(agent), time.process_time(), time.perf_counter()
        pending = checkpointer.step(step, {"model": tensors})
        assert pending is not None
        stall = pending.stall_s
        pending.wait(300)
        seconds_here, own_cpu = time.perf_counter() - start, time.process_time() - own_before
        rank.together()  # its agent may still serve the others
        spent = rank.total(own_cpu + _cpu(agent) - agent_before)
        taken = rank.slowest(seconds_here)
        if step > 1:  # the first one connects
            seconds.append(taken)
            stalls.append(rank.slowest(stall))
            cpu.append(spent / total * 1e9)
    return {"protect_s": seconds, "call_s": stalls, "cpu_s_per_gb": cpu}


def _cpu(agent: psutil.Process) -> float:
    times = agent.cpu_times()
    return float(times.user + times.system)


def _parts(rank: Rank, own: int) -> dict[str, float]:
    """CPU seconds per GB of state of each part alone, both ends of the exchange counted: as agents run, in a fresh process of
    every rank, all at once, so that they share the machine as the parts of a snapshot do."""
    nbytes = max(min(own, 256 * MIB), 16 * _CHUNK) // (4 * _CHUNK) * 4 * _CHUNK
    command = [sys.executable, "-m", "bench.memory_tier", "--parts", str(nbytes)]
    rank.together()
    made = subprocess.run(
        command, env=spawn._environment(), cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True
    )
    rank.together()
    return {name: rank.total(value) / rank.size for name, value in json.loads(made.stdout).items()}


def _parts_alone(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> dict[str, float]:
    nbytes, data = len(source), RANKS - PARITY
    server = Bare(memoryview(source))
    pull = pull_flight(str(server.port), memoryview(target), _CHUNK)
    code = code_for(data, PARITY)

    def encode() -> None:
        for low in range(0, nbytes - data * _CHUNK + 1, data * _CHUNK):
            sources = [source[low + i * _CHUNK :][:_CHUNK] for i in range(data)]
            code_blocks(sources, [target[low : low + _CHUNK]], code.parity_rows())

    work = {
        "copy": lambda: np.copyto(target, source),
        "checksum": lambda: crc32c(source),
        "encode": encode,
        "exchange": lambda: pull(nbytes),
    }
    found = {}
    for name, task in work.items():
        costs = []
        for _ in range(4):
            before = time.process_time()
            task()
            costs.append((time.process_time() - before) / nbytes * 1e9)
        # Every byte is copied and summed once, coded and moved `PARITY` times.
        found[name] = statistics.median(costs[1:]) * (PARITY if name in ("encode", "exchange") else 1)
    server.shutdown()
    return found


def _agent_memory(rank: Rank, own: int) -> dict[str, Any]:
    """Segments and processes of all agents, beside two images times 1 + m / (n - m)."""
    rest = sum(part.pss for part in _agent().memory_maps(grouped=True) if not part.path.endswith(".seg"))
    folder = Path(os.environ["CKPT_AGENT_MEMORY_FOLDER"])
    shared = sum(file.stat().st_blocks * 512 for file in folder.rglob("*.seg"))
    budget = 2 * own * (1 + PARITY / (RANKS - PARITY))
    return {
        "segments_mb": rank.slowest(shared) / 1e6,
        "agent_rest_mb": rank.slowest(rest) / 1e6,
        "budget_mb": rank.slowest(budget) / 1e6,
        "beyond_budget_mb": rank.slowest(shared + rest - budget) / 1e6,
    }


def _restore(rank: Rank, url: Path, checkpointer: ckpt.Checkpointer, tensors: State, repeats: int) -> dict[str, Any]:
    """A new checkpointer, as after a crash of all trainers, finds the agents and loads from them."""
    dcp.save(dict(tensors), checkpoint_id=rank.folder / "dcp")
    ours, loads, theirs, copies, connects = [], [], [], [], []
    own = [local_of(t) for t in tensors.values()]
    spare = [torch.empty_like(t) for t in own]
    for turn in range(repeats + 1):
        checkpointer._run.close()  # not over: the agents stay
        scramble(tensors)
        start = time.perf_counter()
        checkpointer = again = _checkpointer(url)
        connects.append(rank.slowest(time.perf_counter() - start))
        found = measure(rank, lambda again=again: again.restore({"model": tensors}))
        assert checkpointer.restored is not None and checkpointer.restored.tier == "memory"
        copied = measure(rank, lambda: [a.copy_(b) for a, b in zip(spare, own, strict=True)])
        if rank.rank == 0:
            drop_cache(rank.folder / "dcp")
        rank.together()
        peer = measure(rank, lambda: dcp.load(dict(tensors), checkpoint_id=rank.folder / "dcp"))
        if turn:
            loads.append(rank.slowest(checkpointer.restored.seconds))
            ours.append(found.seconds)
            copies.append(copied.seconds)
            theirs.append(peer.seconds)
    checkpointer._run.close()
    return {
        "restore_s": loads,
        "restore_and_prepare_s": ours,
        "connect_s": connects[1:],
        "memory_copy_s": copies,
        "dcp_load_cold_s": theirs,
    }


def _decode(rank: Rank, url: Path, repeats: int) -> dict[str, Any]:
    """The last rank's agent and its memory go; rank 0 decodes its blob, alone, beside Flight alone."""
    if rank.rank == rank.size - 1:
        pid = _agent().pid
        os.kill(pid, signal.SIGKILL)
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        for file in Path(os.environ["CKPT_AGENT_MEMORY_FOLDER"]).rglob("*.seg"):
            file.unlink()
    rank.together()
    checkpointer = _checkpointer(url)
    tier = checkpointer._tier
    assert isinstance(tier, Tier)
    number = next(n for n, one in enumerate(tier.candidates()) if one.recoverable)
    candidate = tier.candidates()[number]
    store = tier.open(number)
    card = next(c for group in candidate.groups for c in group.cards if c.rank == rank.size - 1)
    source = np.ones(card.blob_bytes, np.uint8)
    server = Bare(memoryview(source))
    ports = [int(port) for port in _ports(rank, server.port)]
    decoded, moved = [], []
    for _ in range(repeats + 1):
        rank.together()
        if rank.rank == 0:
            decoded.append(_time_decode(store._blobs, card.rank, card.blob_bytes))
        rank.together()
        if rank.rank == 0:
            moved.append(_time_flight(ports[1:], card.blob_bytes))
        rank.together()
    store.close()
    server.shutdown()
    checkpointer._run.close()
    return {"decode_s": decoded[1:], "flight_s": moved[1:], "blob_bytes": card.blob_bytes}


def _ports(rank: Rank, port: int) -> list[float]:
    return [rank.slowest(port if rank.rank == other else 0) for other in range(rank.size)]


def _time_decode(blobs: Blobs, lost: int, blob_bytes: int) -> float:
    buffer = np.empty(blob_bytes, np.uint8)
    parts = range(0, blob_bytes, 4 * _CHUNK)
    start = time.perf_counter()
    with ThreadPoolExecutor(4) as lanes:
        list(lanes.map(lambda low: blobs.read_into(lost, low, buffer[low : low + 4 * _CHUNK].data), parts))
    return time.perf_counter() - start


def _time_flight(ports: list[int], blob_bytes: int) -> float:
    """Three pulls at a time of as many bytes as decoding pulls."""
    targets = [np.empty(blob_bytes, np.uint8) for _ in ports]
    pulls = [pull_flight(str(port), memoryview(target), _CHUNK) for port, target in zip(ports, targets, strict=True)]
    start = time.perf_counter()
    with ThreadPoolExecutor(len(pulls)) as lanes:
        list(lanes.map(lambda pull: pull(blob_bytes), pulls))
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = options.parser(__doc__ or "", repeats=5)
    parser.add_argument("--width", type=int, default=768, help="of the GPT: 768 are 0.44 GB per rank, 1152 are 0.87")
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    size, repeats = {"layers": 12, "width": args.width}, args.repeats
    if args.tiny:
        size, repeats = {"layers": 1, "width": 64, "vocabulary": 2570}, 1
    options.check_space(args.dir, 3 * nbytes(gpt_shapes(**size)))
    with options.scratch(args.dir) as folder:
        try:
            found = run_ranks(body, RANKS, folder, size=size, repeats=repeats)
        finally:
            remove_nodes()
        made = options.report("memory_tier", folder, {**size, "ranks": RANKS, "repeats": repeats}, {})
    median = {name: statistics.median(x) for name, x in found.items() if isinstance(x, list)}
    made["results"] = found | {"median": median}
    made["ratios"] = {
        "restore over memory copy": median["memory_copy_s"] / median["restore_s"],
        "dcp.load over restore": median["dcp_load_cold_s"] / median["restore_s"],
        "decode over Flight": median["flight_s"] / median["decode_s"],
        "CPU over parts": median["cpu_s_per_gb"] / sum(found["parts_cpu_s_per_gb"].values()),
    }
    for name, value in median.items():
        print(f"{name:24} {value:9.4f}  ({min(found[name]):.4f} to {max(found[name]):.4f})")
    for name, value in found["parts_cpu_s_per_gb"].items():
        print(f"{name} alone: {value:.3f} CPU s per GB")
    for name in ("budget_mb", "segments_mb", "agent_rest_mb", "beyond_budget_mb"):
        print(f"{name}: {found[name]:.1f}")
    for name, value in made["ratios"].items():
        print(f"{name}: {value:.2f} (target {TARGETS[name]})")
    print(show_limits(found["limits"]))
    options.keep(made, args.json, args.plot)
    return made


if __name__ == "__main__":
    if sys.argv[1:2] == ["--parts"]:
        size_of_parts = int(sys.argv[2])
        print(json.dumps(_parts_alone(np.ones(size_of_parts, np.uint8), np.zeros(size_of_parts, np.uint8))))
    else:
        main()
