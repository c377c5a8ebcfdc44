"""A search as a recipe: everything of a merge recipe but its method, and a key `search`.

In: nodes. Out: the recipe, what is searched over, settings, evaluators. Read whole and checked before anything is opened. The
schema is described in docs/how-to/search.md. Pure.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt.errors import InvalidInputError
from ckpt.merge.nodes import KIND, Node, nodes_of
from ckpt.merge.recipe import VERSION, Recipe, recipe_of
from ckpt.search.driver import BUDGET_MAX, Driver, make_driver
from ckpt.search.point import Group
from ckpt.search.problem import Over
from ckpt.search.run import Settings
from ckpt.search.score import COMMAND_TIMEOUT_S, Command, Evaluator, Objective

_KEYS = ("driver", "budget", "seed", "evaluator", "holdout", "objective", "over", "failures_max", "references")


@dataclass(frozen=True, kw_only=True)
class SearchRecipe:
    """A whole search."""

    recipe: Recipe  # its method counts for nothing
    over: Over
    settings: Settings
    evaluator: Evaluator | None
    holdout: Evaluator | None


def search_of(root: Node) -> SearchRecipe:
    """The search that a tree of nodes describes. InvalidInputError (`bad-recipe`) that names the place of the first fault."""
    entries = dict(root.entries("a recipe"))
    if "search" not in entries:
        raise root.fail("the recipe has no `search`", "`ckpt merge` is for recipes with a method")
    part = entries.pop("search")
    odd = [key for key in ("method", "combine") if key in entries]
    if odd:
        raise entries[odd[0]].fail(f"`{odd[0]}` is not for a search, which finds the weights of a weighted sum itself")
    recipe = any_method(Node(entries, root.at))
    found = part.mapping("`search`", _KEYS, ("driver", "budget"))
    try:
        return SearchRecipe(
            recipe=recipe,
            over=_over(found["over"]) if "over" in found else Over(),
            settings=_settings(found, make_driver(found["driver"])),
            evaluator=_command(found["evaluator"]) if "evaluator" in found else None,
            holdout=_command(found["holdout"]) if "holdout" in found else None,
        )
    except InvalidInputError as error:
        raise error if error.kind == KIND else part.fail(error.message, *error.hints) from None


def sources_alone(sources: Sequence[Any], at: str) -> Node:
    """A recipe of sources, without a method."""
    return nodes_of({"recipe": VERSION, "sources": list(sources)}, at)


def any_method(root: Node) -> Recipe:
    """The recipe of nodes without a method; the one that it gets counts for nothing."""
    return recipe_of(Node({**root.entries("a recipe"), "method": Node("uniform", root.at)}, root.at))


def with_search(recipe: Node, search: Mapping[str, Any], at: str) -> Node:
    """The nodes of a recipe with keys of `search` on top of its own."""
    entries = recipe.entries("a recipe")
    own = entries["search"].entries("`search`") if "search" in entries and entries["search"].value is not None else {}
    given = {key: nodes_of(value, f"{at} {key}") for key, value in search.items() if value is not None}
    return Node(
        {**entries, "search": Node({**own, **given}, entries["search"].at if "search" in entries else at)}, recipe.at
    )


def _settings(found: Mapping[str, Node], driver: Driver) -> Settings:
    budget = found["budget"].whole("`budget`", 1)
    if budget > BUDGET_MAX:
        raise found["budget"].fail(f"`budget` must be at most {BUDGET_MAX}, found {budget}")
    return Settings(
        driver=driver,
        budget=budget,
        seed=found["seed"].whole("`seed`") if "seed" in found else 0,
        objective=_objective(found["objective"]) if "objective" in found else None,
        failures_max=found["failures_max"].whole("`failures_max`", 1) if "failures_max" in found else 3,
        references=found["references"].flag("`references`") if "references" in found else True,
    )


def _objective(node: Node) -> Objective:
    if isinstance(node.value, str):
        return node.value
    entries = node.entries("`objective`")
    if not entries:
        raise node.fail("`objective` names no metric")
    return {name: one.number(f"the weight of `{name}`") for name, one in entries.items()}


def _over(node: Node) -> Over:
    entries = node.mapping("`over`", ("groups", "layers", "abs_sum_max"))
    groups = [_group(item) for item in entries["groups"].items("`groups`")] if "groups" in entries else []
    bound = entries["abs_sum_max"].number("`abs_sum_max`") if "abs_sum_max" in entries else 0.0
    if bound < 0:
        raise entries["abs_sum_max"].fail(f"`abs_sum_max` must not be below 0, found {bound}")
    layers = entries["layers"].whole("`layers`", 1) if "layers" in entries else None
    return Over(groups=tuple(groups), layers=layers, abs_sum_max=bound)


def _group(node: Node) -> Group:
    entries = node.mapping("a group", ("name", "match"), ("name", "match"))
    match = entries["match"]
    texts = [match] if isinstance(match.value, str) else match.items("`match`")
    return Group(name=entries["name"].text("`name`"), match=tuple(text.text("each of `match`") for text in texts))


def _command(node: Node) -> Command:
    """An evaluator: words, a command line, or a mapping of `command` and `timeout_s`."""
    entries = (
        node.mapping("an evaluator", ("command", "timeout_s"), ("command",)) if isinstance(node.value, dict) else {}
    )
    command = entries.get("command", node)
    if isinstance(command.value, str):
        try:
            words = tuple(shlex.split(command.value))
        except ValueError as error:
            raise command.fail(f"the command cannot be split into words: {error}") from None
    else:
        words = tuple(item.text("each word of a command") for item in command.items("a command"))
    timeout = entries["timeout_s"].number("`timeout_s`") if "timeout_s" in entries else COMMAND_TIMEOUT_S
    return Command(words=words, timeout_s=timeout)
