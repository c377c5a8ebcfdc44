"""Compare the phases with the undisturbed run: a verdict each, a table, a picture, a JSON file.

In: outcomes. Out: verdicts, and files in the demo's folder. Never runs anything.

Why a tolerance, and why this one: on an unchanged layout every sum is taken in the same order, so losses must be equal
in every bit. Another layout adds the same fp32 numbers in another order (over 1, 2 or 4 ranks, over micro-batches, over
halves of a matrix product); each sum then differs in its last bits, about 1e-7 of its size, and training amplifies that
from step to step. Four runs of 80 steps, one per layout, never interrupted, differ from each other by at most 2e-4 at
losses of 2 to 6; the bound is five times that. What a wrong resume does lies above it (examples/README.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from examples.rehearsal.launch import Outcome
from examples.rehearsal.phases import KILLED_RANK

LOSS_TOLERANCE = 1e-3  # nats per token
ZERO_SHOWN_AT = 1e-8  # on the logarithmic axis
TABLE_WIDTH_MIN = 128
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#e69f00")  # told apart by colour-blind eyes too


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One phase against the undisturbed run."""

    outcome: Outcome
    differences: dict[int, float]  # by step: |loss - undisturbed loss|
    bound: float  # largest difference allowed

    @property
    def worst(self) -> float:
        return max(self.differences.values(), default=0.0)

    @property
    def holds(self) -> bool:
        return self.worst <= self.bound

    @property
    def bound_text(self) -> str:
        """In words: what was promised of this phase."""
        if self.outcome.phase.expected == "reference":
            return "it is the measure"
        return "bit-equal" if self.bound == 0 else f"at most {self.bound:.0e}"

    @property
    def course(self) -> str:
        """In words: what happened."""
        phase = self.outcome.phase
        if phase.kill_at is not None:
            return f"rank {KILLED_RANK} killed (SIGKILL) in the save of step {phase.kill_at}"
        return f"resumed from step {phase.resumes_from}" if phase.resumes_from else "never interrupted"


def judge(outcomes: Sequence[Outcome]) -> list[Verdict]:
    """Each phase against the first, which is the undisturbed one."""
    reference = outcomes[0].losses
    return [
        Verdict(
            outcome=outcome,
            differences={step: abs(loss - reference[step]) for step, loss in outcome.losses.items()},
            bound=LOSS_TOLERANCE if outcome.phase.expected == "close" else 0.0,
        )
        for outcome in outcomes
    ]


def print_table(verdicts: Sequence[Verdict]) -> None:
    """On stdout."""
    table = Table(
        title="Saved on one layout, resumed on others: largest difference of a loss from the undisturbed run's",
        title_justify="left",
    )
    for heading in ("phase", "layout", "ranks", "steps", "what happened", "seconds", "difference", "promised"):
        table.add_column(
            heading,
            justify="right" if heading in ("ranks", "seconds", "difference") else "left",
            no_wrap=heading not in ("what happened", "promised"),
        )
    for verdict in verdicts:
        outcome, phase = verdict.outcome, verdict.outcome.phase
        table.add_row(
            phase.name,
            phase.layout_text,
            str(phase.num_ranks),
            f"{min(outcome.losses)} to {max(outcome.losses)}",
            verdict.course,
            f"{outcome.seconds:.0f}",
            "0" if verdict.worst == 0 else f"{verdict.worst:.1e}",
            verdict.bound_text + ("" if verdict.holds else ": VIOLATED"),
        )
    console = Console()
    # Narrower, the cells would be cut; a terminal wraps the lines instead.
    console.width = max(console.width if console.is_terminal else 0, TABLE_WIDTH_MIN)
    console.print(table)


def write_json(verdicts: Sequence[Verdict], file: Path) -> None:
    """The table and all losses, for programs."""
    rows = [
        {
            "phase": verdict.outcome.phase.name,
            "layout": verdict.outcome.phase.layout,
            "ranks": verdict.outcome.phase.num_ranks,
            "resumed_from": verdict.outcome.phase.resumes_from,
            "killed_in_save_of": verdict.outcome.phase.kill_at,
            "newest_checkpoint": verdict.outcome.newest_checkpoint,
            "seconds": round(verdict.outcome.seconds, 2),
            "max_loss_difference": verdict.worst,
            "bound": verdict.bound,
            "holds": verdict.holds,
            "losses": verdict.outcome.losses,
        }
        for verdict in verdicts
    ]
    file.write_text(json.dumps({"tolerance": LOSS_TOLERANCE, "phases": rows}, indent=1) + "\n")


def draw(verdicts: Sequence[Verdict], file: Path) -> None:
    """Losses above, differences below, one colour per phase."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(11, 7), sharex=True, height_ratios=(3, 1.4), layout="constrained"
    )
    reference = verdicts[0].outcome.losses
    above.plot(
        list(reference),
        list(reference.values()),
        color="0.75",
        linewidth=6,
        label="undisturbed: TP 2 × FSDP2 2, 4 ranks",
    )
    for verdict, colour in zip(verdicts[1:], COLOURS, strict=False):
        outcome, phase = verdict.outcome, verdict.outcome.phase
        steps = list(outcome.losses)
        # Without the interrupted run's own line, the same-layout one would hide what the resharded ones do.
        style = {"linestyle": ":", "linewidth": 1.2} if phase.fork_of else {"marker": "o", "markersize": 3.5}
        above.plot(
            steps,
            list(outcome.losses.values()),
            color=colour,
            label=f"{phase.name}: {phase.layout_text}, {verdict.course}",
            **style,
        )
        below.plot(
            steps,
            [max(difference, ZERO_SHOWN_AT) for difference in verdict.differences.values()],
            color=colour,
            **style,
        )
        if phase.kill_at is not None:
            for axes in (above, below):
                axes.axvspan(outcome.newest_checkpoint + 0.5, max(steps) + 0.5, color="0.93", zorder=0)
            above.annotate(
                "SIGKILL in a save:\nthese steps are lost\nand done again",
                (outcome.newest_checkpoint + 0.5, above.get_ylim()[1]),
                xytext=(4, -4),
                textcoords="offset points",
                va="top",
                fontsize=8,
            )
    below.axhline(LOSS_TOLERANCE, color="0.3", linestyle="--", linewidth=1)
    below.text(1, LOSS_TOLERANCE * 1.3, f"tolerance where the layout changed: {LOSS_TOLERANCE:.0e}", fontsize=8)
    below.set_yscale("log")
    below.set_ylim(ZERO_SHOWN_AT / 2, LOSS_TOLERANCE * 20)
    below.set_ylabel(f"|difference|\n(0 shown as {ZERO_SHOWN_AT:.0e})")
    below.set_xlabel("step")
    above.set_ylabel("loss, nats per token")
    above.legend(fontsize=8)
    figure.suptitle("One training run, killed once and resharded three times, over an undisturbed one")
    figure.savefig(file, dpi=120)
    plt.close(figure)
