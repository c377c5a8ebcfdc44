"""`ckpt export URL[@STEP] DIR`: the model of a checkpoint as plain safetensors files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import click

from ckpt import config
from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import ADDRESS, command, opened
from ckpt.cli.printer import Printer
from ckpt.config import EXPORT_FILE_BYTES, Options
from ckpt.convert.export import choose, export_safetensors
from ckpt.convert.peft import CONFIG_FILE, WEIGHTS_STEM, choose_factors, stored_config, write_config
from ckpt.convert.safetensors import DEFAULT_KEY
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import InvalidInputError
from ckpt.kernels.merge import FloatDtype


@command("export")
@click.argument("checkpoint", type=ADDRESS, metavar="URL[@STEP]")
@click.argument("folder", metavar="DIR")
@click.option(
    "--key",
    default=DEFAULT_KEY,
    metavar="KEY",
    help="The state key that the model has in the checkpoint; default: model.",
)
@click.option(
    "--dtype",
    type=click.Choice(tuple(FloatDtype.__members__)),
    help="Of all floating-point tensors; default: as they are.",
)
@click.option(
    "--rename", multiple=True, metavar="REGEX=TEXT", help="Another name for what matches in full; may be given often."
)
@click.option("--file-size", metavar="SIZE", help="Of one file, about; default: 5 GB.")
@click.option("--config-from", metavar="DIR", help="Copy config and tokenizer files of this model's folder.")
@click.option("--peft", is_flag=True, help="Write its LoRA adapter alone, as a folder of PEFT's.")
@click.option("--adapter", metavar="NAME", help="With --peft: which adapter, where there are several.")
def export(printer: Printer, checkpoint: Address, folder: str, **given: Any) -> None:
    """Write the model of one checkpoint into a new folder, as Hugging Face lays it out.

    One file, or several with an index. Optimizer state is left out; tied weights are written once.
    """
    options = config.from_environment()
    if given["adapter"] is not None and not given["peft"]:
        raise InvalidInputError("--adapter goes with --peft", kind="usage")
    with opened(printer, checkpoint) as stored:
        done = export_into(
            printer,
            stored,
            folder,
            key=given["key"],
            config_from=given["config_from"],
            options=options,
            dtype=given["dtype"],
            rename=[_rename(text) for text in given["rename"]],
            file_bytes=texts.parse_size(given["file_size"]) if given["file_size"] is not None else EXPORT_FILE_BYTES,
            peft=Peft(adapter=given["adapter"]) if given["peft"] else None,
        )
    printer.document({"source": {"url": checkpoint.url, "step": stored.step}, **done})
    printer.text(
        f"step {stored.step} is in {folder}: {texts.plural(done['num_tensors'], 'tensor')} of {texts.size(done['nbytes'])} in "
        f"{texts.plural(len(done['files']), 'file')}, {texts.duration(done['seconds'])}"
    )


@dataclass(frozen=True, kw_only=True)
class Peft:
    """Export an adapter alone."""

    adapter: str | None = None  # its name, where there are several


def export_into(
    printer: Printer,
    stored: StoredCheckpoint,
    folder: str,
    *,
    key: str,
    config_from: str | None,
    options: Options,
    dtype: str | None = None,
    rename: list[tuple[str, str]] | None = None,
    file_bytes: int = EXPORT_FILE_BYTES,
    peft: Peft | None = None,
) -> dict[str, Any]:
    """Export, with progress; what was done, for a document."""
    tensors = choose(stored, key=key, dtype=dtype, rename=rename or [])
    more, stem = {}, "model"
    if peft is not None:
        more, stem = {CONFIG_FILE: write_config(stored_config(stored))}, WEIGHTS_STEM
        tensors, file_bytes = choose_factors(tensors, peft.adapter), sys.maxsize  # always one file
    total = sum(tensor.nbytes + tensor.spec.nbytes for tensor in tensors)
    with printer.progress(f"export step {stored.step}", total) as bar:
        done = export_safetensors(
            stored,
            folder,
            tensors,
            options=options,
            file_bytes=file_bytes,
            config_from=config_from,
            stem=stem,
            more=more,
            progress=bar.advance,
        )
    return {
        "folder": folder,
        "files": list(done.files),
        "num_tensors": done.num_tensors,
        "nbytes": done.nbytes,
        "seconds": round(done.seconds, 3),
    }


def _rename(text: str) -> tuple[str, str]:
    pattern, equals, replacement = text.partition("=")
    if not equals or not pattern:
        raise InvalidInputError(f"`--rename {text}` must be REGEX=TEXT", kind="usage")
    return pattern, replacement
