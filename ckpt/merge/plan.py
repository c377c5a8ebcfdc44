"""The plan of a merge: everything that will be read, computed and written, decided before a byte of a tensor is read.

In: opened sources and a recipe. Out: `MergePlan`. Reads indexes only, and changes nothing. Every process that makes the plan
of one recipe makes the same one: `digest` says so.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ckpt.config import MERGE_FRAGMENT_ELEMENTS, MERGE_SLOT_BYTES_MAX, MERGE_TILE_ELEMENTS
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import InvalidInputError
from ckpt.format.checksum import choose_block_bytes
from ckpt.format.spec import TensorSpec
from ckpt.kernels.merge import is_float
from ckpt.merge import parameters, registry
from ckpt.merge.catalog import Catalog, Entry, factors_among, match
from ckpt.merge.images import ImagePlan, plan_images
from ckpt.merge.method import Coefficients, Context, Elementwise, Linear, Method, Needs, SourceTensor, Unit
from ckpt.merge.objects import ResultObject, objects_of
from ckpt.merge.outputs import UNMERGE, output_name, refuse_taken
from ckpt.merge.policy import MASTER_COPY
from ckpt.merge.recipe import Combine, Recipe
from ckpt.merge.slots import COUNTERS, ROLE, SECOND_MOMENTS
from ckpt.merge.sources import Opened, Source, infos_of
from ckpt.merge.tiles import layer_of

Kind = Literal["linear", "element", "copy", "same", "pool", "reset"]


@dataclass(frozen=True, kw_only=True)
class Feed:
    """One tensor that is read for one tensor of the result."""

    role: str  # "x": of a source; "base"; "mean": beside a variance; "slot:<name>"
    source: int  # number of the source; -1: the base
    tensor: int  # id there
    spec: TensorSpec  # there
    whole: bool = False  # read whole, whatever part of the result is made: it has another shape
    slot: str = ""  # which one, of a slot


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A method with its parameters and the sources it works on."""

    method: Method
    context: Context
    combine: Combine

    @property
    def needs(self) -> Needs:
        return self.method.needs

    @property
    def num_passes(self) -> int:
        return self.needs.passes


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """How one tensor of the result is made."""

    number: int
    spec: TensorSpec
    entry: Entry
    kind: Kind
    feeds: tuple[Feed, ...]  # sources in canonical order first
    subject: str = ""  # the name that a method sees: of a master copy that of its parameter
    is_echo: bool = (
        False  # made of the same elements as another tensor, which statistics count once: a master copy that is kept
    )
    output: int = 0  # which of the tensors that a method makes of one: see ckpt.merge.outputs
    bound: int = -1  # number of the method, of kinds linear and element
    coefficients: Coefficients | None = None  # of kinds linear and pool
    hyperparameters: tuple[Mapping[str, float], ...] = ()  # of each source, where the method needs them

    @property
    def read_nbytes(self) -> int:
        return sum(feed.spec.nbytes for feed in self.feeds)

    @property
    def feed_itemsize(self) -> int:
        """Bytes that one element of the result takes of all feeds together (those that are read whole apart)."""
        return sum(feed.spec.itemsize for feed in self.feeds if not feed.whole)

    def with_role(self, role: str) -> list[Feed]:
        return [feed for feed in self.feeds if feed.role == role]


@dataclass(frozen=True, kw_only=True, eq=False)
class MergePlan:
    """A merge, decided."""

    opened: Opened
    recipe: Recipe
    catalog: Catalog
    bounds: tuple[Bound, ...]
    tensors: tuple[TensorPlan, ...]  # by name
    images: tuple[ImagePlan, ...]
    objects: tuple[ResultObject, ...]
    step: int
    world: int
    block_bytes: int
    image_bytes: int
    notes: tuple[str, ...] = field(default=())  # what a user should know

    @property
    def written_nbytes(self) -> int:
        return sum(plan.spec.nbytes for plan in self.tensors)

    @property
    def num_passes(self) -> int:
        """Over the data, the last one included, where no tensor is kept in memory in between."""
        return 1 + max((bound.num_passes for bound in self.bounds), default=0)

    @cached_property
    def digest(self) -> str:
        """Of everything that the bytes of the result depend on."""
        text = json.dumps(
            {
                "sources": [source.record() for source in self.opened.sources],
                "base": None if self.opened.base is None else self.opened.base.record(),
                "cut": [MERGE_TILE_ELEMENTS, MERGE_FRAGMENT_ELEMENTS, self.block_bytes],
                "step": self.step,
                "seed": self.recipe.seed,
                "tensors": [_digested(plan, self.bounds) for plan in self.tensors],
                "images": [[image.number, len(image.rows)] for image in self.images],
                "objects": [[o.row.name, o.row.rank, o.row.digest] for o in self.objects],
            },
            sort_keys=True,
            separators=(",", ":"),
        )
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def unit_of(self, plan: TensorPlan, number: int) -> str:
        """What the statistics of pass `number` are summed over: the tensor's name, its layer, or "" for the model."""
        scope = self.bounds[plan.bound].needs.scope_of(number)
        return plan.subject if scope == "tensor" else layer_of(plan.subject) if scope == "layer" else ""

    def source(self, number: int) -> Source:
        """A source by its number in feeds."""
        if number < 0:
            assert self.opened.base is not None
            return self.opened.base
        return self.opened.sources[number]


def _digested(plan: TensorPlan, bounds: Sequence[Bound]) -> list[Any]:
    method = bounds[plan.bound].method if plan.bound >= 0 else None
    return [
        plan.spec.name,
        plan.spec.dtype,
        list(plan.spec.shape),
        plan.kind,
        None if method is None else [method.name, parameters.plain(method)],
        None if plan.coefficients is None else [plan.coefficients.weights, plan.coefficients.base],
        [[feed.role, feed.source, feed.spec.name] for feed in plan.feeds],
        *([[dict(one) for one in plan.hyperparameters]] if plan.hyperparameters else []),
    ]


def make_plan(opened: Opened, recipe: Recipe, *, image_bytes: int) -> MergePlan:
    """Decide everything.

    Args:
        image_bytes: of one image of the result, about.

    Raises:
        InvalidInputError: an unknown method or parameter, a method that these sources cannot serve, weights that sum to zero,
            tensors that cannot be merged.
        MismatchError: sources that differ.
    """
    binder = _Binder(opened, recipe)
    binder.default()  # before the tensors are looked at: an unknown method is the first thing to say
    catalog = match(opened, recipe)
    tensors = binder.tensors(catalog.entries)
    objects = objects_of(opened.newest, recipe.state, seed=recipe.seed, merge_id=_merge_id(binder))
    block_bytes = choose_block_bytes(sum(plan.spec.nbytes for plan in tensors))
    units = [binder.bounds[plan.bound].needs.unit if plan.kind == "element" else _unit(plan) for plan in tensors]
    newest = opened.newest.reader
    return MergePlan(
        opened=opened,
        recipe=recipe,
        catalog=catalog,
        bounds=tuple(binder.bounds),
        tensors=tensors,
        images=tuple(
            plan_images(
                [plan.spec for plan in tensors], units, objects, block_bytes=block_bytes, image_bytes=image_bytes
            )
        ),
        image_bytes=image_bytes,
        objects=tuple(objects),
        step=recipe.step if recipe.step is not None else max((s.step or 0 for s in opened.sources), default=0),
        world=newest.manifest.world if isinstance(newest, StoredCheckpoint) else 1,
        block_bytes=block_bytes,
        notes=tuple(_notes(opened, recipe, catalog, tensors)),
    )


def _unit(plan: TensorPlan) -> Unit:
    return "matrix" if plan.kind == "pool" else "element"  # a pooled variance is small, and needs its mean beside it


def _merge_id(binder: _Binder) -> str:
    """What makes random streams of one merge others than those of another: which sources, by which method."""
    context = binder.bounds[0].context
    every = [*context.sources, *([context.base] if context.base is not None else [])]
    text = "\0".join([binder.bounds[0].method.name, *(source.id for source in every)])
    return hashlib.sha256(text.encode()).hexdigest()


class _Binder:
    """Finds methods and what each tensor is read from. Used once."""

    def __init__(self, opened: Opened, recipe: Recipe) -> None:
        self._opened, self._recipe = opened, recipe
        self.bounds: list[Bound] = []
        self._known: dict[int, int] = {}  # id of a Combine -> number
        self._context = Context(
            sources=tuple(infos_of(opened.sources)),
            base=None if opened.base is None else opened.base.info(0),
            seed=recipe.seed,
        )

    def default(self) -> None:
        self._bind(self._recipe.combine)
        for rule in self._recipe.rules:
            if rule.combine is not None:
                self._bind(rule.combine)

    def _bind(self, combine: Combine) -> int:
        if id(combine) in self._known:
            return self._known[id(combine)]
        try:
            cls = registry.find(combine.method)
        except InvalidInputError as error:
            raise InvalidInputError(f"{combine.at.at}: {error.message}", kind=error.kind, hints=error.hints) from None
        method = parameters.make(cls, combine.parameters, combine.at)
        bound = Bound(method=method, context=self._context, combine=combine)
        self._check(bound)
        if method.keeps_state and self.bounds:
            raise InvalidInputError(
                f"{combine.at.at}: method `{method.name}` leaves a state for the next merge, so it must be the method of the "
                "whole recipe",
                kind="not-in-a-rule",
            )
        self._known[id(combine)] = len(self.bounds)
        self.bounds.append(bound)
        return len(self.bounds) - 1

    def _check(self, bound: Bound) -> None:
        """Refuse what the sources cannot give."""
        needs, method, num = bound.needs, bound.method, len(self._opened.sources)
        if needs.base and self._opened.base is None:
            raise InvalidInputError(
                f"method `{method.name}` needs a base, and none is given",
                kind="no-base",
                hints=("name it: `--base URL@STEP`, or `base:` in the recipe",),
            )
        if num < needs.num_sources_min or (needs.num_sources_max is not None and num > needs.num_sources_max):
            most = "" if needs.num_sources_max is None else f" to {needs.num_sources_max}"
            raise InvalidInputError(
                f"method `{method.name}` merges {needs.num_sources_min}{most} sources, found {num}", kind="wrong-number"
            )
        odd = [source.label for source in self._context.sources if source.weight != 1.0]
        if not needs.weights and odd:
            raise InvalidInputError(
                f"method `{method.name}` does not look at weights, and {odd[0]} is given one", kind="no-weights"
            )
        if needs.metric is not None:
            self._context.metric(needs.metric)
        method.check(self._context)

    def tensors(self, entries: Sequence[Entry]) -> tuple[TensorPlan, ...]:
        """The plans of all tensors. A master copy that is kept is made as its parameter is, from the same feeds."""
        self._name(entries)
        newest = self._opened.newest
        owner = {i: param for param, slots in newest.slots.by_param.items() for i in slots.values()}
        made = {e.spec.name: self._tensor(n, e) for n, e in enumerate(entries) if not _is_master(e)}
        for number, entry in enumerate(entries):
            if _is_master(entry):
                param = made.get(owner.get(newest.ids[entry.spec.name], ""))
                if param is not None and any(param.entry.masters):
                    made[entry.spec.name] = dataclasses.replace(
                        param, number=number, spec=entry.spec, entry=entry, is_echo=True
                    )
                else:
                    made[entry.spec.name] = self._tensor(number, entry)
        for number, bound in enumerate(self.bounds):
            bound.method.check_tensors(bound.context, list(self._found(number, made.values())))
        return self._with_outputs([self._with_hyperparameters(made[entry.spec.name]) for entry in entries])

    def _name(self, entries: Sequence[Entry]) -> None:
        """Tell each method what it combines."""
        names: dict[int, list[str]] = {}
        for entry in entries:
            if entry.decision.policy == "combine" and not entry.spec.role.startswith(ROLE):
                names.setdefault(self._bind(entry.decision.combine or self._recipe.combine), []).append(entry.spec.name)
        for number, bound in enumerate(self.bounds):
            context = dataclasses.replace(bound.context, names=tuple(names.get(number, ())))
            self.bounds[number] = dataclasses.replace(bound, context=context)

    def _found(self, bound: int, plans: Iterable[TensorPlan]) -> Iterator[SourceTensor]:
        """What a method is given."""
        for plan in plans:
            if plan.kind == "element" and plan.bound == bound and not plan.is_echo:
                for feed in plan.with_role("x"):
                    yield SourceTensor(
                        tensor=plan.spec,
                        source=self._opened.sources[feed.source].label,
                        slots={one.slot: one.spec for one in plan.feeds if one.slot and one.source == feed.source},
                        hyperparameters=functools.partial(self._hyperparameters, plan, feed.source),
                    )

    def _with_outputs(self, tensors: Sequence[TensorPlan]) -> tuple[TensorPlan, ...]:
        """With the further tensors of methods that make several of each, by name."""
        out = list(tensors)
        for tensor in tensors:
            if tensor.kind != "element" or tensor.is_echo:
                continue
            bound = self.bounds[tensor.bound]
            for number in range(1, bound.method.num_outputs(bound.context)):
                spec = dataclasses.replace(tensor.spec, name=output_name(tensor.spec.name, number), aliases=())
                entry = dataclasses.replace(tensor.entry, spec=spec)
                out.append(dataclasses.replace(tensor, spec=spec, entry=entry, is_echo=True, output=number))
        if len(out) == len(tensors):
            return tuple(tensors)
        refuse_taken([tensor.spec.name for tensor in tensors], [one.spec.name for one in out[len(tensors) :]])
        by_name = sorted(out, key=lambda one: one.spec.name)
        return tuple(dataclasses.replace(one, number=number) for number, one in enumerate(by_name))

    def _tensor(self, number: int, entry: Entry) -> TensorPlan:
        plan = self._planned(number, entry)
        return dataclasses.replace(plan, subject=entry.spec.name)

    def _planned(self, number: int, entry: Entry) -> TensorPlan:
        policy = entry.decision.policy
        if policy == "combine":
            return self._combined(number, entry)
        if policy == "pool":
            return self._pooled(number, entry)
        feeds = tuple(self._sources(entry)) if policy != "reset" else ()
        kind: Kind = "same" if policy == "same" else "reset" if policy == "reset" else "copy"
        return TensorPlan(number=number, spec=entry.spec, entry=entry, kind=kind, feeds=feeds)

    def _sources(self, entry: Entry) -> Iterator[Feed]:
        for source, tensor in zip(range(len(self._opened.sources)), entry.ids, strict=True):
            if tensor is not None:
                yield Feed(role="x", source=source, tensor=tensor, spec=self._opened.sources[source].specs[tensor])

    def _combined(self, number: int, entry: Entry) -> TensorPlan:
        bound_number = self._bind(entry.decision.combine or self._recipe.combine)
        bound = self.bounds[bound_number]
        coefficients = _coefficients(bound, entry.spec)
        if coefficients is not None:
            return self._linear(number, entry, bound_number, coefficients)
        if entry.spec.role.startswith(ROLE):
            return self._linear_instead(number, entry)
        feeds = [f for f in self._sources(entry) if bound.context.sources[f.source].weight != 0.0]
        feeds += self._base_feed(entry) if self._opened.base is not None else []
        for slot in bound.needs.slots:
            feeds += self._slot_feeds(entry, slot, [feed.source for feed in feeds if feed.role == "x"], bound)
        if not any(feed.role == "x" for feed in feeds):
            raise InvalidInputError("all sources have weight 0", kind="zero-weights")
        return TensorPlan(
            number=number, spec=entry.spec, entry=entry, kind="element", feeds=tuple(feeds), bound=bound_number
        )

    def _hyperparameters(self, plan: TensorPlan, number: int) -> Mapping[str, float]:
        """What the optimizer of a source says of a parameter, which it calls by its name without the state key."""
        source = self._opened.sources[number]
        param = source.ids.get(plan.subject)
        name = source.names[param] if param is not None else plan.subject
        return source.hyperparameters.get(name.partition("/")[2] or name, {})

    def _with_hyperparameters(self, plan: TensorPlan) -> TensorPlan:
        if plan.kind != "element" or not self.bounds[plan.bound].needs.hyperparameters:
            return plan
        found = tuple(self._hyperparameters(plan, feed.source) for feed in plan.with_role("x"))
        return dataclasses.replace(plan, hyperparameters=found)

    def _linear_instead(self, number: int, entry: Entry) -> TensorPlan:
        """Optimizer state under a method that is no weighted sum: the plain mean."""
        weights = tuple(1.0 for _ in self._opened.sources)
        return self._linear(number, entry, -1, Coefficients.normalized(weights))

    def _linear(self, number: int, entry: Entry, bound: int, coefficients: Coefficients) -> TensorPlan:
        if len(coefficients.weights) != len(self._opened.sources):
            raise AssertionError("a method gave another number of weights than there are sources")
        slot = entry.spec.role.removeprefix(ROLE)
        if entry.spec.role.startswith(ROLE) and slot in SECOND_MOMENTS and min(coefficients.weights) < 0:
            raise InvalidInputError(
                f"`{entry.spec.name}` is a second moment, which negative weights would make negative",
                kind="negative-weights",
                hints=("`optimizer: newest` copies the optimizer state, `drop` leaves it out",),
            )
        feeds = [f for f in self._sources(entry) if coefficients.weights[f.source] != 0.0]
        if coefficients.base != 0.0:
            feeds += self._base_feed(entry)
        if not feeds:
            raise InvalidInputError("all weights are 0: there is nothing to merge", kind="zero-weights")
        return TensorPlan(
            number=number,
            spec=entry.spec,
            entry=entry,
            kind="linear",
            feeds=tuple(feeds),
            bound=bound,
            coefficients=coefficients,
        )

    def _base_feed(self, entry: Entry) -> list[Feed]:
        if self._opened.base is None or entry.base is None:
            raise InvalidInputError(
                f"`{entry.spec.name}` has a share of the base, which does not have it", kind="no-base"
            )
        spec = self._opened.base.specs[entry.base]
        return [Feed(role="base", source=-1, tensor=entry.base, spec=spec)]

    def _slot_feeds(self, entry: Entry, slot: str, sources: Sequence[int], bound: Bound) -> list[Feed]:
        out = []
        for number in sources:
            source = self._opened.sources[number]
            param = source.ids.get(entry.spec.name)
            name = source.names[param] if param is not None else entry.spec.name
            found = source.slots.of(name, slot)
            if found is None or (slot in COUNTERS and not is_float(source.specs[found].dtype)):
                continue  # the method is told: `Tile.slot` gives None
            spec = source.specs[found]
            whole = spec.shape != entry.spec.shape
            if whole and spec.nbytes > MERGE_SLOT_BYTES_MAX or not is_float(spec.dtype):
                raise InvalidInputError(
                    f"slot `{spec.name}` of {source.label} is a `{spec.dtype}` {list(spec.shape)}, which method "
                    f"`{bound.method.name}` cannot be given beside `{entry.spec.name}` {list(entry.spec.shape)}"
                )
            out.append(Feed(role=f"slot:{slot}", source=number, tensor=found, spec=spec, whole=whole, slot=slot))
        return out

    def _pooled(self, number: int, entry: Entry) -> TensorPlan:
        """A running variance: with the weights of a weighted sum that has none below zero, else with equal ones."""
        bound = self.bounds[self._bind(self._recipe.combine)]
        weights: tuple[float, ...] = tuple(1.0 for _ in self._opened.sources)
        if isinstance(bound.method, Linear):
            found = bound.method.coefficients(bound.context, entry.spec)
            if min(found.weights) >= 0 and found.base == 0.0 and sum(found.weights) > 0:
                weights = found.weights
        feeds = [f for f in self._sources(entry) if weights[f.source] != 0.0]
        for feed in list(feeds):
            mean = entry.means[feed.source]
            if mean is None:
                raise InvalidInputError(
                    f"`{entry.spec.name}` of {self._opened.sources[feed.source].label} has no running mean beside it"
                )
            feeds.append(
                Feed(
                    role="mean",
                    source=feed.source,
                    tensor=mean,
                    spec=self._opened.sources[feed.source].specs[mean],
                )
            )
        return TensorPlan(
            number=number,
            spec=entry.spec,
            entry=entry,
            kind="pool",
            feeds=tuple(feeds),
            coefficients=Coefficients.normalized(weights),
        )


def _coefficients(bound: Bound, tensor: TensorSpec) -> Coefficients | None:
    """What a method is for a tensor when that is a weighted sum."""
    if isinstance(bound.method, Linear):
        return bound.method.coefficients(bound.context, tensor)
    if isinstance(bound.method, Elementwise) and not tensor.role.startswith(ROLE):
        return bound.method.as_sum(bound.context, tensor)
    return None


def _is_master(entry: Entry) -> bool:
    return entry.spec.role.startswith(ROLE) and entry.decision.why == MASTER_COPY


def _notes(opened: Opened, recipe: Recipe, catalog: Catalog, tensors: Sequence[TensorPlan]) -> Iterator[str]:
    some = [p for p in tensors if any(p.entry.masters)]
    mixed = [p for p in some if not all(p.entry.masters)]
    if some:
        yield f"{len(some)} parameters are merged from fp32 master copies in the optimizer state"
    if mixed:
        yield f"{len(mixed)} of them have no master copy in every source: there the parameter itself is read"
    if any(p.kind == "pool" for p in tensors):
        yield "running statistics of batch normalisation are pooled; re-estimate them on data where you can"
    factors = factors_among({p.spec.name: p.entry.decision for p in tensors})
    if factors:
        yield f"{len(factors)} tensors are factors of LoRA adapters, merged one by one: right for neighbours of one run alone"
    if recipe.state.optimizer == "drop" and any(why == "optimizer state" for _, why in catalog.dropped):
        yield "optimizer state is left out"
    unmerges = recipe.combine.method == UNMERGE
    sums = {
        p.coefficients.weights: sum(p.coefficients.shares) + p.coefficients.base / p.coefficients.divisor
        for p in tensors
        if p.kind == "linear" and p.coefficients is not None
    }
    for weights, total in sums.items():
        if abs(total - 1) > 1e-9 and not unmerges:
            yield f"weights {', '.join(f'{w:.6g}' for w in weights)} sum to {total:.6g}, not to 1"


def coefficients_of(plan: MergePlan) -> Mapping[tuple[float, ...], list[int]]:
    """Shares of the sources, and which tensors have them."""
    out: dict[tuple[float, ...], list[int]] = {}
    for tensor in plan.tensors:
        if tensor.coefficients is not None and tensor.kind == "linear":
            out.setdefault(tensor.coefficients.shares, []).append(tensor.number)
    return out


def methods_of(bounds: Sequence[Bound]) -> list[tuple[str, bool]]:
    """(name, whether it is elementwise) of the methods of a plan."""
    return [(bound.method.name, isinstance(bound.method, Elementwise)) for bound in bounds]
