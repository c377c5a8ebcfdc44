"""Parameters of a method, out of a recipe.

In: the class of a method (a dataclass) and nodes. Out: an instance, its fields checked and converted. Errors say the place, the
parameter and what was expected. Pure.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ckpt.errors import InvalidInputError
from ckpt.merge.method import Method
from ckpt.merge.nodes import KIND, Node, nearest

T = TypeVar("T")


def make(cls: type[Method], given: Mapping[str, Node], at: Node) -> Method:
    """An instance of a method with these parameters. InvalidInputError (`bad-recipe`) for one that it does not take."""
    return instance(cls, f"method `{cls.name}`", given, at)


def instance(cls: type[T], called: str, given: Mapping[str, Node], at: Node) -> T:
    """An instance of any dataclass whose fields a recipe gives. `called`: what it is, for messages."""
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, node in given.items():
        if name not in fields:
            raise node.fail(f"{called} has no parameter `{name}`", nearest(name, list(fields) or ["none"]))
        values[name] = _converted(hints[name], node, f"parameter `{name}` of {called}")
    lacking = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if lacking:
        raise at.fail(f"{called} needs {', '.join(f'`{name}`' for name in lacking)}")
    try:
        return cls(**values)
    except InvalidInputError as error:
        raise InvalidInputError(f"{at.at}: {error.message}", kind=KIND, hints=error.hints) from None


def plain(method: Method) -> dict[str, Any]:
    """The parameters as JSON values, for lineage."""
    return {
        field.name: _plain(value)
        for field in dataclasses.fields(method)
        for value in [getattr(method, field.name)]
        if value is not None
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.plain() if hasattr(value, "plain") else value


def described(cls: type[Method]) -> list[tuple[str, str, str]]:
    """(name, type, default) of each parameter, for help."""
    hints = get_type_hints(cls)
    return [
        (field.name, _text_of(hints[field.name]), "required" if _is_required(field) else repr(field.default))
        for field in dataclasses.fields(cls)
        if field.init
    ]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _converted(hint: Any, node: Node, subject: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _one_of([arg for arg in get_args(hint) if arg is not type(None)], node, subject)
    if origin is Literal:
        return node.choice(subject, [str(arg) for arg in get_args(hint)])
    if origin is tuple:
        return tuple(_converted(get_args(hint)[0], item, f"each of {subject}") for item in node.items(subject))
    if hasattr(hint, "from_node"):
        return hint.from_node(node)
    converters = {bool: node.flag, int: lambda s: node.whole(s, least=-(1 << 62)), float: node.number, str: node.text}
    if hint not in converters:
        raise AssertionError(f"{subject} has a type that recipes cannot give: {hint}")
    return converters[hint](subject)


def _one_of(hints: list[Any], node: Node, subject: str) -> Any:
    for hint in hints[:-1]:
        try:
            return _converted(hint, node, subject)
        except InvalidInputError:
            continue
    return _converted(hints[-1], node, subject)


def _text_of(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_text_of(arg) for arg in get_args(hint) if arg is not type(None))
    if origin is Literal:
        return " or ".join(f"`{arg}`" for arg in get_args(hint))
    if origin is tuple:
        return f"list of {_text_of(get_args(hint)[0])}s"
    named = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return named.get(hint, getattr(hint, "__name__", str(hint)).lower())
