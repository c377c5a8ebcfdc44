"""A real browser without a window: what a page becomes in it.

In: a page. Out: its document after the scripts ran, what it logged, and a picture. Finds Chromium or Chrome on the PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)
_TIME_MS = 10_000  # that scripts may take, by a clock that runs only while they do


def find() -> str | None:
    """The browser of this machine."""
    return next((found for found in map(shutil.which, PROGRAMS) if found), None)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A page as the browser showed it."""

    dom: str
    log: str
    picture: Any  # height x width x 3, 0.0 to 1.0


def look(page: Path, *, width: int = 1240, height: int = 2400) -> Seen:
    """Open a page: its document, its log and its picture."""
    import matplotlib.image

    browser = find()
    assert browser is not None
    picture = page.with_suffix(".png")
    command = [
        browser, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage",
        f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},{height}",
        f"--virtual-time-budget={_TIME_MS}", "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
    ]  # fmt: skip
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # the sandbox of Chromium does not start as root
    shown = _run([*command, "--dump-dom", f"--screenshot={picture}", page.as_uri()])
    if not picture.exists():  # older versions do one thing at a time
        _run([*command, f"--screenshot={picture}", page.as_uri()])
    return Seen(dom=shown.stdout, log=shown.stderr, picture=matplotlib.image.imread(picture)[:, :, :3])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done
