"""Goal: a save that was begun is not lost because the program ends. Method: a real process that saves and falls off its end."""

from __future__ import annotations

import pathlib
import subprocess
import sys

from ckpt.commit import find
from ckpt.config import Options
from ckpt.store.open import open_store

ROOT = pathlib.Path(__file__).resolve().parents[2]

SAVE = """
import torch, ckpt
ckpt.async_save({"w": torch.arange(3_000_000)}, "run", step=1)
"""

SAVE_THAT_FAILS = """
import logging, torch, ckpt
logging.basicConfig()
import ckpt.engine.save
def full(*_args, **_more):
    raise ckpt.StoreError("no space left", kind="full")
ckpt.engine.save.SaveSession._write_image = full
ckpt.async_save({"w": torch.arange(3)}, "run", step=1)
"""


def run(code: str, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "CKPT_FAILPOINT": "save.before-image:delay=1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_background_save_is_finished_when_the_process_ends(tmp_path: pathlib.Path) -> None:
    done = run(SAVE, tmp_path)

    assert (done.returncode, find.steps(open_store(tmp_path / "run", options=Options()))) == (0, [1]), done.stderr


def test_a_background_save_that_failed_is_not_silent_at_the_end(tmp_path: pathlib.Path) -> None:
    done = run(SAVE_THAT_FAILS, tmp_path)

    assert "background save of step 1 failed: no space left" in done.stderr
