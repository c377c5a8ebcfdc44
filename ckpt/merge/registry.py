"""Which merge methods there are, by name: those of ckpt/merge/methods/, those that other packages bring, those of this program.

In: classes and functions. Out: classes of methods. Packages bring theirs by an entry point of the group `ckpt.merge_methods`,
whose name is the method's and whose value is a class or a function as `merge_method` takes it. Never merges anything.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import pkgutil
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.merge.method import Constants, Elementwise, Linear, Method, Needs
from ckpt.merge.nodes import nearest
from ckpt.merge.tile import Tile

GROUP = "ckpt.merge_methods"
_Subject = TypeVar("_Subject", bound=Callable[..., Any])

_methods: dict[str, type[Method]] = {}
_lock = threading.RLock()
_loaded = False


def merge_method(name: str, *, needs: Needs | None = None) -> Callable[[_Subject], _Subject]:
    """Register a method under a name: a subclass of Linear, Elementwise or Matrix, or a plain function.

    A function `f(arrays, weights, **parameters)` is an elementwise method: `arrays` is a list of fp64 arrays of one shape, one
    per source (deltas to the base where `needs` asks for a base), `weights` their weights; it returns an array of that shape
    (a delta that is added to the base, with a base). Its keyword-only arguments, annotated, are parameters of recipes.

    A name that is taken by another method is refused (`taken`); the same one may be registered again.
    """

    def register(subject: _Subject) -> _Subject:
        _add(name, _class_of(name, subject, needs))
        return subject

    return register


def find(name: str) -> type[Method]:
    """The method of this name. InvalidInputError (`unknown-method`) that offers the nearest ones."""
    _load()
    if name not in _methods:
        raise InvalidInputError(
            f"unknown merge method `{name}`",
            kind="unknown-method",
            hints=(nearest(name, known()), "ckpt merge --methods"),
        )
    return _methods[name]


def known() -> list[str]:
    """Names of all methods, sorted."""
    _load()
    return sorted(_methods)


def module_of(name: str) -> str:
    """The module that another process must import to have this method; "" for one that comes by itself."""
    cls = find(name)
    module = str(getattr(cls, "registered_in", cls.__module__))
    if module.startswith("ckpt.merge.") or any(entry.name == name for entry in _entry_points()):
        return ""
    return module


def _entry_points() -> Sequence[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=GROUP))


def _load() -> None:
    """Import what registers itself, once."""
    global _loaded
    with _lock:
        if _loaded:
            return
        _loaded = True
        import ckpt.merge.methods as folder

        for module in pkgutil.iter_modules(folder.__path__):
            importlib.import_module(f"{folder.__name__}.{module.name}")
        for entry in _entry_points():
            if entry.name not in _methods:
                subject = entry.load()
                if entry.name not in _methods:  # its module may have used the decorator
                    _add(entry.name, _class_of(entry.name, subject, None))


def _add(name: str, cls: type[Method]) -> None:
    with _lock:
        there = _methods.get(name)
        if there is not None and (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InvalidInputError(
                f"merge method `{name}` is already that of {there.__module__}.{there.__qualname__}", kind="taken"
            )
        _methods[name] = cls


def _class_of(name: str, subject: Any, needs: Needs | None) -> type[Method]:
    if inspect.isclass(subject):
        if not issubclass(subject, (Linear, Elementwise)) or not dataclasses.is_dataclass(subject):
            raise InvalidInputError(
                f"merge method `{name}` must be a dataclass made from Linear, Elementwise or Matrix"
            )
        subject.name = name
        return subject
    if not callable(subject):
        raise InvalidInputError(f"merge method `{name}` must be a class or a function, found {subject!r}")
    return _from_function(name, subject, needs or Needs())


def _from_function(name: str, function: Callable[..., Any], needs: Needs) -> type[Method]:
    if needs.passes:
        raise InvalidInputError(
            f"merge method `{name}`: passes of statistics need a class with `observe` and `resolve`"
        )
    hints = get_type_hints(function)
    arguments = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: list[Any] = [
        (p.name, hints.get(p.name, float))
        if p.default is p.empty
        else (p.name, hints.get(p.name, float), dataclasses.field(default=p.default))
        for p in arguments
    ]

    def apply(self: Any, tile: Tile, constants: Constants) -> NDArray[np.float64]:
        values = {p.name: getattr(self, p.name) for p in arguments}
        out = function(tile.deltas if needs.base else tile.arrays, tile.weights, **values)
        return tile.base + out if needs.base else np.asarray(out, np.float64)

    members = {"needs": property(lambda self: needs), "apply": apply, "__doc__": function.__doc__, "name": name}
    cls = dataclasses.make_dataclass(
        function.__name__, fields, bases=(Elementwise,), namespace=members, frozen=True, kw_only=True
    )
    cls.__module__, cls.__qualname__ = __name__, f"{function.__module__}.{function.__qualname__}"
    cls.registered_in = function.__module__  # type: ignore[attr-defined]
    return cls
