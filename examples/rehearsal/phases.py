"""What the demo runs, in which order, and what each phase must show.

In: the length of the run. Out: `Phase` records. Pure: starts nothing, reads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    return (
        _script(steps=24, layers=2, killed=12, stops=(12, 20))
        if quick
        else _script(steps=64, layers=6, killed=24, stops=(36, 52))
    )


def _script(*, steps: int, layers: int, killed: int, stops: tuple[int, int]) -> Script:
    assert all(step % SAVE_EVERY == 0 for step in (steps, killed, *stops))
    before = killed - SAVE_EVERY
    four = {"layout": "tp_fsdp", "layout_text": "TP 2 × FSDP2 2", "num_ranks": 4}
    return Script(
        steps=steps,
        layers=layers,
        phases=(
            Phase(name="undisturbed", run="undisturbed", stop=steps, resumes_from=0, expected="reference", **four),
            Phase(name="killed", run="gpt", stop=steps, resumes_from=0, expected="bit-equal", kill_at=killed, **four),
            Phase(
                name="same layout",
                run="gpt-same-layout",
                fork_of="gpt",
                stop=steps,
                resumes_from=before,
                expected="bit-equal",
                **four,
            ),
            Phase(
                name="resharded 1",
                layout="fsdp",
                layout_text="FSDP2",
                num_ranks=2,
                run="gpt",
                stop=stops[0],
                resumes_from=before,
                expected="close",
            ),
            Phase(
                name="resharded 2",
                layout="pp",
                layout_text="2 pipeline stages",
                num_ranks=2,
                run="gpt",
                stop=stops[1],
                resumes_from=stops[0],
                expected="close",
            ),
            Phase(
                name="resharded 3",
                layout="single",
                layout_text="one rank",
                num_ranks=1,
                run="gpt",
                stop=steps,
                resumes_from=stops[1],
                expected="close",
            ),
        ),
    )
