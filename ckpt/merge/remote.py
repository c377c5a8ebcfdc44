"""A job of one process, opened in another one.

In: the job there. Out: a JSON value that says all that another process needs; and the job again, here, from such a value. What
makes the bytes of the result comes from the store: the record with which the merge began, whose digest is checked.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ckpt.config import Options
from ckpt.merge import registry
from ckpt.merge.job import Job, read_unfinished
from ckpt.merge.plan import make_plan
from ckpt.merge.run import recipe_again
from ckpt.merge.sources import open_sources
from ckpt.store.open import open_store


def described(job: Job, storage: Mapping[str, Any] | None) -> dict[str, Any]:
    """The job as a JSON value."""
    return {
        "url": absolute(job.into.url),
        "step": job.step,
        "attempt": job.attempt,
        "options": asdict(job.options),
        "storage_options": dict(storage or {}),
        "imports": sorted({m for bound in job.plan.bounds if (m := registry.module_of(bound.method.name))}),
    }


@contextmanager
def opened(said: Mapping[str, Any]) -> Iterator[Job]:
    """The job again. MismatchError (`changed`) when this process would make other bytes."""
    for module in said["imports"]:
        importlib.import_module(module)
    options, storage = Options(**said["options"]), said["storage_options"] or None
    open_at = functools.partial(open_store, options=options, storage_options=storage)
    store = open_at(said["url"])
    try:
        found = read_unfinished(store, said["step"], said["attempt"])
        recipe = recipe_again(found.recipe)
        sources = open_sources(recipe.sources, recipe.base, options, open_at)
        try:
            plan = make_plan(sources, recipe, image_bytes=found.image_bytes)
            job = Job(plan, store, found.attempt, found.limits, options)
            job.check(found)
            yield job
        finally:
            sources.close()
    finally:
        store.close()


def absolute(url: str) -> str:
    """A URL that means the same to a process elsewhere."""
    return url if "://" in url else os.path.abspath(url)
