"""Pulls between two agents beside Flight alone and beside bare TCP. Run: `python -m bench.transport`.

In: sizes, repeats. Out: GB/s, and CPU seconds per GB of both ends together. All three move the same bytes from the memory of one
process over loopback into the same memory of another, in turn. Only `ckpt` checks what arrives (and proves who asks); the others
are what it costs without.
"""

from __future__ import annotations

import argparse
import dataclasses
import mmap
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from bench import options
from ckpt.agent.transport import Credentials, Key, Peer, Server
from ckpt.config import MIB, Options
from ckpt.kernels import crc32c

SIZES = (256 * MIB, 1024 * MIB)
SWEEP = tuple(mib * MIB for mib in (1, 2, 4, 8, 16))
KEY = Key(run_id="bench", step=1, attempt="a", kind="image", rank=0)
SYSTEMS = ("ckpt", "flight", "tcp")
SCHEMA = pa.schema([("bytes", pa.uint8())])
Pull = Callable[[int], None]  # the first bytes of what is served


def credentials(member: str) -> Credentials:
    return Credentials(run_id="bench", secret=bytes(32), member=member)  # a fixed secret: loopback, and nothing to hide


def filled(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes)
    block = np.random.default_rng(0).integers(0, 256, 16 * MIB, dtype=np.uint8)
    view = np.frombuffer(memory, np.uint8)
    for start in range(0, nbytes, len(block)):
        view[start : start + len(block)] = block[: nbytes - start]
    return memory


# The process that serves


class Held:
    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def held(self, key: Key) -> memoryview | None:
        return self._memory if key == KEY else None

    def call(self, name: str, payload: dict[str, Any]) -> dict[str, Any]:
        return {}


class Bare(flight.FlightServerBase):  # type: ignore[misc]
    """Batches of the wanted size, and nothing else."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        super().__init__("grpc+tcp://127.0.0.1:0")

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.FlightDataStream:
        nbytes, batch_bytes = (int(word) for word in ticket.ticket.split())

        def batches() -> Iterator[pa.RecordBatch]:
            for start in range(0, nbytes, batch_bytes):
                part = self._memory[start : min(nbytes, start + batch_bytes)]
                column = pa.Array.from_buffers(pa.uint8(), len(part), [None, pa.py_buffer(part)])
                yield pa.RecordBatch.from_arrays([column], schema=SCHEMA)

        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(SCHEMA, batches()))


def serve(nbytes: int) -> None:
    memory = memoryview(filled(nbytes))
    bare, listener = Bare(memory), socket.create_server(("127.0.0.1", 0))

    def tcp() -> None:
        end, _ = listener.accept()
        while word := end.recv(8, socket.MSG_WAITALL):
            end.sendall(memory[: int.from_bytes(word, "little")])

    threading.Thread(target=tcp, daemon=True).start()
    with Server(Held(memory), credentials("server"), host="127.0.0.1") as server:
        print(server.address, bare.port, listener.getsockname()[1], flush=True)
        for _ in sys.stdin:  # every line asks for the CPU seconds so far
            print(time.process_time(), flush=True)


# The process that pulls


def pull_ckpt(address: str, target: memoryview, chunk_bytes: int) -> Pull:
    tuned = dataclasses.replace(Options(), peer_chunk_bytes=chunk_bytes)
    peer = Peer(address, credentials("client"), tuned, member="server")

    def pull(nbytes: int) -> None:
        peer.pull(KEY, 0, nbytes, into=target[:nbytes], deadline_s=600)

    return pull


def pull_flight(port: str, target: memoryview, chunk_bytes: int) -> Pull:
    client = flight.FlightClient(f"grpc+tcp://127.0.0.1:{port}")
    memory = np.frombuffer(target, np.uint8)

    def pull(nbytes: int) -> None:
        reader, at = client.do_get(flight.Ticket(f"{nbytes} {chunk_bytes}".encode())), 0
        for chunk in reader:
            count = chunk.data.num_rows
            memory[at : at + count] = np.frombuffer(chunk.data.column(0).buffers()[1], np.uint8, count)
            at += count
        assert at == nbytes

    return pull


def pull_tcp(port: str, target: memoryview) -> Pull:
    end = socket.create_connection(("127.0.0.1", int(port)))

    def pull(nbytes: int) -> None:
        end.sendall(nbytes.to_bytes(8, "little"))
        at = 0
        while at < nbytes:
            at += end.recv_into(target[at:nbytes])

    return pull


def measure(process: subprocess.Popen[str], pull: Pull, nbytes: int, target: memoryview, crc: int) -> dict[str, float]:
    target[:nbytes] = bytes(nbytes)  # touched, and not what is expected
    served, own, start = cpu_of(process), time.process_time(), time.perf_counter()
    pull(nbytes)
    seconds, own = time.perf_counter() - start, time.process_time() - own
    served = cpu_of(process) - served
    assert crc32c(target[:nbytes]) == crc
    return {"seconds": seconds, "cpu_s": own + served}


def cpu_of(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def summary(runs: list[dict[str, float]], nbytes: int) -> dict[str, float]:
    rates = sorted(nbytes / run["seconds"] / 1e9 for run in runs)
    cpu = [run["cpu_s"] / nbytes * 1e9 for run in runs]
    return {
        "gb_per_s": round(statistics.median(rates), 3),
        "gb_per_s_min": round(rates[0], 3),
        "gb_per_s_max": round(rates[-1], 3),
        "cpu_s_per_gb": round(statistics.median(cpu), 3),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    return run(options.parser(__doc__ or "", repeats=7).parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    sizes, sweep, repeats = SIZES, SWEEP, args.repeats
    if args.tiny:
        sizes, sweep, repeats = (4 * MIB,), (MIB,), 1
    command = [sys.executable, "-m", "bench.transport", "--serve", str(max(sizes))]
    target = memoryview(mmap.mmap(-1, max(sizes)))
    source = filled(max(sizes))
    sums = {nbytes: crc32c(memoryview(source)[:nbytes]) for nbytes in sizes}
    source.close()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        ckpt, bare, tcp = process.stdout.readline().split()
        pulls = {
            "ckpt": pull_ckpt(ckpt, target, 4 * MIB),
            "flight": pull_flight(bare, target, 4 * MIB),
            "tcp": pull_tcp(tcp, target),
        }
        found = {}
        for nbytes in sizes:
            found[f"{nbytes // MIB} MiB"] = in_turn(process, pulls, nbytes, target, sums[nbytes], repeats)
        swept = {}
        for chunk_bytes in sweep:
            two = {"ckpt": pull_ckpt(ckpt, target, chunk_bytes), "flight": pull_flight(bare, target, chunk_bytes)}
            swept[f"{chunk_bytes // MIB} MiB"] = in_turn(process, two, sizes[0], target, sums[sizes[0]], repeats)
        process.stdin.close()
        process.wait(30)
    finally:
        process.kill()
        process.wait()
    made = options.report(
        "transport", args.dir, {"repeats": repeats, "chunk_bytes": 4 * MIB}, {"sizes": found, "chunks": swept}
    )
    made["ratios"] = {size: ratios(systems) for size, systems in found.items()}
    _show(made)
    options.keep(made, args.json, args.plot)
    return made


def in_turn(
    process: subprocess.Popen[str], pulls: dict[str, Pull], nbytes: int, target: memoryview, crc: int, repeats: int
) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in pulls}
    for round_number in range(repeats + 1):
        names = list(pulls)
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            made = measure(process, pulls[name], nbytes, target, crc)
            if round_number:  # the first connects
                runs[name].append(made)
    return {name: summary(of_one, nbytes) for name, of_one in runs.items()}


def ratios(systems: dict[str, dict[str, float]]) -> dict[str, float]:
    return {
        f"ckpt / {name}, {figure}": round(systems["ckpt"][figure] / systems[name][figure], 2)
        for name in ("flight", "tcp")
        for figure in ("gb_per_s", "cpu_s_per_gb")
    }


def _show(made: dict[str, Any]) -> None:
    for group in ("sizes", "chunks"):
        for size, systems in made[group].items():
            for name, figures in systems.items():
                print(f"{group:<7} {size:<9} {name:<7} " + "  ".join(f"{k} {v:.2f}" for k, v in figures.items()))
    for size, compared in made["ratios"].items():
        print(size, compared)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]))
    else:
        main()
