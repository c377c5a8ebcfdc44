"""The sources of a merge, opened: which checkpoints and folders they are, what their tensors are called, how they are ordered.

In: the sources of a recipe. Out: `Source` records in canonical order (step, digest, URL; an anchor last), each with a reader.
Reads manifests, indexes and headers, no data. One owner closes all with `close`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from numpy import integer
from numpy.typing import NDArray

from ckpt.commit.find import step_folders, steps
from ckpt.config import MERGE_LISTED_MAX, MERGE_SOURCES_MAX, Options
from ckpt.convert.safetensors import SUFFIX, SafetensorsFolder, is_folder_of_safetensors
from ckpt.engine.read import ReadJob
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import InvalidInputError, NotFoundError
from ckpt.format.index import FragmentTable
from ckpt.format.spec import PieceTable, TensorSpec
from ckpt.merge.method import SourceInfo
from ckpt.merge.nodes import KIND
from ckpt.merge.recipe import SourceSpec, StepRange
from ckpt.merge.slots import Slots, slots_of
from ckpt.plan.read import ReadPlan
from ckpt.store.base import Store
from ckpt.store.open import open_store

OpenStore = Callable[[str], Store]


class Reader(Protocol):
    """What a source is read through: a stored checkpoint, or a folder of safetensors files."""

    store: Store

    @property
    def specs(self) -> list[TensorSpec]: ...

    def fragments(self, tensors: NDArray[integer[Any]] | None = None) -> FragmentTable: ...

    def plan(self, fragments: FragmentTable, pieces: PieceTable) -> ReadPlan: ...

    def job(self, fragments: FragmentTable, pieces: PieceTable, plan: ReadPlan) -> ReadJob: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One source."""

    url: str
    step: int | None
    attempt: str  # "" of a folder
    digest: str  # of the index of a checkpoint, of names, headers and samples of a folder
    metrics: Mapping[str, float]
    reader: Reader
    weight: float
    place: int
    key: str
    rename: tuple[tuple[str, str], ...]
    is_folder: bool = False
    anchor: bool = False

    @property
    def label(self) -> str:
        return self.url if self.is_folder else f"{self.url}@{self.step}"

    @property
    def sort_key(self) -> tuple[bool, int, str, str, int]:
        return (self.anchor, -1 if self.step is None else self.step, self.digest, self.url, self.place)

    def info(self, number: int) -> SourceInfo:
        """As a method sees it. `number`: of the sources of this step before it."""
        return SourceInfo(
            label=self.label,
            id=f"{self.step}:{number}",
            step=self.step,
            metrics=self.metrics,
            weight=self.weight,
            place=self.place,
        )

    @property
    def specs(self) -> list[TensorSpec]:
        return self.reader.specs

    @cached_property
    def names(self) -> dict[int, str]:
        """The name of each tensor, after renaming, by id."""
        out = {i: self._renamed(spec.name) for i, spec in enumerate(self.specs)}
        if len(set(out.values())) < len(out):
            seen: dict[str, int] = {}
            for i, name in out.items():
                if name in seen:
                    raise InvalidInputError(
                        f"rename rules give `{self.specs[seen[name]].name}` and `{self.specs[i].name}` of {self.label} one "
                        f"name: `{name}`",
                        kind=KIND,
                    )
                seen[name] = i
        return out

    @cached_property
    def ids(self) -> dict[str, int]:
        """Tensor id by name and alias; a name wins over an alias."""
        out: dict[str, int] = {}
        for i, spec in enumerate(self.specs):
            for alias in spec.aliases:
                out.setdefault(self._renamed(alias), i)
        out.update({name: i for i, name in self.names.items()})
        return out

    @cached_property
    def slots(self) -> Slots:
        return slots_of(self.specs, self.names)

    def aliases(self, i: int) -> tuple[str, ...]:
        """Other names of a tensor, after renaming."""
        return tuple(sorted({self._renamed(alias) for alias in self.specs[i].aliases} - {self.names[i]}))

    def record(self) -> dict[str, Any]:
        """Its identity, for lineage and for a resumed merge."""
        return {
            "url": self.url,
            "kind": "folder" if self.is_folder else "checkpoint",
            "step": self.step,
            "attempt": self.attempt or None,
            "index": self.digest,
            "weight": self.weight,
            "metrics": {name: value for name, value in self.metrics.items() if value == value},
        }

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.rename:
            if re.fullmatch(pattern, name):
                return re.sub(pattern, replacement, name, count=1)
        return name


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """All sources of a recipe, in canonical order, and its base."""

    sources: tuple[Source, ...]
    base: Source | None
    specs: tuple[SourceSpec, ...]  # the sources with their steps: each one checkpoint or folder, in the user's order
    base_spec: SourceSpec | None
    stores: list[Store] = field(default_factory=list)

    @property
    def newest(self) -> Source:
        """Where everything comes from that is not combined: the anchor, where one is named."""
        return self.sources[-1]

    def close(self) -> None:
        """Let go of all stores. May be called twice."""
        for store in self.stores:
            store.close()


def open_sources(
    sources: Sequence[SourceSpec], base: SourceSpec | None, options: Options, open_at: OpenStore | None = None
) -> Opened:
    """Open everything. NotFoundError where there is no run or checkpoint, InvalidInputError for a selection that is empty."""
    opener = _Opener(options, open_at or (lambda url: open_store(url, options=options)))
    try:
        resolved = [one for spec in sources for one in opener.resolve(spec)]
        if len(resolved) > MERGE_SOURCES_MAX:
            raise InvalidInputError(f"{len(resolved)} sources are too many: at most {MERGE_SOURCES_MAX}", kind=KIND)
        found = [opener.open(spec, place) for place, spec in enumerate(resolved)]
        anchors = [spec for spec in resolved if spec.anchor]
        if len(anchors) > 1:
            raise InvalidInputError(
                f"{anchors[1].at}: one checkpoint can be the anchor, found {len(anchors)}", kind=KIND
            )
        base_spec = None
        if base is not None:
            one = opener.resolve(base)
            if len(one) != 1:
                raise InvalidInputError(f"{base.at}: the base is one checkpoint, found {len(one)}", kind=KIND)
            base_spec = one[0]
        return Opened(
            sources=tuple(sorted(found, key=lambda source: source.sort_key)),
            base=None if base_spec is None else opener.open(base_spec, -1),
            specs=tuple(resolved),
            base_spec=base_spec,
            stores=list(opener.stores.values()),
        )
    except BaseException:
        for store in opener.stores.values():
            with contextlib.suppress(Exception):  # the first error is the one to tell
                store.close()
        raise


class _Opener:
    """Opens stores once each. Used once."""

    def __init__(self, options: Options, open_at: OpenStore) -> None:
        self._options, self._open_at = options, open_at
        self.stores: dict[str, Store] = {}
        self._readers: dict[tuple[str, int | None, str], Reader] = {}

    def resolve(self, spec: SourceSpec) -> list[SourceSpec]:
        """One record per checkpoint that an entry means, oldest first; a folder as it is."""
        folder, _ = _as_file(spec.url)
        store = self._store(folder)
        if spec.steps is None and not spec.is_range and self._is_folder(spec, store):
            return [spec]
        if isinstance(spec.steps, int):
            return [spec]  # opened, and missed, below
        complete = steps(store)
        if not complete and not step_folders(store):
            raise NotFoundError(
                f"no run at {store.url}: there is no step folder, and no safetensors file",
                kind="no-run",
                hints=("name the folder that holds the `step-...` folders, or one with a model",),
            )
        chosen = select(spec, complete)
        if len(chosen) < spec.count_min:
            raise InvalidInputError(
                f"{spec.at}: {len(chosen)} checkpoints of {spec.url} are selected, at least {spec.count_min} are wanted",
                kind="too-few",
            )
        return [
            dataclasses.replace(spec, steps=step, every=1, last=None, fraction=None, count_min=1) for step in chosen
        ]

    def _is_folder(self, spec: SourceSpec, store: Store) -> bool:
        folder, file = _as_file(spec.url)
        return file is not None or (not step_folders(store) and is_folder_of_safetensors(store))

    def open(self, spec: SourceSpec, place: int) -> Source:
        folder, file = _as_file(spec.url)
        store = self._store(folder)
        common: dict[str, Any] = {
            "url": spec.url,
            "weight": spec.weight,
            "place": place,
            "key": spec.key,
            "rename": spec.rename,
            "anchor": spec.anchor,
        }
        if spec.steps is None:
            which: tuple[str, int | None, str] = (spec.url, None, spec.key)
            if which not in self._readers:
                files = None if file is None else [file]
                self._readers[which] = SafetensorsFolder(store, self._options, files=files, key=spec.key)
            reader: Any = self._readers[which]
            return Source(
                **common, step=spec.step, attempt="", digest=reader.digest, metrics={}, reader=reader, is_folder=True
            )
        assert isinstance(spec.steps, int)
        which = (spec.url, spec.steps, "")
        if which not in self._readers:
            self._readers[which] = StoredCheckpoint(store, spec.steps, self._options)
        reader = self._readers[which]
        manifest = reader.manifest
        return Source(
            **common,
            step=manifest.step,
            attempt=manifest.attempt,
            digest=manifest.fragments.digest,
            metrics=manifest.metrics,
            reader=reader,
        )

    def _store(self, url: str) -> Store:
        if url not in self.stores:
            self.stores[url] = self._open_at(url)
        return self.stores[url]


def _as_file(url: str) -> tuple[str, str | None]:
    """The folder of a URL that names one safetensors file, and the file; a URL of anything else as it is."""
    if not url.endswith(SUFFIX):
        return url, None
    folder, _, file = url.rpartition("/")
    return folder or ".", file


def select(spec: SourceSpec, complete: Sequence[int]) -> list[int]:
    """The steps that an entry means, out of all complete ones, ascending. NotFoundError when it means none."""
    chosen = sorted(complete)
    if spec.steps == "latest" or (spec.steps is None and not spec.is_range):
        chosen = chosen[-1:]
    elif isinstance(spec.steps, StepRange):
        chosen = [step for step in chosen if step in spec.steps]
    elif isinstance(spec.steps, tuple):
        absent = sorted(set(spec.steps) - set(chosen))
        if absent:
            shown = ", ".join(map(str, absent[:MERGE_LISTED_MAX]))
            raise _none(spec, f"no complete checkpoint of step {shown}", complete)
        chosen = sorted(spec.steps)
    if chosen and spec.fraction is not None:
        chosen = [step for step in chosen if step >= (1 - spec.fraction) * chosen[-1]]
    chosen = list(reversed(chosen[::-1][:: spec.every]))
    chosen = chosen if spec.last is None else chosen[-spec.last :]
    if not chosen:
        raise _none(spec, f"no complete checkpoint that `{spec.steps}` means", complete)
    return chosen


def _none(spec: SourceSpec, what: str, complete: Sequence[int]) -> NotFoundError:
    shown = ", ".join(str(step) for step in sorted(complete)[-20:])
    return NotFoundError(
        f"{spec.at}: {what} in {spec.url}; {f'complete steps: {shown}' if shown else 'no step is complete'}",
        kind="no-checkpoint",
        hints=(f"ckpt ls {spec.url}",),
    )


def infos_of(sources: Sequence[Source]) -> Iterator[SourceInfo]:
    """What methods see of sources in canonical order. Their ids follow from steps alone: they are the same however a source is
    cut, and wherever it lies."""
    seen: dict[int | None, int] = {}
    for source in sources:
        yield source.info(seen.get(source.step, 0))
        seen[source.step] = seen.get(source.step, 0) + 1
