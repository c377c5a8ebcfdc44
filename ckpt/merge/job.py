"""One merge on its way, as it stands in the store: which tasks there are, which are done, and how it becomes a checkpoint.

In: a plan, the store of the result, an attempt. Out: records of tasks, and at the end a published checkpoint. The store is all
that workers share:

    step-N/<attempt>/merge/plan.json                    the recipe, and what the bytes depend on; written first
    step-N/<attempt>/merge/pass-1/00003-of-00128.sums   what a pass found in the fragments of an image
    step-N/<attempt>/00003-of-00128.safetensors         an image
    step-N/<attempt>/receipts/00003-of-00128.receipt    it is durable; as in any save
    step-N/<attempt>/<index>, step-N/manifest.json      when all images are: the checkpoint

A task that has a record is done for good, so a merge that was killed goes on where it was; `ckpt gc` removes one that never does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

import ckpt.commit.publish as publishing
import ckpt.commit.receipts as receipts_of
from ckpt import failpoints
from ckpt.commit import names
from ckpt.commit.assemble import Assembler
from ckpt.commit.complete import PROGRAM
from ckpt.commit.find import contents, step_folders
from ckpt.commit.receipts import read_record
from ckpt.config import Options
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import (
    AlreadyExistsError,
    CheckpointError,
    DamagedError,
    InvalidInputError,
    MismatchError,
    NotFoundError,
)
from ckpt.format import manifest, receipt
from ckpt.merge import records
from ckpt.merge.lineage import lineage_of
from ckpt.merge.plan import MergePlan
from ckpt.merge.spans import Limits, needs_pass
from ckpt.store.base import Store

VERSION = 1
_PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Tasks that can be done side by side, once those of the stage before are. One task per image."""

    number: int  # of the pass, from 0; -1: the images themselves
    tasks: tuple[int, ...]


class Job:
    """A merge in the store. Any process may have one of the same attempt; one of them publishes."""

    def __init__(self, plan: MergePlan, into: Store, attempt: str, limits: Limits, options: Options) -> None:
        self.plan, self.into, self.attempt, self.limits, self.options = plan, into, attempt, limits, options
        self.metadata: Mapping[str, Any] = {}  # of the checkpoint, beside its lineage or in its place

    @property
    def step(self) -> int:
        return self.plan.step

    @property
    def num_images(self) -> int:
        return len(self.plan.images)

    def image_file(self, number: int) -> str:
        return names.image_name(number, self.num_images)

    def image_key(self, number: int) -> str:
        return f"{names.attempt_folder(self.step, self.attempt)}/{self.image_file(number)}"

    # what there is to do

    def stages(self) -> list[Stage]:
        """In order; the images come last."""
        passes = max((bound.num_passes for bound in self.plan.bounds), default=0)
        found = [Stage(number=number, tasks=self._images_in(number)) for number in range(passes)]
        return [stage for stage in found if stage.tasks] + [Stage(number=-1, tasks=tuple(range(self.num_images)))]

    def _images_in(self, number: int) -> tuple[int, ...]:
        """Images with a tensor that pass `number` reads."""
        return tuple(
            image.number
            for image in self.plan.images
            if any(needs_pass(self.plan, self.plan.tensors[t], number, self.limits) for t in image.tensors)
        )

    def left(self, stage: Stage) -> list[int]:
        """Tasks of a stage that have no record yet."""
        done = self._recorded(stage)
        return [task for task in stage.tasks if task not in done]

    def _recorded(self, stage: Stage) -> set[int]:
        prefix, suffix = self._records(stage.number)
        found = (names.parse_ranked(entry.key.removeprefix(prefix), suffix) for entry in self.into.list(prefix))
        return {one[0] for one in found if one is not None and one[1] == self.num_images}

    def _records(self, number: int) -> tuple[str, str]:
        """Prefix and suffix of the records of a stage."""
        if number < 0:
            return names.receipts_prefix(self.step, self.attempt), "receipt"
        return f"{names.merge_prefix(self.step, self.attempt)}pass-{number + 1}/", "sums"

    # records

    def leave_summaries(self, number: int, image: int, found: Mapping[tuple[int, str], Any]) -> None:
        """The record of one task of a pass."""
        prefix, suffix = self._records(number)
        failpoints.hit("merge.before-record")
        self.into.put(prefix + names.ranked_name(image, self.num_images, suffix), records.pack(found))

    def summaries(self, number: int) -> records.Summaries:
        """What pass `number` found, folded over all images in their order. All its tasks are done."""
        prefix, suffix = self._records(number)
        out: records.Summaries = {}
        for image in self._images_in(number):
            key = prefix + names.ranked_name(image, self.num_images, suffix)
            for place, summary in records.unpack(self.into.read(key), name=key).items():
                if place in out:
                    out[place].fold(summary)
                else:
                    out[place] = summary
        return out

    def leave_receipt(self, image: int, made: receipt.Receipt) -> None:
        """The record of one image that is durable."""
        receipts_of.leave_receipt(self.into, self.step, self.attempt, image, self.num_images, receipt.pack(made))

    def drop_half_image(self, image: int) -> None:
        """Remove what a worker left that was killed in the middle of an image."""
        self.into.delete([self.image_key(image)])

    # begin and end

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """Leave the plan's record, before anything else of the attempt."""
        document = {
            "version": VERSION,
            "program": PROGRAM,
            "recipe": recipe,
            "digest": self.plan.digest,
            "num_images": self.num_images,
            "limits": dataclasses.asdict(self.limits),
            "image_bytes": self.plan.image_bytes,
            "owner": owner(),
        }
        self.into.put(plan_key(self.step, self.attempt), json.dumps(document, indent=1).encode())

    def check(self, found: Unfinished) -> None:
        """That this process makes the bytes that the one meant that began. MismatchError (`changed`) when not."""
        if self.plan.digest != found.digest or self.step != found.step:
            raise MismatchError(
                f"the merge into step {found.step} of {self.into.url} cannot be gone on with: its sources or the program have "
                "changed since it was begun",
                kind="changed",
                hints=("begin it anew; `ckpt gc` removes what this one left",),
            )

    def publish(self) -> None:
        """Index and manifest, when every image is durable. One process, once."""
        step, attempt = self.step, self.attempt
        payloads = receipts_of.collect_receipts(
            self.into, step, attempt, self.num_images, timeout_s=self.options.commit_timeout_s, options=self.options
        )
        found = [receipt.unpack(payloads[number], name=f"image {number}") for number in range(self.num_images)]
        newest = self.plan.opened.newest.reader
        stored = newest.manifest if isinstance(newest, StoredCheckpoint) else None
        assembled = Assembler(PROGRAM).assemble(
            found,
            metadata={"merge": lineage_of(self.plan), **self.metadata},
            metrics={},
            layout=None if stored is None else stored.layout,
        )
        record = dataclasses.replace(
            assembled.manifest,
            world=self.plan.world,
            rank_layouts=[""] * self.plan.world if stored is None else stored.layouts_by_rank,
            layout=None if stored is None else stored.layout,
            structure_changed=False,
        )
        for name, data in assembled.files.items():
            failpoints.hit("merge.before-index")
            self.into.put(f"{names.attempt_folder(step, attempt)}/{name}", data)
        publishing.publish(self.into, step, attempt, manifest.pack(record), options=self.options)
        self.drop_records()

    def drop_records(self) -> None:
        """What workers told each other is only clutter now; gc removes what cannot be removed."""
        prefixes = (names.merge_prefix(self.step, self.attempt), names.receipts_prefix(self.step, self.attempt))
        try:
            for prefix in prefixes:
                self.into.delete([entry.key for entry in self.into.list(prefix)])
        except CheckpointError:
            return

    def abandon(self, error: BaseException) -> None:
        """Remove everything of the attempt, after a failure that trying again does not mend."""
        folder = names.attempt_folder(self.step, self.attempt)
        try:
            publishing.abort(self.into, self.step, self.attempt, f"it could not be merged: {error}")
            keys = [entry.key for entry in self.into.list(folder + "/")]
            mark = names.aborted_key(self.step, self.attempt)
            self.into.delete([key for key in keys if key != mark])
            self.into.delete([mark])
        except CheckpointError as problem:
            error.add_note(f"what was written could not be removed (`ckpt gc` does): {problem.message}")


def plan_key(step: int, attempt: str) -> str:
    """Key of the record with which a merge begins."""
    return names.merge_prefix(step, attempt) + _PLAN


def owner() -> dict[str, Any]:
    """This process, as another one of this host recognises it."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A merge that was begun and not published."""

    step: int
    attempt: str
    recipe: dict[str, Any]
    digest: str
    limits: Limits
    image_bytes: int
    owner: Mapping[str, Any]


def find_unfinished(store: Store, step: int | None) -> Unfinished:
    """The merge to go on with: the one that was last written to, of this step where one is named.

    NotFoundError (`nothing-to-resume`) when there is none; AlreadyExistsError (`held`) when its process is alive.
    """
    steps: Sequence[int] = step_folders(store) if step is None else [step]
    found = [
        attempt
        for one in steps
        for attempt in contents(store, one).attempts
        if attempt.state == "unpublished" and plan_key(attempt.step, attempt.attempt) in attempt.keys
    ]
    if not found:
        where = f"step {step} of {store.url}" if step is not None else store.url
        raise NotFoundError(
            f"no merge into {where} is to be gone on with: none was begun, or all are complete",
            kind="nothing-to-resume",
        )
    newest = max(found, key=lambda attempt: (attempt.modified_s, attempt.step, attempt.attempt))
    unfinished = read_unfinished(store, newest.step, newest.attempt)
    if _is_alive(unfinished.owner):
        raise AlreadyExistsError(
            f"the merge into step {newest.step} of {store.url} is still running, as process {unfinished.owner['pid']}",
            kind="held",
        )
    return unfinished


def read_unfinished(store: Store, step: int, attempt: str) -> Unfinished:
    """The record of a merge on its way."""
    store_key = plan_key(step, attempt)
    record = read_record(store.read(store_key))
    if record.get("version") != VERSION:
        raise InvalidInputError(
            f"`{store_key}` is of version {record.get('version')}, expected {VERSION}: another program began this merge"
        )
    recipe, limits, who = (_mapping(record, key, name=store_key) for key in ("recipe", "limits", "owner"))
    image_bytes = record.get("image_bytes")
    if not isinstance(image_bytes, int):
        raise DamagedError(f"`{store_key}` is damaged")
    return Unfinished(
        step=step,
        attempt=attempt,
        recipe=recipe,
        digest=str(record.get("digest")),
        limits=Limits(**limits),
        image_bytes=image_bytes,
        owner=who,
    )


def _mapping(record: Mapping[str, Any], key: str, *, name: str) -> dict[str, Any]:
    value = record.get(key)
    if not isinstance(value, dict):
        raise DamagedError(f"`{name}` is damaged: it has no `{key}`")
    return value


def _is_alive(who: Mapping[str, Any]) -> bool:
    """Whether the process that began a merge runs on this host. Of other hosts nothing is known."""
    if who.get("host") != socket.gethostname() or who.get("pid") == os.getpid():
        return False
    try:
        return bool(psutil.Process(int(who["pid"])).create_time() == who.get("started"))
    except (psutil.Error, ValueError, TypeError, KeyError):
        return False
