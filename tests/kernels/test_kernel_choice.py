"""`CKPT_KERNEL` is a demand: what is not there fails loudly, and nothing falls back in silence.

Method: the environment variable in this process, and fresh Python processes in which the native module cannot be
imported.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt import kernels
from ckpt.errors import InvalidInputError
from ckpt.kernels import choice, erasure, merge, reference

TREE = Path(__file__).resolve().parents[2]
CONTRACT = (TREE / "native/include/ckpt_core.h").read_text()


def test_unknown_kernel_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "avx9")
    with pytest.raises(InvalidInputError, match="found 'avx9'(.|\n)*reference, table, sse42, arm"):
        kernels.crc32c(b"a")


def test_kernel_of_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = next(name for name in ("arm", "sse42") if name not in choice.available())
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, absent)
    for call in (lambda: kernels.crc32c(b"a"), kernels.kernel_info):
        with pytest.raises(InvalidInputError, match=f"CKPT_KERNEL={absent}: this build"):
            call()


def run_without_native(code: str, demand: str | None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process whose import of the native module fails."""
    blocked = f"import sys; sys.modules['ckpt.kernels._native'] = None\n{code}"
    environment = {name: value for name, value in os.environ.items() if name != choice.ENVIRONMENT_VARIABLE}
    environment["PYTHONPATH"] = str(TREE)
    if demand is not None:
        environment[choice.ENVIRONMENT_VARIABLE] = demand
    return subprocess.run([sys.executable, "-c", blocked], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("demand", [None, "table"])
def test_missing_native_core_fails_at_import_and_says_how_to_build(demand: str | None) -> None:
    done = run_without_native("import ckpt.kernels", demand)
    assert done.returncode == 1
    assert "ImportError: the native core of ckpt" in done.stderr
    assert "make native" in done.stderr


def test_reference_runs_without_the_native_core() -> None:
    done = run_without_native(
        "from ckpt import kernels; print(hex(kernels.crc32c(b'123456789')), kernels.kernel_info()['native'])",
        "reference",
    )
    assert (done.stdout, done.stderr) == ("0xe3069283 False\n", "")


def test_dropping_the_demand_later_is_no_silent_fallback() -> None:
    done = run_without_native(
        "from ckpt import kernels; import os; del os.environ['CKPT_KERNEL']; kernels.crc32c(b'1')", "reference"
    )
    assert "not built" in done.stderr


def test_numbers_equal_those_of_the_header() -> None:
    status_enum = CONTRACT[: CONTRACT.index("} ckpt_status")]
    statuses = {name: int(value) for name, value in re.findall(r"CKPT_(\w+) = (\d+)", status_enum)}
    crc_kernels = {name.lower(): int(value) for name, value in re.findall(r"CKPT_KERNEL_(\w+) = (\d+)", CONTRACT)}
    assert {name: int(value) for name, value in choice.Status.__members__.items()} == statuses
    coders = {name.lower(): int(value) for name, value in re.findall(r"CKPT_CODER_(\w+) = (\d+)", CONTRACT)}
    loops = {name.lower(): int(value) for name, value in re.findall(r"CKPT_LOOPS_(\w+) = (\d+)", CONTRACT)}
    codes = {name.lower(): int(value) for name, value in re.findall(r"CKPT_CODE_(\w+) = (\d+)", CONTRACT)}
    assert {name: int(value) for name, value in choice.CrcKernel.__members__.items()} == crc_kernels
    assert {name: int(value) for name, value in choice.Coder.__members__.items()} == coders
    assert {name: int(value) for name, value in choice.Loops.__members__.items()} == loops
    ties = {name.lower(): int(value) for name, value in re.findall(r"CKPT_TIES_(\w+) = (\d+)", CONTRACT)}
    floats = dict(re.findall(r"CKPT_([FB][F0-9]+[A-Z0-9_]*) = (\d+)", CONTRACT))
    assert {name: int(value) for name, value in merge.TiesMode.__members__.items()} == ties
    assert {_short(name): int(value) for name, value in merge.FloatDtype.__members__.items()} == {
        name: int(value) for name, value in floats.items()
    }
    assert f"#define CKPT_MERGE_SOURCES_MAX {merge.SOURCES_MAX} " in CONTRACT
    assert f"#define CKPT_SUM_BLOCK {merge.SUM_BLOCK} " in CONTRACT
    assert {name: int(value) for name, value in erasure.CodeId.__members__.items()} == codes
    assert f"#define CKPT_DIMS_MAX {reference.DIMS_MAX} " in CONTRACT


def _short(dtype: str) -> str:
    """`float8_e4m3fn` as the header calls it: `F8_E4M3FN`."""
    return dtype.replace("bfloat", "BF").replace("float", "F").upper()


def test_stub_names_what_the_module_has() -> None:
    stub = ast.parse((TREE / "ckpt/kernels/_native.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    named |= {
        node.target.id for node in stub.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert named == {name for name in vars(choice.native()) if not name.startswith("_")}
