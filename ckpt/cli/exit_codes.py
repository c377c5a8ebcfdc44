"""The exit codes of the command line, out of ckpt.errors.

In: exceptions. Out: exit codes and what they mean. Pure. Append-only: a code never changes its meaning.
"""

from __future__ import annotations

from ckpt.errors import CheckpointError

DONE, FAILED, USAGE, PARTLY, DAMAGED, BUG, INTERRUPTED = 0, 1, 2, 3, 13, 20, 130

MEANINGS: dict[int, str] = {
    DONE: "done",
    FAILED: "failed",
    USAGE: "wrong usage, or a confirmation is missing",
    PARTLY: "finished, some items failed",
    10: "no run there",
    11: "no such checkpoint",
    12: "it exists already, or another writer holds it",
    DAMAGED: "damage found",
    14: "the store is unreachable, or refused",
    15: "the format is newer than this program",
    BUG: "a bug of ckpt",
    INTERRUPTED: "interrupted",
}


def exit_code_of(error: BaseException) -> int:
    """The code that the program ends with when `error` ends it."""
    if isinstance(error, CheckpointError):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else BUG


def epilog() -> str:
    """The part of every help text that lists the codes."""
    return "Exit status: " + ", ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items()) + "."
