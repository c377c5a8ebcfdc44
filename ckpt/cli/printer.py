"""Everything that the command line says goes through here: stdout for data, stderr for all else.

In: tables, documents, notes, errors, progress. Out: text or JSON on the right stream. One object per run of the program, owned by
its main thread; `Bar.advance` may be called from any thread. Nothing needs colour to be read.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ckpt.cli import texts
from ckpt.errors import CheckpointError, InvalidInputError

LINE_EVERY_S = 10.0  # between progress lines where stderr is no terminal


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    title: str
    right: bool = False  # numbers


@dataclass(kw_only=True)
class Printer:
    """How this run of the program talks."""

    json: bool = False
    quiet: bool = False
    bars: bool = True
    traceback: bool = False
    line_every_s: float = LINE_EVERY_S
    clock: Callable[[], float] = time.monotonic
    about: dict[str, str] = field(default_factory=dict)  # what the command works on, for errors

    # stdout

    def document(self, document: dict[str, Any]) -> None:
        """The answer as JSON; nothing without `--json`."""
        if self.json:
            _write(sys.stdout, json.dumps(plain(document), indent=2, allow_nan=False) + "\n")

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[object]], *, footer: str = "") -> None:
        """The answer as a table: header, rule, rows, footer. Nothing with `--json`."""
        if self.json:
            return
        cells = [[texts.visible(str(cell)).replace("\n", "\\n") for cell in row] for row in rows]
        widths = [max([len(c.title), *(len(row[i]) for row in cells)]) for i, c in enumerate(columns)]
        lines = [_line([column.title for column in columns], columns, widths)] + ["  ".join("-" * w for w in widths)]
        lines += [_line(row, columns, widths) for row in cells]
        _write(sys.stdout, "\n".join(lines) + "\n" + (f"\n{footer}\n" if footer else ""))

    def text(self, text: str) -> None:
        """The answer as text. Nothing with `--json`."""
        if not self.json:
            _write(sys.stdout, texts.visible(text).rstrip("\n") + "\n")

    # stderr

    def note(self, text: str) -> None:
        """What happens, for a person; off with `--quiet` and `--json`."""
        if not self.quiet and not self.json:
            _write(sys.stderr, texts.visible(text) + "\n")

    def error(self, message: str, *, kind: str, exit_code: int, hints: Sequence[str] = ()) -> None:
        """One line, indented context, hints; with `--json` one JSON document."""
        if self.json:
            record = {"kind": kind, "message": message, "hints": list(hints), "exit_code": exit_code}
            _write(sys.stderr, json.dumps({"error": {**record, "context": self.about}}) + "\n")
            return
        first, *rest = texts.visible(message).split("\n")
        lines = [f"error: {first}", *(line if line.startswith("  ") else f"  {line}" for line in rest)]
        width = max((len(key) for key in self.about), default=0) + 1
        lines += [f"  {key + ':':<{width}} {texts.visible(value)}" for key, value in self.about.items()]
        if hints:
            lines += ["", *(f"hint: {texts.visible(hint)}" for hint in hints)]
        _write(sys.stderr, "\n".join(lines) + "\n")

    def trace(self) -> None:
        """The traceback of the error that is being handled, with `--traceback`."""
        if self.traceback:
            traceback.print_exc(file=sys.stderr)

    def confirm(self, question: str, *, yes: bool) -> None:
        """Return when the user agrees; InvalidInputError (exit 2) when not, or when there is nobody to ask."""
        if yes:
            return
        if not sys.stdin.isatty():
            raise InvalidInputError(
                f"{question} Nobody can be asked: standard input is no terminal",
                kind="not-confirmed",
                hints=("look at it with --dry-run, then give --yes",),
            )
        _write(sys.stderr, f"{texts.visible(question)} [y/N] ")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise InvalidInputError("not confirmed; nothing was removed", kind="not-confirmed")

    @contextmanager
    def progress(self, what: str, total_nbytes: int) -> Iterator[Bar]:
        """Progress over `total_nbytes` on stderr: a bar on a terminal, else a line every 10 s."""
        if self.quiet or not self.bars:
            yield Bar()
        elif sys.stderr.isatty():
            with _rich_bar(what, total_nbytes) as bar:
                yield bar
        else:
            yield _Lines(what, total_nbytes, self.line_every_s, self.clock)


class Bar:
    """A progress display; this one shows nothing."""

    def advance(self, nbytes: int) -> None:
        """So many more bytes are done. Any thread."""


class _Lines(Bar):
    """One line every so many seconds."""

    def __init__(self, what: str, total: int, every_s: float, clock: Callable[[], float]) -> None:
        self._what, self._total, self._every_s, self._clock = what, total, every_s, clock
        self._start = self._said = clock()
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = self._clock()
            if now - self._said < self._every_s:
                return
            self._said = now
            done, elapsed = min(self._done, self._total), now - self._start
        rate = done / elapsed if elapsed > 0 else 0.0
        share = 100.0 * done / self._total if self._total else 100.0
        left = texts.duration((self._total - done) / rate) + " left" if rate else "time left unknown"
        text = f"{self._what}: {texts.size(done)} of {texts.size(self._total)} ({share:.0f} %), {texts.size(rate)}/s, {left}"
        _write(sys.stderr, text + "\n")


class _RichBar(Bar):
    def __init__(self, progress: Progress, task: Any, total: int) -> None:
        self._progress, self._task, self._left = progress, task, total
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        with self._lock:  # rounding must not carry the bar beyond its end
            nbytes = min(nbytes, self._left)
            self._left -= nbytes
        self._progress.advance(self._task, nbytes)


@contextmanager
def _rich_bar(what: str, total: int) -> Iterator[Bar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _RichBar(progress, progress.add_task(what, total=total), total)


def plain(value: Any) -> Any:
    """The value with numbers that JSON lacks as the texts "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def describe(error: CheckpointError, printer: Printer) -> None:
    """Say an error of ckpt."""
    hints = [*error.hints, *(str(note) for note in getattr(error, "__notes__", ()))]
    printer.error(error.message, kind=error.kind, exit_code=error.exit_code, hints=hints)


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if column.right else cell.ljust(width)
        for cell, column, width in zip(cells, columns, widths, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
