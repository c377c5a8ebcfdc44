"""Write what agents hold in memory to a store, as a checkpoint: the second half of `ckpt recover`.

In: what is left of a run, what is wanted. Out: a published checkpoint; a record of what was done for the document. What turns out
to be damaged is passed over for the next best one.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ckpt.agent.inventory import Candidate
from ckpt.agent.restore import SnapshotStore, index_files, make_blobs
from ckpt.agent.survey import Survey
from ckpt.agent.transport.client import Peer
from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import opened_run
from ckpt.cli.printer import Printer
from ckpt.cli.standing import Standing
from ckpt.commit.publish import refuse_existing
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.reshard import Resharded, carry_out, plan_copy
from ckpt.errors import AlreadyExistsError, CheckpointError, DamagedError, InvalidInputError, NotFoundError, PeerError
from ckpt.store.base import Store
from ckpt.store.open import open_store


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user asked for."""

    step: int | None
    approximate: str | None
    layers: str
    num_layers: int | None
    weights_file: str | None
    equal_weights: bool
    memory_bytes: int | None


def write(
    printer: Printer, run: Address, target: Address, standing: Standing, wanted: Wanted, options: Options
) -> dict[str, Any]:
    """The best recoverable step into the run `target`."""
    if target.steps is not None:
        raise InvalidInputError(
            "the step stays what it was: name the run to write into without `@`", kind="bad-address"
        )
    passed_over: list[str] = []
    last: CheckpointError | None = None
    with opened_run(printer, target, role="target") as into:
        for step, tier, candidate in standing.recoverable(wanted.step):
            if candidate is None and target.url.rstrip("/") == run.url.rstrip("/"):
                raise AlreadyExistsError(f"step {step} is in {target.url} already: nothing is to be recovered")
            refuse_existing(into, step)
            try:
                done = _write_one(printer, run, into, step, candidate, standing.survey, wanted, options)
            except (DamagedError, PeerError, NotFoundError) as error:  # another tier or an older step may be whole
                last = error
                passed_over.append(f"step {step} in {tier}: {error.message}")
                printer.note(f"passed over: {passed_over[-1]}")
                continue
            return _told(printer, target, tier, done, candidate, passed_over)
    assert last is not None
    raise last


def _write_one(
    printer: Printer,
    run: Address,
    into: Store,
    step: int,
    candidate: Candidate | None,
    survey: Survey,
    wanted: Wanted,
    options: Options,
) -> Resharded:
    with ExitStack() as stack:
        if candidate is None:
            source: Store = open_store(run.url, options=options)
        else:
            source = snapshot(candidate, survey, options, stack)
        stack.callback(source.close)
        stored = StoredCheckpoint(source, step, options)
        plan = plan_copy(stored, options=options)
        with printer.progress(f"recover step {step}", plan.work_nbytes) as bar:
            return carry_out(plan, into, options=options, memory_bytes=wanted.memory_bytes, progress=bar.advance)


def peers_of(survey: Survey, options: Options, stack: ExitStack) -> Any:
    """A connection to the agent at an address, made when it is first used and closed with `stack`."""
    peers: dict[str, Peer] = {}

    def peer(address: str) -> Peer:
        if survey.credentials is None or address.startswith("here:"):
            raise PeerError(
                f"the agent {address} serves nobody: no trainer has come since it was started",
                kind="peer-unreachable",
                hints=("restart the job: Checkpointer.restore reads the memory of its own agents",),
            )
        if address not in peers:
            peers[address] = Peer(address, survey.credentials, options)
            stack.callback(peers[address].close)
        return peers[address]

    return peer


def snapshot(candidate: Candidate, survey: Survey, options: Options, stack: ExitStack) -> SnapshotStore:
    """A recoverable snapshot as a store."""
    blobs = make_blobs(candidate, run_id=survey.run_id.hex, peer=peers_of(survey, options, stack), options=options)
    stack.callback(blobs.close)
    return SnapshotStore(candidate, index_files(candidate, blobs), blobs, {})


def _told(
    printer: Printer,
    target: Address,
    tier: str,
    done: Resharded,
    candidate: Candidate | None,
    passed_over: list[str],
) -> dict[str, Any]:
    decoded = candidate.lost if candidate is not None else ()
    printer.text(
        f"step {done.step} is in {target.url}, from {'memory' if tier == 'memory' else 'the store'}: "
        f"{texts.plural(done.num_images, 'image')}, {texts.size(done.written_nbytes)} written, "
        f"{texts.duration(done.seconds)}" + (f"; ranks {texts.numbers(decoded)} decoded" if decoded else "")
    )
    return {
        "url": target.url,
        "step": done.step,
        "tier": tier,
        "attempt": done.attempt,
        "num_images": done.num_images,
        "read_bytes": done.read_nbytes,
        "written_bytes": done.written_nbytes,
        "decoded_ranks": list(decoded),
        "passed_over": passed_over,
        "seconds": round(done.seconds, 3),
    }
