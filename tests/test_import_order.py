"""The folders import one way only, and modules and functions stay short enough to read.

Method: parse every module of ckpt/ (nothing is imported) and compare its imports, wherever they stand, with the order of the
design, section 8. Exceptions are listed here with their reason, and an exception that is no longer needed fails too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ckpt"

# A part imports only from parts before it. `ckpt/__init__.py` and `ckpt/__main__.py` are the facade and come last.
ORDER = [
    "errors",
    "config",
    "failpoints",
    "events",
    "collector",
    "kernels",
    "layout",
    "format",
    "plan",
    "state",
    "snapshot",
    "store",
    "commit",
    "engine",
    "simulate",
    "agent",
    "convert",
    "merge",
    "delta",
    "lora",
    "search",
    "integrations",
    "observe",
    "api",
    "cli",
    "__init__",
    "__main__",
]

MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 60
LONG_FUNCTIONS: dict[str, str] = {}  # "<module path>:<function>": why it is better long

# Parts that must be usable without torch: pure planning, the format, and readers that run anywhere.
WITHOUT_TORCH = [
    "errors",
    "config",
    "failpoints",
    "events",
    "collector",
    "kernels",
    "layout",
    "format",
    "plan",
    "store",
    "commit",
    "simulate",
    "agent",
    "convert",
    "merge",
    "delta",
    "lora",
]
FORBIDDEN_ANYWHERE = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}  # nothing that runs code from a checkpoint

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """The part of the design that a module path (`layout/box.py`, `api.py`) belongs to."""
    return module.split("/")[0].removesuffix(".py")


def imports_of(module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` gives `a.b`, relative imports are made absolute."""
    folder = ["ckpt", *module.split("/")[:-1]]
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(folder[: len(folder) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, [base, node.module]))
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)


def functions_of(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code and comments, without the docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(function.body) > 1
    docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_every_part_has_its_place_in_the_order() -> None:
    assert {part_of(module) for module in MODULES} <= set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_parts_before_its_own(module: str) -> None:
    rank = ORDER.index(part_of(module))
    wrong = []
    for line, name in imports_of(module):
        names = name.split(".")
        if names[0] == "ckpt" and len(names) > 1:
            # A name of the facade itself (`from ckpt import save`) counts as an import of the facade.
            part = names[1] if names[1] in ORDER else "__init__"
            if ORDER.index(part) > rank:
                wrong.append(f"{module}:{line} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("module", MODULES)
def test_module_uses_nothing_that_its_part_must_do_without(module: str) -> None:
    forbidden = FORBIDDEN_ANYWHERE | ({"torch"} if part_of(module) in WITHOUT_TORCH else set())
    assert [
        f"{module}:{line} imports {name}" for line, name in imports_of(module) if name.split(".")[0] in forbidden
    ] == []


def test_modules_and_functions_are_short() -> None:
    long_modules = {m for m in MODULES if len((PACKAGE / m).read_text().splitlines()) > MODULE_LINES_MAX}
    long_functions = {
        f"{module}:{function.name}"
        for module in MODULES
        for function in functions_of(module)
        if lines_of(function) > FUNCTION_LINES_MAX
    }
    assert (long_modules, long_functions) == (set(), set(LONG_FUNCTIONS))
