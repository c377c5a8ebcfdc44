"""Searching for a merge with the user's evaluator: drivers that ask for points, and the run that scores and publishes them.

In: checkpoints, an evaluator. Out: a checkpoint, and what every evaluation said. `ckpt.search(...)` is the call: this module can
be called, and is a package all the same.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt.search.api import OpenSpace, open_space
    from ckpt.search.candidate import Candidate
    from ckpt.search.driver import AskTell, Driver, Proposals, Session, search_driver
    from ckpt.search.plot import plot_front
    from ckpt.search.point import Point, Space
    from ckpt.search.run import Found
    from ckpt.search.score import Command, Score, on_checkpoint

_PLACES = {
    "open_space": "api",
    "OpenSpace": "api",
    "Candidate": "candidate",
    "AskTell": "driver",
    "Driver": "driver",
    "Proposals": "driver",
    "Session": "driver",
    "search_driver": "driver",
    "plot_front": "plot",
    "Point": "point",
    "Space": "point",
    "Found": "run",
    "Command": "score",
    "Score": "score",
    "on_checkpoint": "score",
}

__all__ = [
    "AskTell",
    "Candidate",
    "Command",
    "Driver",
    "Found",
    "OpenSpace",
    "Point",
    "Proposals",
    "Score",
    "Session",
    "Space",
    "on_checkpoint",
    "open_space",
    "plot_front",
    "search_driver",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


class _Callable(types.ModuleType):
    """This package as the function that it is named after."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from ckpt.search.api import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
