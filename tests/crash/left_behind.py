"""What every test of a crash asks of the run that is left: nothing lost, nothing half, nothing in the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ckpt
from ckpt.commit import find, names
from ckpt.commit.gc import collect_garbage
from ckpt.store.base import Store
from ckpt.store.open import open_store
from tests.workers.crashing import PATIENT, check, cut_values

StorageOptions = Mapping[str, Any] | None


@contextmanager
def opened(url: str, storage: StorageOptions) -> Iterator[Store]:
    """The store of a run."""
    store = open_store(url, options=PATIENT, storage_options=storage)
    try:
        yield store
    finally:
        store.close()


def check_run(url: str, complete: list[int], storage: StorageOptions = None) -> None:
    """Exactly these steps are complete, and hold what was saved; gc removes all else and nothing of them."""
    with opened(url, storage) as store:
        assert find.steps(store) == complete
        _check_steps(url, complete, storage)
        kept = {entry.key for step in complete for entry in _complete_attempt(store, step)}
        collect_garbage(store, options=PATIENT, force_unfinished=True)
        assert find.steps(store) == complete
        left = {entry.key for entry in store.list("") if not entry.key.startswith(names.EVENTS)}
        manifests = {f"step-{step:012d}/manifest.json" for step in complete}
        assert left == kept | manifests, "gc left something, or took too much"
    if "://" not in url:
        files = {path.relative_to(url).as_posix() for path in Path(url).rglob("*") if path.is_file()}
        assert {file for file in files if not file.startswith(names.EVENTS)} == left, "unfinished files are left"
    _check_steps(url, complete, storage)


def save_again(url: str, step: int, storage: StorageOptions = None) -> None:
    """Any job can save the step that a crash took."""
    state = {"cut": cut_values(step), "whole": torch.arange(50.0) + step, "progress": {"step": step}}
    with ckpt.Checkpointer(url, every=1, background=False, options=PATIENT, storage_options=storage) as run:
        run.step(step, state)
    _check_steps(url, [step], storage)


def _check_steps(url: str, steps: list[int], storage: StorageOptions) -> None:
    for step in steps:
        with ckpt.open(url, step=step, options=PATIENT, storage_options=storage) as checkpoint:
            check(checkpoint, step)


def _complete_attempt(store: Store, step: int) -> list[Any]:
    """Everything under the attempt that is the checkpoint of a step, but for receipts that were not cleared away."""
    contents = find.contents(store, step)
    prefix = f"step-{step:012d}/{contents.complete}/"
    return list(store.list(prefix))
