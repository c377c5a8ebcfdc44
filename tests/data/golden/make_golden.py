"""Write golden checkpoints of the current format version: `python -m tests.data.golden.make_golden FOLDER [NAME ...]`.

Goal: files that every later version must read. Method: FOLDER (`tests/data/golden/v1`) gets one run per kind of checkpoint and,
beside it, what must be read from it: `expected.npz` with the bytes of each tensor and `expected.json` with everything else,
both from the values that were saved and not from a read. Golden files are added with a new version and never written again; run
this only for a version that has not been released.

alone      one rank: every dtype as matrix, 0-d, without elements and of one element; NaN payloads, -0, denormals; objects
           with every tag of docs/reference/objects.md; metrics that are no numbers; metadata
two-ranks  two writers: uneven and two-dim boxes, a flat range that starts in the middle of a row, a rank that holds nothing of a
           tensor, a tied weight, a buffer, one random stream per rank, optimizer state
references two writers, three steps, of which the first is forgotten and its manifest gone: the newest has fragments in images of
           both others, digests in its index, and one image without any fragment
"""

from __future__ import annotations

import collections
import json
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ckpt
from ckpt.commit.complete import Request
from ckpt.commit.gc import collect_garbage
from ckpt.commit.retention import forget
from ckpt.config import Options
from ckpt.engine.save import SaveSession
from ckpt.format.objects import TensorRef
from ckpt.layout.box import boxes_of_flat_range
from ckpt.state import collect
from ckpt.store.posix import PosixStore
from tests.format.format_samples import all_dtypes, raw, tensor

DEADLINE_S = 60


def describe(value: Any) -> Any:
    """A value as JSON that tells types and bits apart."""
    kind = type(value).__name__
    if value is None or isinstance(value, bool):
        return [kind, value]
    if type(value) is int or isinstance(value, str | np.dtype | slice | range | TensorRef):
        return [kind, value.encode("utf-8", "surrogatepass").hex() if isinstance(value, str) else str(value)]
    if type(value) is float:
        return [kind, struct.pack(">d", value).hex()]
    if type(value) is complex:
        return [kind, describe(value.real), describe(value.imag)]
    if type(value) in (bytes, bytearray):
        return [kind, value.hex()]
    if isinstance(value, np.ndarray | np.generic):
        return [kind, value.dtype.str, list(value.shape), value.tobytes().hex()]
    if isinstance(value, dict):
        factory = getattr(value, "default_factory", None)
        return [kind, factory and factory.__name__, [[describe(k), describe(v)] for k, v in value.items()]]
    if isinstance(value, set | frozenset):
        return [kind, sorted(map(describe, value))]
    if isinstance(value, list | tuple | collections.deque):
        return [kind, getattr(value, "maxlen", None), [describe(item) for item in value]]
    return [kind, str(value)]  # torch.dtype, torch.device


def every_tag() -> dict[str, Any]:
    """A value for every row of the tables in objects.md."""
    nan = struct.unpack(">d", bytes.fromhex("fff8deadbeef0001"))[0]
    return {
        "plain": [None, True, False, 0, -(2**63), 2**63 - 1, 0.1, 5e-324, "text é 🎈", [], {}],
        "int": [2**63, -(2**200)],
        "float": [nan, float("inf"), float("-inf"), -0.0],
        "complex": complex(-0.0, nan),
        "str": "\ud800 lone",
        "bytes": b"\x00\xff",
        "bytearray": bytearray(b"ab"),
        "tuple": (1, (2, ())),
        "set": {1, 2, "a"},
        "frozenset": frozenset({(1, 2)}),
        "dict": {1: "one", (2, 3): {"$type": "not a tag"}},
        "ordered-dict": collections.OrderedDict([("b", 1), ("a", 2)]),
        "counter": collections.Counter("hello"),
        "defaultdict": collections.defaultdict(list, {"x": [1]}),
        "deque": collections.deque([1, 2], maxlen=3),
        "slice": slice(1, None, -2),
        "range": range(0, 10, 3),
        "numpy-array": [
            np.array([[1, 2], [3, 4]], ">i4"),
            np.array(["a", "bc"]),
            np.array([b"x"]),
            np.array(["2026-11-21"], "M8[D]"),
            np.zeros((0, 3), np.float16),
        ],
        "numpy-scalar": [np.float32(-0.0), np.str_("x"), np.bytes_(b"y\x00"), np.bool_(True), np.timedelta64(5, "s")],
        "numpy-dtype": np.dtype(">f8"),
        "registered": [torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])],
    }


def little(value: Any) -> Any:
    """The value as it must come back: array data little-endian."""
    if isinstance(value, np.ndarray):
        return value.astype(value.dtype.newbyteorder("<"))
    if isinstance(value, list):
        return [little(item) for item in value]
    return value


class ThreadWorld:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, shared: dict[str, Any]) -> None:
        self.rank, self.size, self._shared = rank, size, shared

    def all_gather(self, data: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        self._shared[self.rank] = data.copy()
        self._shared["barrier"].wait(DEADLINE_S)
        out = [self._shared[rank] for rank in range(self.size)]
        self._shared["barrier"].wait(DEADLINE_S)
        return out

    def all_to_all(self, send: Any, sizes: list[int], receive: Any, incoming: list[int]) -> None:
        raise NotImplementedError


def save_as_ranks(folder: Path, states: list[dict[str, Any]], request: Request) -> None:
    """Save one state per rank, each rank in a thread."""
    shared: dict[str, Any] = {"barrier": threading.Barrier(len(states))}
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            local = collect(states[rank], rank=rank, world=len(states))
            world = ThreadWorld(rank, len(states), shared)
            SaveSession(PosixStore(folder, options=Options()), world, Options()).save(local, request)  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that waits
            errors.append(error)
            shared["barrier"].abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    if errors:
        raise errors[0]


def leave_expected(
    folder: Path, tensors: dict[str, torch.Tensor], objects: dict[tuple[str, int], Any], **more: Any
) -> None:
    """Write what must be read."""
    arrays = {name: np.frombuffer(raw(value), np.uint8) for name, value in tensors.items()}
    np.savez_compressed(folder / "expected.npz", allow_pickle=False, **arrays)
    document = {
        "tensors": {n: [str(v.dtype).removeprefix("torch."), list(v.shape)] for n, v in tensors.items()},
        "objects": [[name, rank, describe(value)] for (name, rank), value in objects.items()],
        **more,
    }
    (folder / "expected.json").write_text(json.dumps(document, indent=1) + "\n")


def make_alone(folder: Path) -> None:
    values, tags = all_dtypes(), every_tag()
    metrics = {"loss": 2.5, "nan": float("nan"), "inf": float("-inf"), "count": 3}
    metadata = {"note": "é", "nested": [{"x": None}]}
    ckpt.save({"t": values, "tags": tags}, folder, step=7, metrics=metrics, metadata=metadata)
    leave_expected(
        folder,
        {f"t/{name}": value for name, value in values.items()},
        {("tags", 0): {key: little(value) for key, value in tags.items()}},
        step=7,
        metrics=describe(metrics),
        metadata=metadata,
        aliases={},
        num_writers=1,
    )


Cut = list[tuple[slice, ...]]  # the parts of a tensor that a rank holds


def held(whole: torch.Tensor, cut: Cut) -> torch.Tensor:
    """A flat tensor with the parts of `whole` end to end, annotated."""
    places, at = [], 0
    for part in cut:
        ranges = [one.indices(size) for one, size in zip(part, whole.shape, strict=True)]
        box = ckpt.Box(offsets=tuple(r[0] for r in ranges), lengths=tuple(r[1] - r[0] for r in ranges))
        places.append((box, [at]))
        at += box.volume
    flat = torch.cat([whole[part].reshape(-1) for part in cut]) if cut else whole.new_empty(0)
    return ckpt.annotate(flat, shape=tuple(whole.shape), boxes=places)


def held_range(whole: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements `start` to `stop` of the flattened tensor, annotated."""
    places, at = [], 0
    for box in boxes_of_flat_range(tuple(whole.shape), start, stop):
        places.append((box, [at]))
        at += box.volume
    return ckpt.annotate(whole.reshape(-1)[start:stop].clone(), shape=tuple(whole.shape), boxes=places)


def tied_model(weight: torch.Tensor) -> torch.nn.Module:
    """Two layers that share a weight, and a buffer."""
    model = torch.nn.Module()
    model.a = torch.nn.Linear(3, 3, bias=False, dtype=weight.dtype)
    model.a.weight = torch.nn.Parameter(weight.clone())
    model.b = torch.nn.Linear(3, 3, bias=False, dtype=weight.dtype)
    model.b.weight = model.a.weight
    model.register_buffer("steps", torch.tensor(11))
    return model


def make_two_ranks(folder: Path) -> None:
    uneven, square = tensor("float32", (5, 3), 1), tensor("bfloat16", (4, 6), 2)
    flat, lonely, tied = tensor("int64", (3, 5), 3), tensor("float64", (2,), 4), tensor("float16", (3, 3), 5)
    top, low, left, right, full = slice(0, 2), slice(2, 4), slice(0, 3), slice(3, 6), slice(None)
    rank0 = {
        "uneven": held(uneven, [(slice(0, 3), full)]),
        "square": held(square, [(top, left), (low, right)]),
        "flat": held_range(flat, 0, 7),
        "lonely": held(lonely, []),
    }
    rank1 = {
        "uneven": held(uneven, [(slice(3, 5), full)]),
        "square": held(square, [(top, right), (low, left)]),
        "flat": held_range(flat, 7, 15),
        "lonely": held(lonely, [(full,)]),
    }
    states = []
    for rank, own in enumerate([rank0, rank1]):
        model = tied_model(tied)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
        rng = ckpt.RNG({"own": np.random.default_rng(rank)})
        states.append({"t": own, "model": model, "optimizer": optimizer, "rng": rng, "epoch": 3})
    save_as_ranks(folder, states, Request(step=40, metrics={"loss": 0.5}))
    tensors = {"t/uneven": uneven, "t/square": square, "t/flat": flat, "t/lonely": lonely}
    leave_expected(
        folder,
        {**tensors, "model/a.weight": tied, "model/steps": torch.tensor(11)},
        {("epoch", rank): 3 for rank in range(2)},
        step=40,
        metrics=describe({"loss": 0.5}),
        metadata={},
        aliases={"model/a.weight": ["model/b.weight"]},
        num_writers=2,
        draws=[np.random.default_rng(rank).integers(0, 1 << 62, 4).tolist() for rank in range(2)],
    )


def make_references(folder: Path) -> None:
    full, top, low = slice(None), slice(0, 2), slice(2, 4)
    frozen, bits = tensor("float32", (4, 3), 1), tensor("bool", (5,), 6)
    for step in (1, 2, 3):
        late, own = tensor("bfloat16", (4, 2), min(step, 2)), tensor("float64", (3,), 10 + step)
        states = [
            {
                "t": {
                    "frozen": held(frozen, [(top, full)]),
                    "late": held(late, [(top, full)]),
                    "own": held(own, [(full,)]),
                }
            },
            {
                "t": {
                    "frozen": held(frozen, [(low, full)]),
                    "late": held(late, [(low, full)]),
                    "bits": held(bits, [(full,)]),
                }
            },
        ]
        save_as_ranks(folder, [{**one, "step": step} for one in states], Request(step=step, incremental=True))
    forget(PosixStore(folder, options=Options()), [1])
    collect_garbage(PosixStore(folder, options=Options()), options=Options())
    leave_expected(
        folder,
        {"t/frozen": frozen, "t/late": late, "t/own": own, "t/bits": bits},
        {("step", rank): 3 for rank in range(2)},
        step=3,
        metrics=describe({}),
        metadata={},
        aliases={},
        num_writers=2,
    )


MAKERS = {"alone": make_alone, "two-ranks": make_two_ranks, "references": make_references}


def main(folder: Path, wanted: list[str]) -> None:
    for name, make in MAKERS.items():
        if wanted and name not in wanted:
            continue
        (folder / name).mkdir(parents=True)  # never into what is there
        make(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
