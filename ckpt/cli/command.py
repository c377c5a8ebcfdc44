"""What every command has: the common options, the run that it works on, and the layout that it aims at.

In: click's parsed arguments. Out: opened stores and checkpoints, noted in the printer for error messages. Holds no state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from ckpt import config
from ckpt.cli.address import Address, parse
from ckpt.cli.exit_codes import epilog
from ckpt.cli.printer import Printer
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import InvalidInputError, NotFoundError
from ckpt.layout.files import read_layout
from ckpt.layout.layout import Layout
from ckpt.layout.presets import AXIS_NAMES, PRESETS, from_degrees
from ckpt.store.base import Store
from ckpt.store.open import open_store

_Function = TypeVar("_Function", bound=Callable[..., Any])


class AddressType(click.ParamType):  # type: ignore[type-arg]  # generic only in new versions of click
    """`URL`, `URL@STEP`, `URL@latest`, `URL@A..B`."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        """The parsed address."""
        return value if isinstance(value, Address) else parse(value)


ADDRESS = AddressType()


def _sets(field: str, to: bool) -> Callable[[click.Context, click.Parameter, bool], None]:
    def set_field(context: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given:
            setattr(context.obj, field, to)

    return set_field


def _flag(*names: str, field: str, to: bool, text: str) -> Callable[[_Function], _Function]:
    return click.option(*names, is_flag=True, expose_value=False, is_eager=True, callback=_sets(field, to), help=text)


_COMMON = (
    _flag("--json", field="json", to=True, text="Print one JSON document."),
    _flag("-q", "--quiet", field="quiet", to=True, text="No progress and no notes; errors are still told."),
    _flag("--no-progress", field="bars", to=False, text="No progress."),
    _flag("--traceback", field="traceback", to=True, text="Show where in the program an error came from."),
)


def command(name: str) -> Callable[[Callable[..., int | None]], click.Command]:
    """A command of the program: gets the printer first, has the common options, lists the exit codes in its help."""

    def make(function: Callable[..., int | None]) -> click.Command:
        wrapped: Callable[..., Any] = click.pass_obj(function)
        for option in reversed(_COMMON):
            wrapped = option(wrapped)
        return click.command(name=name, epilog=epilog())(wrapped)

    return make


@contextmanager
def opened_run(printer: Printer, address: Address, *, role: str = "run") -> Iterator[Store]:
    """The store of a run, closed at the end. Nothing is asked of it yet."""
    printer.about[role] = address.url
    store = open_store(address.url, options=config.from_environment())
    try:
        yield store
    finally:
        store.close()


@contextmanager
def opened(printer: Printer, address: Address) -> Iterator[StoredCheckpoint]:
    """The one checkpoint that an address names."""
    step = address.one()
    with opened_run(printer, address) as store:
        yield StoredCheckpoint(store, step, config.from_environment())


def refuse_no_run(store: Store, folders: list[int]) -> None:
    """NotFoundError (`no-run`) when there is no step folder at all."""
    if not folders:
        raise NotFoundError(
            f"no run at {store.url}: there is no step folder",
            kind="no-run",
            hints=("name the folder that holds the `step-...` folders",),
        )


def target_options(function: _Function) -> _Function:
    """`--layout`, or degrees (1 where left out) and a preset."""
    options = (
        click.option("--layout", "layout_file", metavar="FILE", help="A layout file (docs/reference/layout-files.md)."),
        click.option("--tp", type=int, metavar="N", help="Ranks along the tensor-parallel axis."),
        click.option("--pp", type=int, metavar="N", help="Pipeline stages."),
        click.option(
            "--dp",
            type=int,
            metavar="N",
            help="Ranks that share the rest (FSDP). Each of the four is 1 where it is left out.",
        ),
        click.option("--ep", type=int, metavar="N", help="Ranks along the expert axis."),
        click.option("--preset", type=click.Choice(PRESETS), help="Rules by well-known names; default: what fits."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def target_layout(stored: StoredCheckpoint, target: dict[str, Any]) -> Layout:
    """The layout that the options ask for.

    Args:
        target: the values of `target_options`.
    """
    degrees = {name: target[name] for name in ("tp", "pp", "dp", "ep")}
    file, preset = target["layout_file"], target["preset"]
    asked = preset is not None or any(value is not None for value in degrees.values())
    if (file is None) != asked:
        raise InvalidInputError(
            "name the target either by --layout FILE or by --tp, --pp, --dp, --ep and --preset",
            kind="no-target",
            hints=("for example --tp 4 --pp 2 --dp 1",),
        )
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"layout file `{file}` cannot be read: {error}", kind="bad-layout") from error
        return read_layout(text, source=file)
    tensors = [(spec.name, spec.shape) for spec in stored.specs]
    # What is not named has size 1, also where the saved mesh had more: `--tp 4 --dp 1` is four ranks, whatever came before.
    named = {name: degree if degree is not None else 1 for name, degree in degrees.items()}
    return from_degrees(tensors, base=_without_other_axes(saved_layout(stored)), preset=preset, **named)


def _without_other_axes(layout: Layout | None) -> Layout | None:
    """The layout with every axis that no degree stands for (replicas, say) of size 1."""
    if layout is None:
        return None
    names = layout.mesh.names
    resizable = [next((axis for axis in axes if axis in names), None) for axes in AXIS_NAMES.values()]
    return layout.resized({axis: 1 for axis in names if axis not in resizable})


def saved_layout(stored: StoredCheckpoint) -> Layout | None:
    """The layout that the checkpoint was saved on, None when it is not recorded."""
    if stored.manifest.layout is None:
        return None
    return read_layout(json.dumps(stored.manifest.layout), source=f"the layout of step {stored.step}")
