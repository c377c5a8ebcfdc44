"""What becomes of each tensor of the result: combined, copied, pooled, reset, or left out; and why.

In: the tensors of the newest source and the recipe's rules. Out: one `Decision` per tensor, or the reason why a tensor cannot be
merged. Pure. The table that this follows is in docs/explanation/merging.md. A rule of the recipe wins over everything here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.format.spec import TensorSpec
from ckpt.kernels.merge import is_float
from ckpt.layout.pattern import TensorName
from ckpt.merge.recipe import Combine, Recipe, Rule
from ckpt.merge.slots import COUNTERS, ROLE, is_master

_LAST = r"(?:.*[./])?"
# Scales and histories that FP8 training keeps; they belong to the codes beside them, and an average of them to none.
_SCALES = re.compile(
    _LAST + r"(?:amax_history\w*|scale_inv\w*|\w*_scale(?:_inv)?|_extra_state\w*|scaling_fwd\w*|scaling_bwd\w*)",
    re.DOTALL,
)
# Tables that follow from the model's shape.
_CONSTANTS = re.compile(
    _LAST + r"(?:(?:original_)?inv_freq|cos_cached|sin_cached|cos_sin_cache|freqs_cis|freqs_cos|freqs_sin)", re.DOTALL
)
_RUNNING = re.compile(r"(.*[./])?running_(mean|var)", re.DOTALL)
_SCALE_SUFFIXES = ("_scale", "_scale_inv", ".scale", ".scale_inv")
MASTER_COPY = "a master copy"
_COPIED_FLOATS = ("float8_e8m0fnu",)  # scales by their very dtype


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of one tensor."""

    policy: str  # combine, newest, oldest, same, pool, reset or drop; refuse
    why: str  # one phrase, for people
    combine: Combine | None = None  # another method than the recipe's
    rule: bool = False  # a rule said so


def decide(spec: TensorSpec, recipe: Recipe, names: frozenset[str]) -> Decision:
    """The decision for one tensor.

    Args:
        names: of all tensors of the source.
    """
    rule = _rule_of(spec, recipe.rules)
    if rule is not None:
        return Decision(policy=rule.policy, why=f"rule of {rule.at}", combine=rule.combine, rule=True)
    if spec.role.startswith(ROLE):
        return _of_slot(spec, recipe)
    if _CONSTANTS.fullmatch(spec.name):
        return Decision(policy="same", why="a constant table")
    if _SCALES.fullmatch(spec.name) or spec.dtype in _COPIED_FLOATS:
        return Decision(policy="newest", why="a scale, or state of an FP8 recipe")
    if not is_float(spec.dtype):
        return _of_no_float(spec)
    if spec.dtype.startswith("float8") and any(spec.name + suffix in names for suffix in _SCALE_SUFFIXES):
        return Decision(policy="refuse", why="codes of 8 bits with a scale beside them")
    running = _RUNNING.fullmatch(spec.name)
    if running is not None:
        return _of_running(running, recipe, names)
    return Decision(
        policy="combine", why="a floating-point " + (spec.role if spec.role in ("param", "buffer") else "tensor")
    )


def _rule_of(spec: TensorSpec, rules: Sequence[Rule]) -> Rule | None:
    for rule in rules:
        for name in (spec.name, *spec.aliases):
            parsed = TensorName.parse(name)
            if any(pattern.match(name, parsed) is not None for pattern in rule.match):
                return rule
    return None


def _of_slot(spec: TensorSpec, recipe: Recipe) -> Decision:
    wanted = recipe.state.optimizer
    if wanted == "drop":
        return Decision(policy="drop", why="optimizer state")
    slot = spec.role[len(ROLE) :]
    if is_float(spec.dtype) and is_master(slot, recipe.state.masters):
        return Decision(policy="combine", why=MASTER_COPY)
    if wanted == "newest" or slot in COUNTERS or not is_float(spec.dtype):
        return Decision(policy="newest", why="optimizer state")
    return Decision(policy="combine", why="optimizer state")


def _of_no_float(spec: TensorSpec) -> Decision:
    if spec.dtype.startswith("complex"):
        return Decision(policy="refuse", why=f"complex numbers (`{spec.dtype}`)")
    if spec.role == "param" and spec.dtype != "bool":
        return Decision(policy="refuse", why=f"a parameter of dtype `{spec.dtype}`: packed or quantised")
    return Decision(policy="newest", why=f"`{spec.dtype}`")


def _of_running(match: re.Match[str], recipe: Recipe, names: frozenset[str]) -> Decision:
    prefix, kind = match[1] or "", match[2]
    wanted = recipe.state.batch_norm
    both = {f"{prefix}running_mean", f"{prefix}running_var"} <= names
    if wanted in ("newest", "reset"):
        return Decision(policy=wanted, why="running statistics")
    if wanted == "pool" and both and kind == "var":
        return Decision(policy="pool", why="a running variance, with its mean")
    return Decision(policy="combine", why="running statistics")


def mean_of(variance: str) -> str:
    """The name of the running mean beside a running variance."""
    return variance.removesuffix("running_var") + "running_mean"
