"""What is left of a run on every tier, for `ckpt recover`.

In: a URL. Out: what agents and store say, which steps can be had back best first, and in words what is missing when none can.
Asks; changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.agent.identity import memory_folder, run_id_of
from ckpt.agent.inventory import Candidate, candidates
from ckpt.agent.segments import leftovers
from ckpt.agent.survey import Asked, Survey, survey
from ckpt.cli import texts
from ckpt.commit import find
from ckpt.commit.names import manifest_key
from ckpt.commit.publish import attempt_of
from ckpt.config import Options
from ckpt.errors import CheckpointError, NotFoundError
from ckpt.store.open import open_store

STORED_SHOWN_MAX = 10  # newest steps of the store


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What the store has."""

    steps: tuple[tuple[int, str | None], ...]  # newest first, with the attempt where it is known
    num_steps: int
    is_run: bool
    error: str = ""  # why it could not be asked


@dataclass(frozen=True, kw_only=True)
class Standing:
    """All that is left of a run."""

    survey: Survey
    candidates: tuple[Candidate, ...]  # newest first
    stored: Stored
    leftovers: tuple[str, ...]  # segments of dead agents

    @property
    def newest(self) -> int | None:
        """The newest step of which anything is left."""
        return max((*(one.step for one in self.candidates), *(step for step, _ in self.stored.steps)), default=None)

    def recoverable(self, step: int | None) -> list[tuple[int, str, Candidate | None]]:
        """(step, tier, candidate) of what can be had back, best first: the newest, of one step memory before the store."""
        memory = [(one.step, "memory", one) for one in self.candidates if one.recoverable]
        store: list[tuple[int, str, Candidate | None]] = [(number, "store", None) for number, _ in self.stored.steps]
        found = sorted([*memory, *store], key=lambda one: (-one[0], one[1]))
        return [one for one in found if step is None or one[0] == step]


def look(url: str, options: Options, *, hold: bool = False) -> Standing:
    """Ask agents and store. Never raises because one of them does not answer.

    Args:
        hold: whether agents are kept from ending meanwhile.
    """
    run_id = run_id_of(url)
    surveyed = survey(run_id, options, hold=hold)
    left = [one for one in leftovers(memory_folder(options)) if one.header is not None and one.header.run_id == run_id]
    return Standing(
        survey=surveyed,
        candidates=tuple(candidates(surveyed.inventories)),
        stored=_stored(url, options),
        leftovers=tuple(one.path.name for one in left),
    )


def _stored(url: str, options: Options) -> Stored:
    try:
        store = open_store(url, options=options)
    except CheckpointError as error:
        return Stored(steps=(), num_steps=0, is_run=False, error=error.message)
    try:
        steps = find.steps(store)[::-1]
        shown: list[tuple[int, str | None]] = [
            (step, attempt_of(store.read(manifest_key(step)))) for step in steps[:STORED_SHOWN_MAX]
        ]
        shown += [(step, None) for step in steps[STORED_SHOWN_MAX:]]
        return Stored(steps=tuple(shown), num_steps=len(steps), is_run=bool(steps) or bool(find.step_folders(store)))
    except CheckpointError as error:
        return Stored(steps=(), num_steps=0, is_run=False, error=error.message)
    finally:
        store.close()


def nothing(standing: Standing, url: str, step: int | None) -> NotFoundError:
    """Nothing can be had back, with what is missing."""
    found, stored = standing.survey, standing.stored
    if not standing.candidates and not found.agents and not stored.is_run and not stored.error:
        return NotFoundError(
            f"no run at {url}: no agent of this host holds anything of it, and the store has no step folder",
            kind="no-run",
            hints=("ckpt agent status", "run it as the user and on a node of the job"),
        )
    what = f"step {step}" if step is not None else "nothing"
    lines = [f"{what} of {url} can be had back"] if step is None else [f"{what} of {url} cannot be had back"]
    for one in standing.candidates:
        if step in (None, one.step):
            ranks = texts.numbers(one.gone)
            lines.append(f"step {one.step} in memory: of ranks {ranks} of {one.world} too little is left")
    lines += [f"agent {label(one)} does not answer: {one.error}" for one in found.silent]
    lines.append(
        f"store: {stored.error}" if stored.error else f"store: {texts.plural(stored.num_steps, 'complete step')}"
    )
    lines += [f"`{name}` in shared memory was left by a dead agent" for name in standing.leftovers]
    hints = ["ckpt recover URL --approximate checkfree --layers PATTERN: if what is lost is one inner pipeline stage"]
    if standing.leftovers:
        hints.insert(0, "start that agent again: ckpt agent run URL --rank N --world M")
    return NotFoundError(
        "\n".join(lines), kind="not-recoverable", hints=tuple(hints if standing.candidates else hints[:-1])
    )


def label(one: Asked) -> str:
    """Where an agent is and whose, for sentences."""
    rank = f" of rank {one.rank}" if one.rank is not None else ""
    where = "of this host" if one.found is not None else f"at {one.address}"
    return f"{where}{rank}"
