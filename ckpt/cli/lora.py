"""`ckpt lora ADAPTER... -o URL`: merge LoRA adapters, or fold them into their base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ckpt import config
from ckpt.cli import texts
from ckpt.cli.command import command
from ckpt.cli.export import Peft, export_into
from ckpt.cli.merge import output_of, weights_of
from ckpt.cli.printer import Printer
from ckpt.config import ADAPTER_CONFIG_BYTES_MAX
from ckpt.convert.safetensors import DEFAULT_KEY
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import InvalidInputError
from ckpt.kernels.merge import FloatDtype
from ckpt.lora import api
from ckpt.lora.plan import METHODS

_Function = TypeVar("_Function", bound=Callable[..., Any])

_OPTIONS = (
    click.option("-o", "--output", required=True, metavar="URL[@STEP]", help="The run to write into; the step is the newest's."),
    click.option("--method", type=click.Choice(METHODS), default="concat", help="How to merge; default: concat, which is exact."),
    click.option("--rank", type=int, metavar="R", help="Of the result, with svd and lego; default: the largest there is."),
    click.option("--weights", metavar="W,W,...", help="A weight for each adapter, as they are named; default: equal shares."),
    click.option("--base", metavar="SOURCE", help="With fold: what the adapters belong to."),
    click.option("--dtype", type=click.Choice(tuple(FloatDtype.__members__)), help="Of the result; default: as it is there."),
    click.option("--key", default=DEFAULT_KEY, metavar="KEY", help="The state key of the model in checkpoints; default: model."),
    click.option("--adapter", metavar="NAME", help="The adapter's name, in checkpoints that hold several."),
    click.option("--adapter-config", metavar="FILE", help="The adapter_config.json of checkpoints that do not say."),
    click.option("--seed", type=int, default=0, metavar="N", help="With lego: of the starts of the clusters."),
    click.option("--memory", metavar="SIZE", help="Memory that this may take; refused when it needs more."),
    click.option("--export", "folder", metavar="DIR", help="Also write the result as a folder: PEFT's, or a model's with fold."),
)  # fmt: skip


def _options(function: _Function) -> _Function:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@command("lora")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@_options
def lora(printer: Printer, adapters: tuple[str, ...], **given: Any) -> None:
    """Merge LoRA adapters into one, or fold them into their base.

    An ADAPTER is a folder as PEFT writes it, or a checkpoint that holds one. What is merged is the weighted sum of the changes,
    scaling * B @ A: exactly (concat), at a rank (svd), by clusters of ranks (lego), by the mean of one factor where the other is
    shared (factors), or in the base's own weights (fold).
    """
    target = output_of(given["output"])
    printer.about["target"] = target["url"]
    with api.planned_merge(
        adapters,
        target["url"],
        method=given["method"],
        weights=weights_of(given["weights"]),
        rank=given["rank"],
        base=given["base"],
        step=target.get("step"),
        dtype=given["dtype"],
        seed=given["seed"],
        key=given["key"],
        adapter=given["adapter"],
        adapter_config=_file(given["adapter_config"]),
        memory=given["memory"],
    ) as merging:
        with printer.progress(f"merge adapters by {given['method']}", merging.nbytes) as bar:
            done = merging.run(bar.advance)
        exported = _export(printer, merging, done, given["folder"])
        records = [adapter.source.record() for adapter in merging.plan.adapters]
    for note in done.notes:
        printer.note(f"note: {note}")
    printer.document(
        {
            "adapters": records,
            "target": {"url": target["url"], "step": done.step},
            "attempt": done.attempt,
            "method": done.method,
            "num_modules": done.num_modules,
            "written_bytes": done.nbytes,
            "error": done.error,
            "modules": [vars(one) for one in done.modules],
            "notes": list(done.notes),
            "export": exported,
        }
    )
    printer.text(
        f"step {done.step} is in {target['url']}: {texts.plural(len(adapters), 'adapter')} merged by {done.method} in "
        f"{texts.plural(done.num_modules, 'module')}, {texts.size(done.nbytes)} written"
    )
    if done.modules:
        ranks = sorted({one.rank for one in done.modules})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        printer.text(f"rank {shown}; the change of no module is off by more than {done.error:.2g} of its norm")
    if exported is not None:
        printer.text(f"it is also in {exported['folder']}: {texts.plural(len(exported['files']), 'file')}")


def _export(printer: Printer, merging: api.Merging, done: api.Merged, folder: str | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    base = merging.plan.base
    options = config.from_environment()
    return export_into(
        printer,
        StoredCheckpoint(merging.store, done.step, options),
        folder,
        key=merging.key,
        config_from=base.url if base is not None and base.is_folder else None,
        options=options,
        peft=Peft() if base is None else None,
    )


def _file(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        with Path(path).open("rb") as stream:
            return stream.read(ADAPTER_CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidInputError(f"`{path}` cannot be read: {error.strerror}", kind="usage") from error
