"""What a stored delta says of itself: its base, its fine-tunes, how each tensor is coded, and how far off it comes back.

In: records. Out: a tree for an object of the checkpoint (ckpt.format.objects), and back, every field checked. Pure.
docs/reference/delta.md describes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import DamagedError, VersionError
from ckpt.format.objects import decode, encode
from ckpt.format.spec import TensorSpec
from ckpt.merge.publication import Saved

VERSION = 1
OBJECT = "delta"  # name of the object, and of the short record in the manifest's metadata
Coding = Literal["planes", "ternary", "mask"]
CODINGS: tuple[Coding, ...] = ("planes", "ternary", "mask")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Payload:
    """Coded chunks, one after the other, in a tensor of bytes."""

    tensor: str  # its name
    sizes: NDArray[np.int64]  # [chunks] bytes

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())


@dataclass(frozen=True, kw_only=True)
class Stated:
    """How far a tensor comes back from what it was, over all of its elements."""

    max_abs: float = 0.0
    l2: float = 0.0  # of the difference
    norm: float = 0.0  # of the fine-tune's tensor; 0 where nothing is lost, and it was not taken
    change: float = 0.0  # of the fine-tune's tensor less the base's

    @property
    def relative(self) -> float:
        """Of the tensor's own norm."""
        return self.l2 / self.norm if self.norm else 0.0

    @property
    def of_change(self) -> float:
        """Of the norm of the change: 1 would be to store nothing."""
        return self.l2 / self.change if self.change else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """One tensor of a fine-tune."""

    spec: TensorSpec  # as it was there, and comes back
    coding: Coding
    payload: Payload
    base: str | None  # name of the base's tensor that it is counted from
    sha256: str  # of the bytes that come back, hex
    scale: float = 0.0  # of `ternary`: what stands for each sign
    num_kept: int = 0  # elements that are told from the base's
    stated: Stated = field(default_factory=Stated)


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One fine-tune."""

    source: Mapping[str, Any]  # its identity: url, kind, step, attempt, index
    saved: Saved
    metadata: Mapping[str, Any]
    tensors: tuple[Kept, ...]  # by name

    @property
    def label(self) -> str:
        """As a user names it."""
        return label_of(self.source)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """The sum of the changes of several fine-tunes, which masks choose from."""

    dtype: str
    payload: Payload


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """All of it."""

    method: str
    parameters: Mapping[str, Any]
    chunk_elements: int
    base: Mapping[str, Any]  # its identity
    base_sha256: Mapping[str, str]  # of each tensor of the base that is needed: its name -> hex
    tasks: tuple[Task, ...]  # as they were named
    shared: Mapping[str, Shared]  # by name of the fine-tunes' tensor


def pack(delta: Delta) -> bytes:
    """The record as the payload of an object."""
    return encode(
        {
            "version": VERSION,
            "method": delta.method,
            "parameters": dict(delta.parameters),
            "chunk_elements": delta.chunk_elements,
            "base": dict(delta.base),
            "base_sha256": dict(delta.base_sha256),
            "tasks": [_task_tree(task) for task in delta.tasks],
            "shared": {name: {"dtype": one.dtype, **_payload_tree(one.payload)} for name, one in delta.shared.items()},
        },
        name=OBJECT,
    )


def _task_tree(task: Task) -> dict[str, Any]:
    return {
        "source": dict(task.source),
        "world": task.saved.world,
        "layout": task.saved.layout,
        "rank_layouts": list(task.saved.rank_layouts),
        "metrics": dict(task.saved.metrics),
        "metadata": dict(task.metadata),
        "tensors": [_kept_tree(kept) for kept in task.tensors],
    }


def _kept_tree(kept: Kept) -> dict[str, Any]:
    return {
        "name": kept.spec.name,
        "role": kept.spec.role,
        "dtype": kept.spec.dtype,
        "shape": list(kept.spec.shape),
        "aliases": list(kept.spec.aliases),
        "coding": kept.coding,
        **_payload_tree(kept.payload),
        "base": kept.base,
        "sha256": kept.sha256,
        "scale": kept.scale,
        "num_kept": kept.num_kept,
        **dataclasses.asdict(kept.stated),
    }


def _payload_tree(payload: Payload) -> dict[str, Any]:
    return {"payload": payload.tensor, "sizes": payload.sizes}


def unpack(data: bytes, *, name: str) -> Delta:
    """The record out of an object. DamagedError for what `pack` did not write, VersionError for a newer one."""
    tree = decode(data, name=name)
    try:
        if not isinstance(tree, dict):
            raise TypeError("no mapping")
        if tree["version"] != VERSION:
            raise VersionError(f"`{name}` is a delta of version {tree['version']}, expected {VERSION}")
        return Delta(
            method=_is(str, tree["method"]),
            parameters=_is(dict, tree["parameters"]),
            chunk_elements=_positive(tree["chunk_elements"]),
            base=_is(dict, tree["base"]),
            base_sha256={_is(str, key): _is(str, value) for key, value in tree["base_sha256"].items()},
            tasks=tuple(_task(one) for one in tree["tasks"]),
            shared={
                _is(str, key): Shared(dtype=_is(str, one["dtype"]), payload=_payload(one))
                for key, one in tree["shared"].items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"`{name}` is damaged: it is no record of a delta: {error!r}") from None


def _task(tree: Mapping[str, Any]) -> Task:
    layout = tree["layout"]
    return Task(
        source=_is(dict, tree["source"]),
        saved=Saved(
            world=_positive(tree["world"]),
            layout=None if layout is None else _is(dict, layout),
            rank_layouts=[_is(str, one) for one in tree["rank_layouts"]],
            metrics=_is(dict, tree["metrics"]),
        ),
        metadata=_is(dict, tree["metadata"]),
        tensors=tuple(_kept(one) for one in tree["tensors"]),
    )


def _kept(tree: Mapping[str, Any]) -> Kept:
    coding = tree["coding"]
    if coding not in CODINGS:
        raise ValueError(f"coding {coding!r}")
    numbers = {field.name: float(tree[field.name]) for field in dataclasses.fields(Stated)}
    scale = _is(float, tree["scale"])
    if not all(math.isfinite(value) for value in (scale, *numbers.values())):
        raise ValueError("a number that is not finite")
    return Kept(
        spec=TensorSpec(
            name=_is(str, tree["name"]),
            role=_is(str, tree["role"]),
            dtype=_is(str, tree["dtype"]),
            shape=tuple(_is(int, size) for size in tree["shape"]),
            aliases=tuple(_is(str, alias) for alias in tree["aliases"]),
        ),
        coding=coding,
        payload=_payload(tree),
        base=None if tree["base"] is None else _is(str, tree["base"]),
        sha256=_is(str, tree["sha256"]),
        scale=scale,
        num_kept=_is(int, tree["num_kept"]),
        stated=Stated(**numbers),
    )


def _payload(tree: Mapping[str, Any]) -> Payload:
    sizes = tree["sizes"]
    if (
        not isinstance(sizes, np.ndarray)
        or sizes.ndim != 1
        or sizes.dtype != np.int64
        or (len(sizes) and int(sizes.min()) < 0)
    ):
        raise ValueError("sizes that are none")
    return Payload(tensor=_is(str, tree["payload"]), sizes=sizes)


def _is(kind: type[_T], value: Any) -> _T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r:.100} is no {kind}")
    return value


def _positive(value: Any) -> int:
    if _is(int, value) < 1:
        raise ValueError(f"{value} is not positive")
    return int(value)


def label_of(source: Mapping[str, Any]) -> str:
    """URL@STEP of a checkpoint, the URL of a folder, from the record of its identity."""
    return str(source["url"]) if source["kind"] == "folder" else f"{source['url']}@{source['step']}"


def worst(tensors: Sequence[Kept]) -> Stated:
    """The greatest error of an element, and the error of all tensors together."""
    return Stated(
        max_abs=max((kept.stated.max_abs for kept in tensors), default=0.0),
        **{
            name: math.sqrt(math.fsum(getattr(kept.stated, name) ** 2 for kept in tensors))
            for name in ("l2", "norm", "change")
        },
    )
