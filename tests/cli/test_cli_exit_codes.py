"""Every exit code, reached through the program, and the form of errors.

Method: one real situation per code; codes that need a broken world (a bug of ours, an interrupt) get it by monkeypatching.
"""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ckpt.cli.ls as ls_module
from ckpt import errors
from ckpt.cli import run
from ckpt.cli.exit_codes import MEANINGS, exit_code_of
from tests.cli.conftest import Program, rewrite_manifest


def test_0_done(program: Program, gpt: Path) -> None:
    assert program("ls", gpt).code == 0 and program("--help").code == 0 and program("ls", "--help").code == 0


def test_1_failed(program: Program, gpt: Path) -> None:
    rewrite_manifest(gpt / "step-000000000030" / "manifest.json", layout=None)
    outcome = program("show", gpt, "--layout")
    assert outcome.code == 1 and "error: the layout of step 30 is not recorded" in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["ls"],
        ["ls", "--no-such-option", "{run}"],
        ["ls", "{run}@lastest"],
        ["show", "{run}@10..20"],
        ["forget", "{run}"],
        ["forget", "{run}@10", "--keep-last", "1"],
        ["forget", "{run}", "--keep-last", "0"],
        ["unforget", "{run}"],
        ["gc", "{run}@10"],
        ["plan", "{run}"],
        ["plan", "{run}", "--dp", "2", "--layout", "x.yaml"],
        ["plan", "{run}", "--layout", "/no/such/file.yaml"],
        ["plan", "{run}", "--preset", "fsdp", "--tp", "2"],
        ["reshard", "{run}", "{run}@5", "--dp", "1"],
        ["reshard", "{run}", "{run}-new", "--dp", "1", "--memory", "lots"],
        ["copy", "{run}", "{run}@5"],
        ["copy", "{run}", "{run}-new", "--memory", "lots"],
    ],
)
def test_2_usage(program: Program, gpt: Path, arguments: list[str]) -> None:
    outcome = program(*(argument.format(run=gpt) for argument in arguments))
    assert outcome.code == 2 and outcome.out == "" and outcome.err
    assert not (gpt.parent / "gpt-new").exists()


def test_3_some_items_failed(program: Program, gpt: Path) -> None:
    (gpt / "step-000000000010" / "manifest.json").write_text("{}")
    assert program("ls", gpt).code == 3


@pytest.mark.parametrize("command", ["ls", "show", "tensors", "verify", "unforget", "gc"])
def test_10_no_run_there(program: Program, tmp_path: Path, command: str) -> None:
    argument = tmp_path / "typo" if command != "unforget" else f"{tmp_path}/typo@1"
    assert program(command, argument).code == 10
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("command", ["ls", "show", "tensors", "verify", "forget", "unforget"])
def test_11_no_such_checkpoint(program: Program, gpt: Path, command: str) -> None:
    assert program(command, f"{gpt}@11").code == 11


def test_12_exists_already(program: Program, gpt: Path) -> None:
    before = sorted(gpt.rglob("*"))
    for arguments in (("reshard", gpt, gpt, "--dp", 2), ("copy", gpt, gpt)):
        assert program(*arguments).code == 12 and sorted(gpt.rglob("*")) == before


def test_13_damage_found(program: Program, gpt: Path) -> None:
    next((gpt / "step-000000000030").glob("*/tensors.parquet")).write_bytes(b"")
    assert program("verify", gpt).code == 13 and program("tensors", gpt).code == 13


def test_14_store_unreachable_or_refuses(program: Program, gpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(store: object) -> list[int]:
        raise errors.StoreError("the server does not answer", kind="unreachable")

    monkeypatch.setattr(ls_module.find, "step_folders", refuse)
    assert program("ls", gpt).code == 14


def test_15_newer_format(program: Program, gpt: Path) -> None:
    rewrite_manifest(gpt / "step-000000000030" / "manifest.json", version=2)
    assert program("show", gpt).code == 15 and program("show", f"{gpt}@20").code == 0
    assert program("verify", gpt).code == 15


def test_20_a_bug_of_ours_asks_for_a_report(program: Program, gpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ls_module.find, "step_folders", lambda store: 1 / 0)
    outcome = program("ls", gpt)
    assert outcome.code == 20 and "hint: please report this" in outcome.err and "Traceback" not in outcome.err
    assert "Traceback" in program("ls", gpt, "--traceback").err
    assert json.loads(program("ls", gpt, "--json").err)["error"]["kind"] == "bug"


def test_130_interrupted(program: Program, gpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(store: object) -> list[int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(ls_module.find, "step_folders", interrupt)
    assert program("ls", gpt).code == 130


def test_an_interrupted_reshard_ends_with_130_and_leaves_no_checkpoint(gpt: Path, tmp_path: Path) -> None:
    """A real SIGINT, in the middle of the work."""
    code = (
        "import sys, time, ckpt.engine.reshard as r; from ckpt.cli import run\n"
        "fill = r._Reshard._fill\n"
        "def slow(self, *a):\n    fill(self, *a); print('filled', flush=True); time.sleep(30)\n"
        "r._Reshard._fill = slow\n"
        f"sys.exit(run(['reshard', {str(gpt)!r}, {str(tmp_path / 'new')!r}, '--dp', '2']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"filled\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and b"error: interrupted" in err
    assert [path for path in (tmp_path / "new").rglob("*") if path.is_file()] == []


def test_every_error_class_has_a_documented_code() -> None:
    classes = [errors.CheckpointError]
    for cls in classes:
        classes += cls.__subclasses__()
    found = {exit_code_of(cls("x")) for cls in classes} | {exit_code_of(errors.NotFoundError("x", kind="no-run"))}
    assert found <= MEANINGS.keys()
    assert exit_code_of(ZeroDivisionError()) == 20 and exit_code_of(KeyboardInterrupt()) == 130


def test_an_error_is_one_line_context_and_hints(program: Program, gpt: Path) -> None:
    assert program("show", f"{gpt}@7").err == (
        f"error: no complete checkpoint of step 7 in {gpt}; complete steps: 10, 20, 30\n  run: {gpt}\n\nhint: ckpt ls {gpt}\n"
    )


def test_errors_in_json_name_kind_and_code(program: Program, gpt: Path) -> None:
    record = json.loads(program("show", f"{gpt}@7", "--json").err)["error"]
    assert (record["kind"], record["exit_code"], record["context"]) == ("no-checkpoint", 11, {"run": str(gpt)})
    assert json.loads(program("ls", "--json").err)["error"]["exit_code"] == 2


# deleting, in two steps


def test_forget_shows_reasons_first_and_unforget_brings_back(program: Program, gpt: Path) -> None:
    rules = ("--keep-last", 1, "--keep-every", 20)
    dry = program("forget", gpt, *rules, "--dry-run", "--json").document
    assert [(c["step"], c["keep"], c["reason"]) for c in dry["checkpoints"]] == [
        (10, False, "no rule keeps it"),
        (20, True, "every 20"),
        (30, True, "the newest"),
    ]
    assert dry["forgotten"] == [] and len(program("ls", gpt, "--json").document["checkpoints"]) == 3
    assert program("forget", gpt, *rules, "--json").document["forgotten"] == [10]
    assert program("show", f"{gpt}@10").code == 11
    assert program("unforget", f"{gpt}@10", "--json").document["restored"] == [10]
    assert program("verify", f"{gpt}@10").code == 0


def test_forget_keeps_the_best_and_takes_named_steps(program: Program, gpt: Path) -> None:
    best = program("forget", gpt, "--keep-best", 1, "--metric", "loss", "--mode", "max", "--dry-run", "--json").document
    assert [c["keep"] for c in best["checkpoints"]] == [True, False, True]
    assert program("forget", f"{gpt}@..20", "--json").document["forgotten"] == [10, 20]
    assert program("unforget", f"{gpt}@1..", "--json").document["restored"] == [10, 20]


def test_gc_shows_first_and_refuses_without_a_terminal(
    program: Program, gpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("forget", f"{gpt}@10")
    image = next((gpt / "step-000000000010").glob("*/*.safetensors"))
    dry = program("gc", gpt, "--dry-run", "--json").document
    assert [(r["step"], r["reason"]) for r in dry["removals"]] == [(10, "forgotten")] and image.exists()
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        refused = program("gc", gpt)
    assert refused.code == 2 and "--yes" in refused.err and image.exists()
    done = program("gc", gpt, "--yes", "--json").document
    assert done["freed_bytes"] == dry["removals"][0]["nbytes"] > 0 and not image.exists()
    assert program("unforget", f"{gpt}@10").code == 11
    assert [c["step"] for c in program("ls", gpt, "--json").document["checkpoints"]] == [20, 30]
    assert program("gc", gpt).code == 0  # nothing to remove: nothing to ask


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "yep\n"])
def test_gc_takes_nothing_but_yes_for_a_yes(
    program: Program, gpt: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    program("forget", f"{gpt}@10")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert program("gc", gpt).code == 2
    assert next((gpt / "step-000000000010").glob("*/*.safetensors")).exists()


def test_gc_asks_on_a_terminal(gpt: Path) -> None:
    run(["forget", f"{gpt}@10", "--quiet", "--json"])
    image = next((gpt / "step-000000000010").glob("*/*.safetensors"))
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ckpt", "gc", str(gpt)], stdin=child, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    os.close(child)
    os.write(parent, b"y\n")
    out, err = process.communicate(timeout=60)
    os.close(parent)
    assert process.returncode == 0 and b"[y/N]" in err and b"forgotten" in out and not image.exists()


def test_a_reader_that_leaves_early_is_no_bug(saved_runs: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ckpt", "tensors", str(saved_runs / "gpt")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    err = process.stderr.read()
    process.stderr.close()
    assert process.returncode == 1 and err == b""
