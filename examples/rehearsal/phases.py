"""What the demo runs, in which order, and what each phase must show.

In: the length of the run. Out: `Phase` records. Pure: starts nothing, reads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Expected = Literal["reference", "bit-equal", "close"]

SAVE_EVERY = 4  # steps
# The rank dies when its image is durable and its receipt is not: in the middle of the save, for itself and the others.
FAILPOINT = "commit.before-receipt"
KILLED_RANK = 3


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One torchrun job of the demo."""

    name: str
    layout: str  # of examples.gpt.parallel
    layout_text: str  # for people
    num_ranks: int
    run: str  # folder of its checkpoints, below the demo's; phases with the same one follow each other
    stop: int  # last step, inclusive
    resumes_from: int  # the step it must find; 0: starts anew
    expected: Expected  # of its losses, against those of the undisturbed run
    kill_at: int | None = None  # the step whose save is cut off by SIGKILL
    fork_of: str | None = None  # start from a copy of this run


@dataclass(frozen=True, kw_only=True)
class Script:
    """All phases and the settings that they share."""

    steps: int
    layers: int
    phases: tuple[Phase, ...]


def script(*, quick: bool) -> Script:
    """The whole demo, or the short one of the tests."""
    if quick:
        return _script(steps=16, layers=2, killed=8, stops=(8, 12))
    return _script(steps=64, layers=6, killed=24, stops=(36, 52))


def _script(*, steps: int, layers: int, killed: int, stops: tuple[int, int]) -> Script:
    assert all(step % SAVE_EVERY == 0 for step in (steps, killed, *stops))
    undisturbed = Phase(
        name="undisturbed",
        layout="tp_fsdp",
        layout_text="TP 2 × FSDP2 2",
        num_ranks=4,
        run="undisturbed",
        stop=steps,
        resumes_from=0,
        expected="reference",
    )
    killed_phase = replace(undisturbed, name="killed", run="gpt", expected="bit-equal", kill_at=killed)
    saved = killed - SAVE_EVERY
    same_layout = replace(
        undisturbed,
        name="same layout",
        run="gpt-same-layout",
        fork_of="gpt",
        resumes_from=saved,
        expected="bit-equal",
    )
    resharded = (
        _resharded(1, "fsdp", "FSDP2", num_ranks=2, resumes_from=saved, stop=stops[0]),
        _resharded(2, "pp", "2 pipeline stages", num_ranks=2, resumes_from=stops[0], stop=stops[1]),
        _resharded(3, "single", "one process", num_ranks=1, resumes_from=stops[1], stop=steps),
    )
    return Script(steps=steps, layers=layers, phases=(undisturbed, killed_phase, same_layout, *resharded))


def _resharded(number: int, layout: str, text: str, *, num_ranks: int, resumes_from: int, stop: int) -> Phase:
    return Phase(
        name=f"resharded {number}",
        layout=layout,
        layout_text=text,
        num_ranks=num_ranks,
        run="gpt",
        stop=stop,
        resumes_from=resumes_from,
        expected="close",
    )
