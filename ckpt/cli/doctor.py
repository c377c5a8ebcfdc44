"""`ckpt doctor [URL]`: what this installation is made of, whether its core is right, and what a store can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import click
import numpy as np
import psutil

from ckpt import kernels
from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.checks import Check, check_copy, check_crc, check_store
from ckpt.cli.command import ADDRESS, command, opened_run
from ckpt.cli.exit_codes import DONE, PARTLY
from ckpt.cli.printer import Column, Printer
from ckpt.commit.complete import PROGRAM

_PACKAGES = ("torch", "numpy", "pyarrow", "fsspec", "s3fs", "safetensors", "zarr", "click", "rich")


@command("doctor")
@click.argument("run", type=ADDRESS, required=False, metavar="[URL]")
def doctor(printer: Printer, run: Address | None) -> int:
    """Show versions, processor and kernels, and test the core. With URL also what that store can do.

    Writes a few small objects below URL/.ckpt-doctor/ and removes them.
    """
    facts = _facts()
    checks = [check_crc(), check_copy()]
    if run is not None:
        with opened_run(printer, run) as store:
            checks += check_store(store)
    ok = all(check.ok for check in checks)
    printer.document(
        {
            "ok": ok,
            **facts,
            "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in checks],
            "url": run.url if run is not None else None,
        }
    )
    _print(printer, facts, checks)
    return DONE if ok else PARTLY


def _facts() -> dict[str, Any]:
    return {
        "program": PROGRAM,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {"machine": platform.machine(), "count": os.cpu_count(), "usable": len(psutil.Process().cpu_affinity())}
        if hasattr(psutil.Process, "cpu_affinity")
        else {"machine": platform.machine(), "count": os.cpu_count(), "usable": os.cpu_count()},
        "memory_bytes": psutil.virtual_memory().total,
        "memory_free_bytes": psutil.virtual_memory().available,
        "kernels": kernels.kernel_info(),
        **_torch_facts(),
        "byte_order": "little" if np.little_endian else "big",
    }


def _torch_facts() -> dict[str, Any]:
    """What torch was built with. Imported here, so that no other command waits for torch."""
    import torch
    import torch.distributed as dist

    return {
        "distributed": {
            "gloo": dist.is_available() and dist.is_gloo_available(),
            "nccl": dist.is_available() and dist.is_nccl_available(),
        },
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(printer: Printer, facts: dict[str, Any], checks: list[Check]) -> None:
    kernel = facts["kernels"]
    rows = [
        ("ckpt", facts["program"].split()[1]),
        ("python", f"{facts['python']} on {facts['platform']}"),
        *((name, version or "not installed") for name, version in facts["packages"].items()),
        ("processor", f"{facts['cpu']['machine']}, {facts['cpu']['usable']} of {facts['cpu']['count']} usable"),
        ("memory", f"{texts.size(facts['memory_free_bytes'])} free of {texts.size(facts['memory_bytes'])}"),
        ("copy kernel", kernel["copy"]),
        ("crc32c kernel", f"{kernel['crc32c']} (here: {', '.join(kernel['crc32c_available']) or 'none'})"),
        ("built by", f"{kernel['compiler'] or 'unknown'}, {kernel['build_type'] or 'unknown'}"),
        ("distributed", ", ".join(name for name, there in facts["distributed"].items() if there) or "none"),
        ("cuda devices", ", ".join(facts["cuda_devices"]) or "none"),
    ]
    printer.table((Column(title="part"), Column(title="found")), rows)
    printer.text("")
    columns = (Column(title="check"), Column(title="result"), Column(title="detail"))
    printer.table(columns, [(check.name, "ok" if check.ok else "FAILED", check.detail) for check in checks])
