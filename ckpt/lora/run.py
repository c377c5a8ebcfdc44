"""Carry out a plan: factors module by module, or the base with the products added, as streams of the result's tensors.

In: a plan. Out: tensors of the result and their bytes; how far each module is off. One owner thread; reads nothing ahead.
Products are added to the base in fp64, from its master copies, and cast once; rows of a product are made in pieces that follow
from the shape alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.config import MERGE_TILE_ELEMENTS
from ckpt.convert.peft import factor_name, write_config
from ckpt.errors import CheckpointError, InvalidInputError
from ckpt.format.dtypes import dtype_of
from ckpt.format.spec import TensorSpec
from ckpt.kernels import merge as kernels
from ckpt.kernels.merge import Elements
from ckpt.layout.box import Box
from ckpt.lora import combine
from ckpt.lora.adapter import Module
from ckpt.lora.combine import Array, Low, Part
from ckpt.lora.plan import BaseTensor, LoraPlan, ModulePlan
from ckpt.merge.pieces import PieceReader
from ckpt.merge.tiles import cut

Bytes = NDArray[np.uint8]
_DROPPED = (
    "loftq_config",
    "eva_config",
    "corda_config",
    "modules_to_save",
    "trainable_token_indices",
    "exclude_modules",
)
_SHOWN = 20  # modules in one message


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one module."""

    name: str
    rank: int
    scaling: float
    error: float  # of its product, over the norm of the exact weighted sum; after the cast


def parts_of(plan: LoraPlan, module: ModulePlan) -> list[Part]:
    """The factors of a module, read."""
    out = []
    for share in module.shares:
        adapter = plan.adapters[share.adapter]
        a, b = adapter.factors(module.name)
        out.append(Part(a=a, b=b, scaling=adapter.scaling(module.name), weight=share.weight))
    return out


class Factors:
    """Makes the factors of an adapter. Streams come in the order of `specs`."""

    def __init__(self, plan: LoraPlan, key: str) -> None:
        self._plan = plan
        self._places: list[tuple[int, str]] = []  # (module, side) of each tensor
        specs = []
        for number, module in enumerate(plan.modules):
            for side in ("A", "B"):
                spec = _factor_spec(plan, module, side, key)
                specs.append((spec.name, spec, (number, side)))
        specs.sort(key=lambda one: one[0])
        self.specs = [spec for _, spec, _ in specs]
        self._places = [place for _, _, place in specs]
        self._made: dict[int, tuple[Bytes, Bytes]] = {}  # of modules of which one factor is written
        self.outcomes: dict[int, Outcome] = {}

    def stream(self, number: int) -> Iterator[Bytes]:
        """One factor. Its module is made when the first of the two is asked for."""
        module, side = self._places[number]
        made = self._made.pop(module, None)
        if made is None:
            made = self._make(module)
            self._made[module] = made
        yield made[0 if side == "A" else 1]

    def document(self) -> dict[str, Any]:
        """The config of the result, when all of it is made."""
        found = [self.outcomes[number] for number in sorted(self.outcomes)]
        rank, alpha = Counter((one.rank, one.scaling * one.rank) for one in found).most_common(1)[0][0]
        document = {k: v for k, v in self._plan.adapters[-1].config.document.items() if k not in _DROPPED}
        document |= {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {_pattern(one.name): one.rank for one in found if one.rank != rank},
            "alpha_pattern": {
                _pattern(one.name): one.scaling * one.rank for one in found if one.scaling * one.rank != alpha
            },
            "use_rslora": False,
            "fan_in_fan_out": self._plan.is_transposed,
            "target_modules": [one.name for one in found],
            "init_lora_weights": True,
            "bias": "none",
            "inference_mode": True,
        }
        write_config(document)  # JSON values throughout, or an error here
        return document

    def _make(self, number: int) -> tuple[Bytes, Bytes]:
        module = self._plan.modules[number]
        parts = parts_of(self._plan, module)
        low = _padded(_merged(self._plan, module, parts), module.rank)
        a, b = (_narrow(values, self._plan.dtype, module.name) for values in (low.a, low.b))
        stored = Low(
            a=kernels.widen(Elements(data=a, dtype=self._plan.dtype)).reshape(low.a.shape),
            b=kernels.widen(Elements(data=b, dtype=self._plan.dtype)).reshape(low.b.shape),
            scaling=low.scaling,
        )
        error = combine.relative_error(parts, stored)
        self.outcomes[number] = Outcome(name=module.name, rank=module.rank, scaling=low.scaling, error=error)
        return a, b


def _merged(plan: LoraPlan, module: ModulePlan, parts: list[Part]) -> Low:
    if plan.method == "concat":
        return combine.concat(parts)
    if plan.method == "svd":
        return combine.svd(parts, module.rank)
    if plan.method == "lego":
        return combine.lego(parts, module.rank, seed=plan.seed, name=module.name)
    return combine.factors(parts)


def check_factors(plan: LoraPlan) -> None:
    """That the mean of one factor is right: in every module the adapters share the other, to the bit.

    InvalidInputError (`no-shared-factor`) that says in how many they do not, and how far off the means of both would be.
    """
    wrong = []
    for module in plan.modules:
        parts = parts_of(plan, module)
        if combine.shared_side(parts) is None:
            same = all(part.rank == parts[0].rank for part in parts)
            off = combine.relative_error(parts, combine.means_of_both(parts)) if same else math.nan
            wrong.append(f"`{module.name}`: " + (f"off by {off:.2g}" if same else "the ranks differ"))
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise InvalidInputError(
            f"the adapters share neither A nor B in {len(wrong)} of {len(plan.modules)} modules, so the mean of the factors is "
            "not the factor of the mean; what it would be off by, of the exact change:\n"
            + "\n".join(f"  {line}" for line in [*wrong[:_SHOWN], *more]),
            kind="no-shared-factor",
            hints=("`--method concat` is exact, `--method svd --rank R` the best of a rank",),
        )


def _factor_spec(plan: LoraPlan, module: ModulePlan, side: Any, key: str) -> TensorSpec:
    form, rank = module.form, module.rank
    shape = (rank, *form.a_shape[1:]) if side == "A" else (form.rows, rank, *form.b_shape[2:])
    name = f"{key}/{factor_name(module.name, side, is_table=form.is_table)}"
    return TensorSpec(name=name, role="param", dtype=plan.dtype, shape=shape)


def _padded(low: Low, rank: int) -> Low:
    """With zeros, where a method found fewer ranks than were planned (clusters that nobody is in)."""
    if low.rank == rank:
        return low
    a, b = np.zeros((rank, low.a.shape[1])), np.zeros((low.b.shape[0], rank))
    a[: low.rank], b[:, : low.rank] = low.a, low.b
    return dataclasses.replace(low, a=a, b=b)


def _pattern(module: str) -> str:
    """A pattern of PEFT for this module alone."""
    return "^" + "".join(f"\\{c}" if c in ".+*?()[]{}|^$\\" else c for c in module)


def _narrow(values: Array, dtype: str, name: str) -> Bytes:
    out = np.empty(values.size * dtype_of(dtype).itemsize, np.uint8)
    if not kernels.narrow(values, dtype, out):
        raise CheckpointError(f"`{name}` does not fit into {dtype}: an element is infinite", kind="not-finite")
    return out


class Folded:
    """Makes a base with products added. Streams come in any order."""

    def __init__(self, plan: LoraPlan) -> None:
        assert plan.base is not None
        self._plan, self._base = plan, plan.base
        self._pieces = PieceReader(plan.base.reader, plan.base.label)
        self._modules = {one.name: one for one in plan.modules}
        self.specs = [one.spec for one in plan.tensors]

    def stream(self, number: int) -> Iterator[Bytes]:
        """One tensor of the result."""
        one = self._plan.tensors[number]
        if one.module is not None:
            yield from self._changed(one, self._modules[one.module])
            return
        reader, tensor, spec = self._pieces, one.tensor, self._base.specs[one.tensor]
        if one.instead is not None:
            adapter = self._plan.adapters[one.instead[0]]
            reader, tensor = adapter.pieces, one.instead[1]
            spec = adapter.source.specs[tensor]
        for box in cut(spec.shape, MERGE_TILE_ELEMENTS):
            raw = reader.read(tensor, box)
            yield raw if spec.dtype == one.spec.dtype else _cast(raw, spec.dtype, one.spec)

    def _changed(self, one: BaseTensor, module: ModulePlan) -> Iterator[Bytes]:
        """The base plus the products, row by row."""
        spec, form = self._base.specs[one.tensor], module.form
        left, right = self._sides(parts_of(self._plan, module), form)
        rest = spec.shape[1:]
        step = max(1, MERGE_TILE_ELEMENTS // max(1, math.prod(rest)))
        for start in range(0, spec.shape[0], step):
            count = min(step, spec.shape[0] - start)
            box = Box(offsets=(start, *(0 for _ in rest)), lengths=(count, *rest))
            values = kernels.widen(Elements(data=self._pieces.read(one.tensor, box), dtype=spec.dtype))
            values += (left[start : start + count] @ right).reshape(-1)
            yield _narrow(values, one.spec.dtype, one.spec.name)

    def _sides(self, parts: list[Part], form: Module) -> tuple[Array, Array]:
        """Two matrices whose product is what is added, as the weights lie."""
        b = np.concatenate([part.share * part.b for part in parts], axis=1)
        a = np.concatenate([part.a for part in parts])
        if self._plan.is_transposed or form.is_table:
            return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        return b, a


def _cast(raw: Bytes, dtype: str, spec: TensorSpec) -> Bytes:
    out = np.empty(len(raw) // dtype_of(dtype).itemsize * spec.itemsize, np.uint8)
    kernels.combine([Elements(data=raw, dtype=dtype)], [1.0], out, spec.dtype)
    return out
