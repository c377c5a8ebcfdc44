"""Merging: methods, recipes, the streaming run, and who works on it.

In: checkpoints. Out: a checkpoint. `ckpt.merge(...)` is the call: this module can be called, and is a package all the same.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """This package as the function that it is named after."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from ckpt.merge.api import merge

        return merge(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
