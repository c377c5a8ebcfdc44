"""Erasure coding beside ISA-L's own `ec_encode_data`. Run: `python -m bench.erasure [--json bench/results/erasure.json]`.

One thread makes m blocks of parity from k, again and again: ISA-L called directly with the same coefficients and the same tile,
ISA-L called once over whole blocks, ours, ours with the CRC-32C of all blocks in the same pass, ours source by source as they
arrive, and coding and checksums one after the other. In turn, so that what else the machine does hits all alike; blocks in the
cache and in memory. Time is that of the thread, without what other processes take on a shared machine.
Decoding is the same work: m lost blocks from k others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import options
from ckpt.config import Options
from ckpt.kernels import choice, code_blocks, code_for, crc32c
from ckpt.kernels.erasure import isal_raw

CODES = ((4, 1), (4, 2), (8, 2), (8, 4))
RAW, WHOLE = "ISA-L, same tile", "ISA-L, whole blocks"
OURS, SUMMED = "ours", "ours with sums"
TILES = tuple(n << 10 for n in (64, 128, 256, 512, 1024, 2048))
TARGET = 0.9  # ours over the raw rate
_RUN_BYTES = 128 << 20  # of data per timing: short, so that systems take turns often

Blocks = list[NDArray[np.uint8]]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    return run(options.parser(__doc__ or "", repeats=21).parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    if "isal" not in choice.coders_available():
        raise SystemExit("ISA-L is not here, so there is nothing to compare with: install libisal.so.2")
    sizes = {"cache": 4 << 20, "memory": 256 << 20}  # bytes of all data blocks together
    repeats, run_bytes = max(args.repeats, 5), _RUN_BYTES
    if args.tiny:
        sizes, run_bytes = {"cache": 1 << 16, "memory": 1 << 20}, 1 << 20
    args.dir.mkdir(parents=True, exist_ok=True)
    tile = Options().code_tile_bytes
    made = options.report("erasure", args.dir, {"repeats": repeats, "tile_bytes": tile, "data_bytes": sizes}, {})
    made["isal_library"] = choice.native().coder_isal_library()
    made["results"] = {
        f"RS({k},{m}), {place}" if m > 1 else f"XOR({k},1), {place}": _compare(k, m, nbytes, repeats, run_bytes, tile)
        for k, m in CODES
        for place, nbytes in sizes.items()
    }
    made["tiles"] = {str(tile): _tile_rates(tile, sizes["memory"], repeats, run_bytes) for tile in TILES}
    made["bars"] = [
        {"title": name, "unit": "GB/s", "values": {system: found["gb_per_s"] for system, found in rows.items()}}
        for name, rows in made["results"].items()
    ]
    _show(made)
    options.keep(made, args.json, args.plot)
    return made


def _blocks(count: int, nbytes: int) -> Blocks:
    """Page-aligned, as images in shared memory are, and touched."""
    memory = np.random.default_rng(0).integers(0, 256, count * nbytes + 4096, np.uint8)
    first = -memory.ctypes.data % 4096
    return [memory[first + i * nbytes : first + (i + 1) * nbytes] for i in range(count)]


def _compare(k: int, m: int, nbytes: int, repeats: int, run_bytes: int, tile: int) -> dict[str, dict[str, float]]:
    block = nbytes // k // 4096 * 4096
    data, parity = _blocks(k, block), _blocks(m, block)
    rows = code_for(k, m).parity_rows()
    works = _works(data, parity, rows, tile)
    times = _in_turn(works, repeats, max(1, run_bytes // nbytes))
    out = {}
    for name, found in times.items():
        ratios = [raw / own for raw, own in zip(times[RAW], found, strict=True)]
        out[name] = {
            "gb_per_s": round(k * block / statistics.median(found) / 1e9, 2),
            "of_raw": round(statistics.median(ratios), 3),
            "of_raw_least": round(min(ratios), 3),
            "of_raw_most": round(max(ratios), 3),
        }
    return out


def _works(data: Blocks, parity: Blocks, rows: NDArray[np.uint8], tile: int) -> dict[str, Callable[[], object]]:
    block = data[0].size

    def one_by_one() -> None:
        for i, source in enumerate(data):
            code_blocks([source], parity, rows[:, i : i + 1], add=i > 0, tile_bytes=tile)

    def apart() -> None:
        code_blocks(data, parity, rows, tile_bytes=tile)
        for each in [*data, *parity]:
            crc32c(each)

    return {
        RAW: lambda: isal_raw(data, parity, rows, tile_bytes=tile),
        OURS: lambda: code_blocks(data, parity, rows, tile_bytes=tile),
        WHOLE: lambda: isal_raw(data, parity, rows, tile_bytes=block * len(data)),
        SUMMED: lambda: code_blocks(data, parity, rows, sum_sources=True, sum_targets=True, tile_bytes=tile),
        "ours, then sums": apart,
        "ours, source by source": one_by_one,
    }


def _in_turn(works: dict[str, Callable[[], object]], repeats: int, times: int) -> dict[str, list[float]]:
    """Seconds of one call, per work and round; a first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.thread_time()
            for _ in range(times):
                work()
            if turn:
                found[name].append((time.thread_time() - start) / times)
    return found


def _tile_rates(tile: int, nbytes: int, repeats: int, run_bytes: int) -> dict[str, float]:
    """GB/s of RS(8, 2) in memory: how the tile matters."""
    block = nbytes // 8 // 4096 * 4096
    works = _works(_blocks(8, block), _blocks(2, block), code_for(8, 2).parity_rows(), tile)
    times = _in_turn({name: works[name] for name in (RAW, OURS, SUMMED)}, repeats, max(1, run_bytes // nbytes))
    return {name: round(8 * block / statistics.median(found) / 1e9, 2) for name, found in times.items()}


def _show(made: dict[str, Any]) -> None:
    for name, rows in made["results"].items():
        print(f"{name}, GB of data per second (median share of the raw rate, its range)")
        for system, row in rows.items():
            spread = f"{row['of_raw_least']:.2f} to {row['of_raw_most']:.2f}"
            target = f"  (target {TARGET})" if system == OURS else ""
            print(f"  {system:<24} {row['gb_per_s']:7.2f}  {row['of_raw']:.3f}  {spread}{target}")
    print("RS(8,2) in memory by tile, GB/s")
    for tile, rates in made["tiles"].items():
        print(f"  {int(tile) >> 10:5d} KiB  " + "  ".join(f"{name} {rate:.2f}" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
