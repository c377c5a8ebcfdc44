"""A merge whose running statistics are measured anew: on the merged weights, by a function of the user's.

In: a recipe, a function. Out: the checkpoint, which has what the function gave in the place of what was merged. In between the
merge lies in a run of its own inside the run of the result (`recalibrating/`), which readers do not look into; it is emptied at
the end, also after an error, and what a crash left there goes at the next time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import ckpt.commit.publish as publishing
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import InvalidInputError
from ckpt.format.dtypes import dtype_of
from ckpt.format.spec import TensorSpec
from ckpt.kernels import merge as kernels
from ckpt.merge import recipe as recipes
from ckpt.merge.lineage import KEY
from ckpt.merge.nodes import nearest
from ckpt.merge.run import MakeRunner, Merged, begin, carry_out, planned
from ckpt.merge.sources import OpenStore
from ckpt.store.base import Store

if TYPE_CHECKING:
    from ckpt.engine.view import Checkpoint

FOLDER = "recalibrating"
Recalibrate = Callable[["Checkpoint"], Mapping[str, Any]]


def merge_and_recalibrate(
    merge_into: Callable[[Store], Merged],
    function: Recalibrate,
    *,
    url: str,
    step: int,
    into: Store,
    options: Options,
    open_at: OpenStore,
    runner: MakeRunner,
) -> Merged:
    """Merge, call the function with the result, and write the result with what it gave.

    Args:
        merge_into: the merge, into the store that it is given.
        url: of the result's run, and `into` its store.

    Raises:
        InvalidInputError: the function gave a name or a shape that the result has not. Nothing is visible then.
    """
    publishing.refuse_existing(into, step)
    between = f"{url.rstrip('/')}/{FOLDER}"
    store = open_at(between)
    try:
        _empty(store)
        done = merge_into(store)
        stored = StoredCheckpoint(store, done.step, options)
        given = _given(stored, function)
        with tempfile.TemporaryDirectory(prefix="ckpt-recalibrate-") as folder:
            _write(Path(folder) / "model.safetensors", given)
            document = _document(between, done.step, folder, list(given))
            with planned(recipes.from_document(document), options, open_at) as plan:
                job = begin(plan, into, options)
                lineage = {**stored.manifest.metadata[KEY], "recalibrated": sorted(given)}
                job.metadata = {KEY: lineage}
                return carry_out(job, runner)
    finally:
        _empty(store)
        store.close()


def _given(stored: StoredCheckpoint, function: Recalibrate) -> dict[str, tuple[TensorSpec, bytes]]:
    """What the function gave, as raw elements of the result's dtypes."""
    from ckpt.engine.view import Checkpoint  # torch: only who measures something needs it

    specs = {spec.name: spec for spec in stored.specs}
    out: dict[str, tuple[TensorSpec, bytes]] = {}
    for name, value in function(Checkpoint(stored)).items():
        if name not in specs:
            raise InvalidInputError(
                f"`recalibrate` gave a tensor `{name}`, which the result has not", hints=(nearest(name, list(specs)),)
            )
        array = np.asarray(value.detach().cpu().double() if hasattr(value, "detach") else value, np.float64)
        if array.shape != tuple(specs[name].shape):
            raise InvalidInputError(
                f"`recalibrate` gave `{name}` of shape {list(array.shape)}, expected {list(specs[name].shape)}"
            )
        out[name] = specs[name], _raw(specs[name], array)
    return out


def _raw(spec: TensorSpec, array: np.ndarray[Any, np.dtype[np.float64]]) -> bytes:
    target = np.empty(spec.nbytes, np.uint8)
    if not kernels.is_float(spec.dtype):
        found = array.astype(np.dtype(spec.dtype))
        if not np.array_equal(found, array):
            raise InvalidInputError(f"`recalibrate` gave values of `{spec.name}` that are no `{spec.dtype}`")
        return found.tobytes()
    if not kernels.narrow(np.ascontiguousarray(array), spec.dtype, target):
        raise InvalidInputError(f"`recalibrate` gave values of `{spec.name}` that are NaN, infinite or too large")
    return target.tobytes()


def _write(file: Path, given: Mapping[str, tuple[TensorSpec, bytes]]) -> None:
    """One safetensors file."""
    header: dict[str, Any] = {}
    at = 0
    for name, (spec, data) in given.items():
        code = dtype_of(spec.dtype).safetensors
        header[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, data in given.values()))


def _document(between: str, step: int, folder: str, names: list[str]) -> dict[str, Any]:
    """Everything from the merge but what was given: a folder comes before all steps, so it is the oldest."""
    rules = [{"match": _exactly(name), "policy": "oldest"} for name in names]
    return {
        "recipe": recipes.VERSION,
        "sources": [{"run": between, "steps": step}, {"folder": folder, "key": "", "weight": 0}],
        "method": "uniform",
        "rules": [*rules, {"match": "**", "policy": "newest"}],
        "state": {"optimizer": "newest", "rng": "newest"},
        "output": {"step": step},
    }


def _exactly(name: str) -> str:
    if any(c in name for c in "*{}"):
        raise InvalidInputError(f"the name `{name}` cannot be told from a pattern")
    return name


def _empty(store: Store) -> None:
    store.delete([entry.key for entry in store.list("")])
