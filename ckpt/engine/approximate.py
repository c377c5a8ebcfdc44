"""Make up a lost pipeline stage out of those before and after it: CheckFree. An approximation, never the state that was saved.

In: which tensors are known and which of them are whole, which part of a name is the number of its layer, gradient norms. Out: a
plan: what every lost tensor is made of. Pure but for `values`. Never touches a tensor of a layer that is whole.

The rule (arXiv 2506.15461): a stage of k layers from layer i on gets W[i+j] = (a W[i+j-k] + b W[i+j+k]) / (a + b), where a and b
are the squared gradient norms of the stages before and after it. Its optimizer state is fresh: zeros, the step count as well,
because a step count as of the others with moments of zero makes Adam's first updates several times too large. The first and the
last stage have but one neighbour, and what is in no layer (embedding, head) has none: refused; the paper keeps copies of those.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError, NotFoundError
from ckpt.format.spec import TensorSpec
from ckpt.layout.pattern import NamePattern, TensorName
from ckpt.state.dtypes import torch_dtype

METRIC = "gradient_norm/{}"  # of a save: the norm of the gradient of the layer of that number
How = Literal["averaged", "copied", "zeros"]

# Slots of torch's optimizers that begin at zero. One that does not (a step size, a copy of the weights) cannot be fresh.
FRESH_SLOTS = frozenset(
    "step exp_avg exp_avg_sq max_exp_avg_sq momentum_buffer square_avg grad_avg acc_delta exp_inf".split()
)
_SHOWN_MAX = 10  # names in a message


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """One lost tensor, and what it is made of."""

    spec: TensorSpec
    below: str  # the tensor of the stage before; it is whole
    above: str
    how: How
    share: float  # of `below`, 0 to 1; the rest is that of `above`


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One lost stage."""

    layers: tuple[int, ...]
    below: tuple[int, ...]
    above: tuple[int, ...]
    share: float  # of `below`


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """What is made up. The names of all else stand as they are."""

    stages: tuple[Stage, ...]
    tensors: tuple[Rebuilt, ...]  # by name
    equal: bool  # no gradient norms were known

    def record(self) -> dict[str, Any]:
        """For the manifest and for people."""
        return {
            "method": "checkfree",
            "layers": [n for stage in self.stages for n in stage.layers],
            "stages": [
                {"layers": list(s.layers), "of": [list(s.below), list(s.above)], "weights": [s.share, 1 - s.share]}
                for s in self.stages
            ],
            "weights": "equal" if self.equal else "squared gradient norms",
            "num_tensors": len(self.tensors),
            "optimizer": "zeros, step 0",
        }


class LayerNames:
    """Which layer a tensor belongs to, by a pattern such as `layers.{}.**` or `model/layers.{}.**`."""

    def __init__(self, pattern: str) -> None:
        key, slash, path = pattern.replace("{}", "{layer}").rpartition("/")
        self._key = key if slash else None
        self._pattern = NamePattern(path)
        if self._pattern.captures != {"layer"}:
            raise InvalidInputError(
                f"pattern `{pattern}` must have one `{{}}`, where the number of the layer stands", kind="bad-pattern"
            )

    def place(self, name: str) -> tuple[int, int, int] | None:
        """(layer, first, last) with the characters of the name that are its number; None for what is in no layer."""
        parsed = TensorName.parse(name)
        if self._key is not None and parsed.slot is None and parsed.key != self._key:
            return None
        found: re.Match[str] | None = self._pattern.regex.fullmatch(parsed.path)
        if found is None:
            return None
        start = len(parsed.key) + 1 if parsed.key else 0
        low, high = found.span("layer")
        return int(found["layer"]), start + low, start + high

    def renamed(self, name: str, layer: int) -> str:
        """The name of the same tensor of another layer."""
        place = self.place(name)
        assert place is not None
        return f"{name[: place[1]]}{layer}{name[place[2] :]}"


def plan_checkfree(
    known: Sequence[TensorSpec],
    whole: frozenset[str],
    *,
    names: LayerNames,
    num_layers: int,
    stage_of: Mapping[int, frozenset[int]],
    norms: Mapping[int, float] | None,
) -> Approximation:
    """What the lost layers are made of.

    Args:
        known: every tensor of which anything is known: of what is left, and of an older checkpoint where there is one.
        whole: names of those of which everything is left.
        num_layers: of the model.
        stage_of: layer -> the layers that its rank holds with it, of layers that are left.
        norms: of the gradients of layers; None: all count the same.

    Raises:
        NotFoundError: `not-recoverable`: what is lost cannot be made up, with the reason.
        InvalidInputError: norms are missing.
    """
    layers: dict[int, list[TensorSpec]] = {n: [] for n in range(num_layers)}
    outside = []
    for spec in known:
        place = names.place(spec.name)
        if place is not None and place[0] >= num_layers:
            raise InvalidInputError(f"`{spec.name}` is of layer {place[0]} of a model of {num_layers} layers")
        if place is not None:
            layers[place[0]].append(spec)
        elif spec.name not in whole:
            outside.append(spec.name)
    if outside:
        raise _refused(
            f"{_shown(outside)} are lost and belong to no layer: there is nothing to make them of",
            "the method keeps copies of embedding and head on other stages: a loss like this needs an older checkpoint",
        )
    lost = [n for n, specs in layers.items() if not specs or any(spec.name not in whole for spec in specs)]
    if not lost:
        raise InvalidInputError("no layer is lost: nothing is to be approximated", kind="nothing-lost")
    stages = [_stage(run, set(lost), num_layers, stage_of, norms) for run in _runs(lost)]
    tensors = [one for stage in stages for one in _rebuilt(stage, layers, names)]
    return Approximation(
        stages=tuple(stages), tensors=tuple(sorted(tensors, key=lambda one: one.spec.name)), equal=norms is None
    )


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Runs of consecutive numbers."""
    for _, group in itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        yield tuple(number for _, number in group)


def _stage(
    run: tuple[int, ...],
    lost: set[int],
    num_layers: int,
    stage_of: Mapping[int, frozenset[int]],
    norms: Mapping[int, float] | None,
) -> Stage:
    size, text = len(run), f"layers {run[0]} to {run[-1]}" if len(run) > 1 else f"layer {run[0]}"
    if run[0] == 0 or run[-1] == num_layers - 1:
        raise _refused(
            f"{text} of {num_layers} are lost, the {'first' if run[0] == 0 else 'last'} stage: it has one neighbour only",
            "the method keeps a copy of the first and the last stage: a loss like this needs an older checkpoint",
        )
    below, above = tuple(n - size for n in run), tuple(n + size for n in run)
    for near, side in ((run[0] - 1, below), (run[-1] + 1, above)):
        held = stage_of.get(near, frozenset())
        if not 0 <= side[0] <= side[-1] < num_layers or not lost.isdisjoint(side) or not held.issuperset(side):
            raise _refused(
                f"{text} are lost, and layers {side[0]} to {side[-1]} are not one stage that is whole: "
                "more than one stage in a row is lost, or stages have different numbers of layers",
                "this needs an older checkpoint: ckpt recover URL",
            )
    return Stage(layers=run, below=below, above=above, share=_share(below, above, norms))


def _share(below: Sequence[int], above: Sequence[int], norms: Mapping[int, float] | None) -> float:
    if norms is None:
        return 0.5
    missing = [n for n in (*below, *above) if n not in norms]
    if missing:
        raise InvalidInputError(
            f"no gradient norm of layers {missing} is known",
            kind="no-gradient-norms",
            hints=(
                "give them with --weights FILE, a JSON object of layer number to norm; or --equal-weights",
                f"saves tell them with metrics={{'{METRIC.format(3)}': norm, ...}}",
            ),
        )
    a, b = (math.fsum(norms[n] ** 2 for n in side) for side in (below, above))
    if not (math.isfinite(a) and math.isfinite(b)):
        raise InvalidInputError(f"gradient norms of layers {[*below, *above]} are not all finite", kind="bad-weights")
    return a / (a + b) if a + b > 0 else 0.5


def _rebuilt(stage: Stage, layers: Mapping[int, Sequence[TensorSpec]], names: LayerNames) -> Iterator[Rebuilt]:
    for layer, low, high in zip(stage.layers, stage.below, stage.above, strict=True):
        others = {names.renamed(spec.name, layer): spec for spec in layers[high]}
        made = {names.renamed(spec.name, layer): spec for spec in layers[low]}
        seen = {spec.name: spec for spec in layers[layer]}
        odd = sorted({*made} ^ {*others} | {*seen} - {*made})
        odd += [n for n in made if n in others and not _alike(made[n], others[n], seen.get(n, made[n]))]
        if odd:
            raise _refused(
                f"layers {low}, {layer} and {high} do not have the same tensors: {_shown(odd)}",
                "only stages that are built alike can be made of each other",
            )
        for name, spec in made.items():
            how = _how(spec)
            yield Rebuilt(
                spec=TensorSpec(name=name, role=spec.role, dtype=spec.dtype, shape=spec.shape),
                below=spec.name,
                above=others[name].name,
                how=how,
                share=stage.share,
            )


def _alike(*specs: TensorSpec) -> bool:
    return len({(spec.role, spec.dtype, spec.shape) for spec in specs}) == 1 and not any(spec.aliases for spec in specs)


def _how(spec: TensorSpec) -> How:
    if not spec.role.startswith("optim."):
        dtype = torch_dtype(spec.dtype)
        return "averaged" if dtype.is_floating_point or dtype.is_complex else "copied"
    slot = spec.role.removeprefix("optim.")
    if slot not in FRESH_SLOTS:
        raise _refused(
            f"`{spec.name}` is optimizer state that does not begin at zero, or that is not known to",
            f"known to begin at zero: {', '.join(sorted(FRESH_SLOTS))}",
        )
    return "zeros"


def values(one: Rebuilt, read: Callable[[str], torch.Tensor]) -> NDArray[np.uint8]:
    """The bytes of a rebuilt tensor; `read` gives a whole tensor by name. Sums are taken in float32 at least."""
    dtype = torch_dtype(one.spec.dtype)
    if one.how == "zeros":
        out = torch.zeros(one.spec.shape, dtype=dtype)
    elif one.how == "copied":
        out = read(one.below if one.share >= 0.5 else one.above)
    else:
        wide = torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
        out = read(one.below).to(wide).mul_(one.share).add_(read(one.above).to(wide), alpha=1 - one.share).to(dtype)
    return out.contiguous().reshape(-1).view(torch.uint8).numpy()


def _refused(message: str, hint: str) -> NotFoundError:
    return NotFoundError(f"it cannot be approximated: {message}", kind="not-recoverable", hints=(hint,))


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_MAX} more" if len(names) > _SHOWN_MAX else ""
    return ", ".join(f"`{name}`" for name in names[:_SHOWN_MAX]) + more
