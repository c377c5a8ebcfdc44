"""`ckpt recover --approximate`: the newest snapshot of which all but inner pipeline stages is left, with those made up.

In: what is left of a run, what the user said of layers and weights. Out: a published checkpoint that says in its metadata what
was made up; loud notes. Never does so unasked, and never where the true state can be had back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt.agent import blob
from ckpt.agent.decode import Blobs
from ckpt.agent.inventory import Candidate
from ckpt.agent.restore import SnapshotStore, make_blobs
from ckpt.cli import texts
from ckpt.cli.address import Address
from ckpt.cli.command import opened_run
from ckpt.cli.printer import Printer
from ckpt.cli.recover_to import Wanted, peers_of
from ckpt.cli.standing import Standing, nothing
from ckpt.commit import names
from ckpt.commit.assemble import Assembler
from ckpt.commit.complete import PROGRAM, Request
from ckpt.commit.publish import refuse_existing
from ckpt.config import Options
from ckpt.engine import approximate as checkfree
from ckpt.engine.approximate import METRIC, Approximation, LayerNames
from ckpt.engine.reader import StoredCheckpoint
from ckpt.engine.reshard import carry_out, plan_copy
from ckpt.engine.substitute import make, only, substitutes, whole_tensors
from ckpt.engine.view import Checkpoint
from ckpt.errors import CheckpointError, InvalidInputError, NotFoundError
from ckpt.format import manifest, receipt
from ckpt.format.receipt import Receipt
from ckpt.format.spec import TensorSpec
from ckpt.store.open import open_store


@dataclass(frozen=True, kw_only=True)
class Remains:
    """What is left of one snapshot."""

    candidate: Candidate
    receipts: dict[int, Receipt]  # of the ranks that are left
    request: Request
    blobs: Blobs


@dataclass(frozen=True, kw_only=True)
class Older:
    """What an older checkpoint of the store says of the tensors of the run."""

    step: int
    specs: Sequence[TensorSpec]
    layout: dict[str, Any] | None


def approximate(
    printer: Printer, run: Address, target: Address | None, standing: Standing, wanted: Wanted, options: Options
) -> dict[str, Any]:
    """Make up what the newest snapshot lacks, and write it to `target`; without one, say what would be done."""
    chosen = _chosen(run, standing, wanted)
    layers = LayerNames(wanted.layers)
    with ExitStack() as stack:
        remains = _remains(chosen, standing, options, stack)
        older = _older(run, options)
        plan, dropped = _plan(remains, layers, older, wanted, _norms(wanted, remains.request))
        record = plan.record() | {"step": chosen.step, "lost_ranks": list(chosen.gone)}
        _warn(printer, plan, chosen, older)
        if target is None:
            printer.text("nothing was written: name a run to write to with --to")
            return record | {"url": None, "attempt": None, "notes": []}
        with opened_run(printer, target, role="target") as into:
            refuse_existing(into, chosen.step)
            whole, notes = _substituted(remains, plan, layers, dropped, older, record, options)
            stack.callback(whole.close)
            for note in notes:
                printer.note(note)
            copy = plan_copy(StoredCheckpoint(whole, chosen.step, options), options=options)
            with printer.progress(f"recover step {chosen.step}", copy.work_nbytes) as bar:
                done = carry_out(copy, into, options=options, memory_bytes=wanted.memory_bytes, progress=bar.advance)
    printer.text(
        f"step {done.step} is in {target.url}, APPROXIMATE: {texts.size(done.written_nbytes)} written, "
        f"{texts.duration(done.seconds)}"
    )
    return record | {"url": target.url, "attempt": done.attempt, "notes": notes}


def _chosen(run: Address, standing: Standing, wanted: Wanted) -> Candidate:
    """The newest snapshot that needs this. InvalidInputError where the true state can be had back."""
    exact = standing.recoverable(wanted.step)
    broken = [one for one in standing.candidates if not one.recoverable and wanted.step in (None, one.step)]
    if exact and (not broken or exact[0][0] >= broken[0].step):
        raise InvalidInputError(
            f"step {exact[0][0]} can be had back exactly, from {exact[0][1]}: nothing is to be approximated",
            kind="nothing-lost",
            hints=(f"ckpt recover {run.url} --to URL",),
        )
    if not broken:
        raise nothing(standing, run.url, wanted.step)
    return broken[0]


def _remains(candidate: Candidate, standing: Standing, options: Options, stack: ExitStack) -> Remains:
    survey = standing.survey
    blobs = make_blobs(candidate, run_id=survey.run_id.hex, peer=peers_of(survey, options, stack), options=options)
    stack.callback(blobs.close)
    receipts, request = {}, None
    for group in candidate.groups:
        for card in group.cards:
            if card.rank in candidate.gone:
                continue
            rest = bytearray(card.blob_bytes - card.image_bytes)
            blobs.read_into(card.rank, card.image_bytes, memoryview(rest))
            payload, asked = blob.unpack_rest(bytes(rest), what=f"rank {card.rank}, step {candidate.step}")
            receipts[card.rank] = receipt.unpack(payload, name=f"rank {card.rank}")
            request = request or asked
    if request is None:
        raise NotFoundError(f"of step {candidate.step} no rank is left", kind="not-recoverable")
    return Remains(candidate=candidate, receipts=dict(sorted(receipts.items())), request=request, blobs=blobs)


def _older(run: Address, options: Options) -> Older | None:
    """The index of the newest checkpoint on the store: it knows the names of what is lost. None: there is none to read."""
    try:
        store = open_store(run.url, options=options)
    except CheckpointError:
        return None
    try:
        stored = StoredCheckpoint(store, "latest", options)
        return Older(step=stored.step, specs=stored.specs, layout=stored.manifest.layout)
    except CheckpointError:
        return None
    finally:
        store.close()


def _norms(wanted: Wanted, request: Request) -> Mapping[int, float] | None:
    """Layer -> gradient norm; None: all count the same, as the user said."""
    if wanted.equal_weights:
        return None
    if wanted.weights_file is None:
        prefix = METRIC.format("")
        found = {key.removeprefix(prefix): value for key, value in request.metrics.items() if key.startswith(prefix)}
        return {int(layer): float(norm) for layer, norm in found.items() if layer.isdecimal()}
    try:
        document = json.loads(Path(wanted.weights_file).read_text(encoding="utf-8"))
        return {int(layer): float(norm) for layer, norm in document.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"`{wanted.weights_file}` does not say gradient norms: {error}",
            kind="bad-weights",
            hints=('it is a JSON object of layer number to norm, as {"3": 0.71, "5": 0.64}',),
        ) from None


def _plan(
    remains: Remains, layers: LayerNames, older: Older | None, wanted: Wanted, norms: Mapping[int, float] | None
) -> tuple[Approximation, frozenset[str]]:
    """What to make up, and the names of tensors that are left in parts only, or whole and made anew with their layer."""
    left, whole = whole_tensors(list(remains.receipts.values()))
    known = {spec.name: spec for spec in (*(older.specs if older is not None else ()), *left)}
    numbers = [place[0] for name in known if (place := layers.place(name)) is not None]
    if not numbers:
        raise InvalidInputError(f"no tensor matches the pattern `{wanted.layers}`", kind="bad-pattern")
    if wanted.num_layers is None and older is None:
        raise InvalidInputError(
            "how many layers the model has is not known: the run has no checkpoint on a store that tells it",
            kind="num-layers",
            hints=("give it with --num-layers N",),
        )
    plan = checkfree.plan_checkfree(
        [known[name] for name in sorted(known)],
        whole,
        names=layers,
        num_layers=wanted.num_layers if wanted.num_layers is not None else max(numbers) + 1,
        stage_of=_stages(remains, layers),
        norms=norms,
    )
    made = {one.spec.name for one in plan.tensors}
    return plan, frozenset(spec.name for spec in left if spec.name not in whole or spec.name in made)


def _stages(remains: Remains, layers: LayerNames) -> dict[int, frozenset[int]]:
    """Layer -> the layers that some rank knows together with it."""
    out: dict[int, frozenset[int]] = {}
    for one in remains.receipts.values():
        assert one.image is not None
        held = frozenset(place[0] for spec in one.image.specs if (place := layers.place(spec.name)) is not None)
        for layer in held:
            out[layer] = out.get(layer, frozenset()) | held
    return out


def _substituted(
    remains: Remains,
    plan: Approximation,
    layers: LayerNames,
    dropped: frozenset[str],
    older: Older | None,
    record: dict[str, Any],
    options: Options,
) -> tuple[SnapshotStore, list[str]]:
    """The snapshot as a store, whole; and notes on its objects."""
    lost = remains.candidate.gone
    kept = {rank: only(one, lambda name: name not in dropped) for rank, one in remains.receipts.items()}
    like = next(iter(remains.receipts.values()))
    nothing_made = {rank: make(like, rank, [], _no_value, []).receipt for rank in lost}
    part = _as_store(remains, {**kept, **nothing_made}, {}, remains.request.metadata, older)
    stored = StoredCheckpoint(part, remains.candidate.step, options)
    rows: dict[str, list[Any]] = {}
    for row in stored.objects:
        rows.setdefault(row.name, []).append((row, stored.read_object(row)))
    objects, notes = substitutes(lost, rows, plan.stages, layers)
    view, by_name = Checkpoint(stored), {one.spec.name: one for one in plan.tensors}

    def read(name: str) -> torch.Tensor:
        return view[name][...]

    specs = [one.spec for one in plan.tensors]
    images = {
        rank: make(
            like,
            rank,
            specs if rank == lost[0] else [],
            lambda spec: checkfree.values(by_name[spec.name], read),
            objects[rank],
        )
        for rank in lost
    }
    folder = names.attempt_folder(remains.candidate.step, remains.candidate.attempt)
    files = {f"{folder}/{one.receipt.file}": one.image.data for one in images.values()}
    receipts = {**kept, **{rank: one.receipt for rank, one in images.items()}}
    metadata = {**remains.request.metadata, "approximate": {**record, "notes": notes}}
    return _as_store(remains, receipts, files, metadata, older), notes


def _no_value(spec: TensorSpec) -> Any:
    raise AssertionError(spec)


def _as_store(
    remains: Remains,
    receipts: Mapping[int, Receipt],
    images: Mapping[str, memoryview],
    metadata: dict[str, Any],
    older: Older | None,
) -> SnapshotStore:
    request, candidate = remains.request, remains.candidate
    assembled = Assembler(PROGRAM).assemble(
        [receipts[rank] for rank in range(candidate.world)],
        metadata=metadata,
        metrics=request.metrics,
        layout=request.layout or (older.layout if older is not None else None),
    )
    folder = names.attempt_folder(candidate.step, candidate.attempt)
    files: dict[str, Any] = {f"{folder}/{name}": data for name, data in assembled.files.items()}
    files[names.manifest_key(candidate.step)] = manifest.pack(assembled.manifest)
    return SnapshotStore(candidate, {**files, **images}, remains.blobs, {})


def _warn(printer: Printer, plan: Approximation, candidate: Candidate, older: Older | None) -> None:
    say: Callable[[str], None] = printer.text
    say("")
    say(f"APPROXIMATION of step {candidate.step}: this is not the state that was saved")
    for stage in plan.stages:
        say(
            f"  layers {texts.numbers(stage.layers)} are lost; they become {stage.share:.3f} of layers "
            f"{texts.numbers(stage.below)} and {1 - stage.share:.3f} of layers {texts.numbers(stage.above)}"
        )
    say(f"  {texts.plural(len(plan.tensors), 'tensor')}; optimizer state of these layers: zeros, step count 0")
    if plan.equal:
        say("  NO GRADIENT NORMS: both neighbours count the same, which is not the method but the plain average")
    if older is None:
        say("  no stored checkpoint to compare names with: what the lost ranks alone held beside layers is not known")
