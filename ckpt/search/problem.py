"""What is searched over: the sources of a recipe, opened, the space of their coefficients, and the recipe of any point.

In: a recipe without a method, groups. Out: `Problem`. Everything is checked before a byte of a tensor is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt.config import Options
from ckpt.errors import InvalidInputError
from ckpt.merge.plan import MergePlan, make_plan
from ckpt.merge.recipe import Recipe, from_document
from ckpt.merge.run import resolved
from ckpt.merge.sources import Opened, OpenStore, open_sources
from ckpt.merge.tiles import layer_of
from ckpt.search.point import REST, Group, Point, Space, combine_of, groups_of, layer_groups


@dataclass(frozen=True, kw_only=True)
class Over:
    """Which tensors share their weights: named groups, or layers in so many runs; all of them when neither is said."""

    groups: tuple[Group, ...] = ()
    layers: int | None = None
    abs_sum_max: float = 0.0

    def __post_init__(self) -> None:
        if self.groups and self.layers is not None:
            raise InvalidInputError("say either `groups` or `layers`", kind="bad-groups")
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise InvalidInputError(f"two groups have one name: {', '.join(names)}", kind="bad-groups")


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """An opened search."""

    opened: Opened
    options: Options
    space: Space
    reference: MergePlan  # reads every source for every tensor
    document: dict[str, Any]  # the recipe without its method, every source by its step

    def recipe_of(self, point: Point) -> Recipe:
        """The recipe that merges a point."""
        combine, rules = combine_of(self.space, point)
        document = {**self.document, "combine": combine, "rules": [*rules, *self.document.get("rules", ())]}
        return from_document(document, "search")

    def plan_of(self, point: Point) -> MergePlan:
        """Its plan, over the sources that are open."""
        recipe = self.recipe_of(point)
        return make_plan(self.opened, recipe, image_bytes=self.options.merge_image_bytes)

    def identity(self) -> dict[str, Any]:
        """What the scores of points depend on, as JSON."""
        return {
            "sources": [source.record() for source in self.opened.sources],
            "base": None if self.opened.base is None else self.opened.base.record(),
            "plan": self.reference.digest,
            "space": hashlib.sha256(json.dumps(dataclasses.asdict(self.space)).encode()).hexdigest(),
        }


@contextlib.contextmanager
def opened_problem(recipe: Recipe, over: Over, options: Options, open_at: OpenStore | None = None) -> Iterator[Problem]:
    """Open the sources and look at their indexes; closed at the end.

    Args:
        recipe: its method counts for nothing.

    Raises:
        InvalidInputError: groups, weights, rules or optimizer state that a search cannot have; too few sources.
        MismatchError: sources that differ.
    """
    _refuse(recipe)
    opened = open_sources(recipe.sources, recipe.base, options, open_at)
    try:
        yield _problem(recipe, over, opened, options)
    finally:
        opened.close()


def _refuse(recipe: Recipe) -> None:
    weighted = [spec for spec in recipe.sources if spec.weight != 1.0]
    if weighted:
        raise InvalidInputError(
            f"{weighted[0].at}: a source of a search has no `weight`: weights are what is searched for",
            kind="bad-recipe",
        )
    if recipe.state.optimizer == "combine":
        raise InvalidInputError(
            "a search does not combine optimizer state: say `optimizer: newest` or `drop`", kind="bad-recipe"
        )


def _problem(recipe: Recipe, over: Over, opened: Opened, options: Options) -> Problem:
    num, deltas = len(opened.sources), opened.base is not None
    if num < (1 if deltas else 2):
        raise InvalidInputError(f"a search takes at least 2 sources, or 1 and a base; found {num}", kind="wrong-number")
    document = {key: value for key, value in resolved(recipe, opened).items() if key not in ("method", "combine")}
    share = 1.0 / (num + 1)
    combine = {"method": "coefficients", "match": [REST], "weights": [share] * num, "deltas": deltas}
    plan = make_plan(
        opened, from_document({**document, "combine": combine}, "search"), image_bytes=options.merge_image_bytes
    )
    _refuse_passes(plan)
    tensors = tuple((t.spec.name, math.prod(t.spec.shape)) for t in plan.tensors if t.kind == "linear" and t.bound == 0)
    if not tensors:
        raise InvalidInputError("rules leave no tensor whose weights could be searched for", kind="nothing-to-merge")
    names = [name for name, _ in tensors]
    by_place = sorted(opened.sources, key=lambda source: source.place)
    space = Space(
        sources=tuple(source.label for source in by_place),
        steps=tuple(source.step for source in by_place),
        groups=groups_of(names, over.groups or _layers(names, over.layers)),
        tensors=tensors,
        deltas=deltas,
        abs_sum_max=over.abs_sum_max,
    )
    if not deltas and 0 < over.abs_sum_max < 1:
        raise InvalidInputError(
            f"weights that sum to 1 have magnitudes that sum to 1 at least, and the bound is {over.abs_sum_max}"
        )
    return Problem(opened=opened, options=options, space=space, reference=plan, document=document)


def _layers(names: Sequence[str], num: int | None) -> tuple[Group, ...]:
    if num is None:
        return ()
    found = sorted({layer for name in names if (layer := layer_of(name)) != name}, key=_natural)
    if not found:
        raise InvalidInputError(
            "no tensor has the number of a layer in its name: `layers` finds none", kind="bad-groups",
            hints=("name the groups by patterns instead",),
        )  # fmt: skip
    return layer_groups(found, num)


def _natural(layer: str) -> tuple[str, int]:
    head, _, number = layer.rpartition("." if "." in layer.rpartition("/")[2] else "/")
    return head, int(number)


def _refuse_passes(plan: MergePlan) -> None:
    """Rules may bring other methods, but for those that look at the whole model before they merge."""
    odd = [b.method.name for b in plan.bounds if b.num_passes and b.needs.scope != "tensor"]
    if odd:
        raise InvalidInputError(
            f"method `{odd[0]}` of a rule reads the whole model before it merges, for every candidate: a search has none such",
            kind="bad-recipe",
        )
