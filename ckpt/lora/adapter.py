"""An adapter, opened: its config, and which tensors are the factors of which module.

In: an opened source (a PEFT folder, or a checkpoint that holds an adapter). Out: `Adapter`, checked: every module has both
factors, of ranks that fit each other and the config. Reads headers, indexes and the config; factors when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ckpt.convert.peft import (
    CONFIG_FILE,
    KIND,
    METADATA,
    AdapterConfig,
    FactorName,
    config_of,
    parse_factor,
    read_config,
    stored_config,
)
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import InvalidInputError, NotFoundError
from ckpt.format.spec import TensorSpec
from ckpt.kernels import merge as kernels
from ckpt.kernels.merge import Elements, is_float
from ckpt.lora.combine import Array
from ckpt.merge.pieces import PieceReader
from ckpt.merge.slots import ROLE
from ckpt.merge.sources import Source


@dataclass(frozen=True, kw_only=True)
class Module:
    """The factors of one module."""

    name: str
    a: int  # tensor ids
    b: int
    is_table: bool
    rank: int
    rows: int  # of the product: out
    columns: int  # in, all dims of a convolution
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]

    @property
    def form(self) -> tuple[object, ...]:
        """What must be the same in all adapters."""
        return self.is_table, self.rows, self.a_shape[1:], self.b_shape[2:]


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """One adapter."""

    source: Source
    config: AdapterConfig
    modules: Mapping[str, Module]  # by name, sorted
    others: Mapping[str, int]  # tensors that are no factors: name as the model has it -> id
    pieces: PieceReader

    @property
    def label(self) -> str:
        return self.source.label

    def factors(self, module: str) -> tuple[Array, Array]:
        """A [rank, in] and B [out, rank] of a module, as fp64. InvalidInputError (`not-finite`) for NaN and infinity."""
        found = self.modules[module]
        return self._matrix(found.a, found.rank, found.columns), self._matrix(found.b, found.rows, found.rank)

    def scaling(self, module: str) -> float:
        return self.config.scaling(module, self.modules[module].rank)

    def _matrix(self, tensor: int, rows: int, columns: int) -> Array:
        spec = self.source.specs[tensor]
        values = kernels.widen(Elements(data=self.pieces.whole(tensor), dtype=spec.dtype)).reshape(rows, columns)
        if not np.isfinite(values).all():
            raise InvalidInputError(f"`{spec.name}` of {self.label} holds NaN or infinity", kind="not-finite")
        return values


def open_adapter(source: Source, *, key: str, name: str | None = None, config: bytes | None = None) -> Adapter:
    """Find the adapter in a source.

    Args:
        key: the state key that the model has in a checkpoint.
        name: of the adapter, where there are several.
        config: of an `adapter_config.json`, for a checkpoint that does not say.

    Raises:
        InvalidInputError: `bad-adapter`: what is wrong with the config or the factors; `no-config`.
    """
    factors, others = _tensors(source, key)
    names = sorted({factor.adapter for factor in factors.values()})
    if not names:
        raise InvalidInputError(
            f"{source.label} holds no adapter: no tensor is called `...lora_A.weight`",
            kind=KIND,
            hints=(
                "name a folder with `adapter_config.json` and `adapter_model.safetensors`, or a checkpoint with an adapter",
            ),
        )
    if name is None and len(names) > 1:
        raise InvalidInputError(
            f"{source.label} holds {len(names)} adapters",
            kind=KIND,
            hints=(f"`--adapter NAME`, one of: {', '.join(names)}",),
        )
    chosen = names[0] if name is None or names == [""] else name
    if chosen not in names:
        raise InvalidInputError(
            f"{source.label} holds no adapter `{name}`", kind=KIND, hints=(f"there are: {', '.join(names)}",)
        )
    found = _config(source, config)
    pairs: dict[str, dict[str, tuple[int, FactorName]]] = {}
    for i, factor in factors.items():
        if factor.adapter == chosen:
            pairs.setdefault(factor.module, {})[factor.side] = i, factor
    modules = {module: _module(source, module, pairs[module], found) for module in sorted(pairs)}
    return Adapter(
        source=source, config=found, modules=modules, others=others, pieces=PieceReader(source.reader, source.label)
    )


def _tensors(source: Source, key: str) -> tuple[dict[int, FactorName], dict[str, int]]:
    """Factors by id; and what an adapter has besides: all else of a folder, whole modules of a checkpoint."""
    factors: dict[int, FactorName] = {}
    others: dict[str, int] = {}
    for i, spec in enumerate(source.specs):
        first, _, rest = spec.name.partition("/")
        if first != key or not rest or spec.role.startswith(ROLE):
            continue
        factor = parse_factor(rest)
        if factor is not None:
            factors[i] = factor
        elif source.is_folder or ".modules_to_save." in rest or ".lora_" in rest:
            others[rest] = i
    return factors, others


def _config(source: Source, given: bytes | None) -> AdapterConfig:
    reader = source.reader
    if given is not None:
        return read_config(given, name="the given config")
    if not isinstance(reader, StoredCheckpoint):
        try:
            return read_config(reader.store.read(CONFIG_FILE), name=f"{source.label}/{CONFIG_FILE}")
        except NotFoundError:
            raise InvalidInputError(f"{source.label} has no `{CONFIG_FILE}`", kind="no-config") from None
    return config_of(stored_config(reader), name=f"metadata `{METADATA}` of {source.label}")


def _module(source: Source, name: str, found: Mapping[str, tuple[int, FactorName]], config: AdapterConfig) -> Module:
    if len(found) < 2:
        side = "B" if "A" in found else "A"
        raise InvalidInputError(f"{source.label}: module `{name}` has no factor {side}", kind=KIND)
    (a, factor), (b, _) = found["A"], found["B"]
    first, second = source.specs[a], source.specs[b]
    for spec in (first, second):
        if not is_float(spec.dtype) or len(spec.shape) < 2:
            raise InvalidInputError(
                f"{source.label}: `{spec.name}` is a `{spec.dtype}` {list(spec.shape)}, expected floats of two dims or more",
                kind=KIND,
            )
    rank, wanted = first.shape[0], config.rank_of(name)
    if rank != second.shape[1] or math.prod(second.shape[2:]) != 1:
        raise InvalidInputError(
            f"{source.label}: the factors of `{name}` do not fit each other: A {list(first.shape)}, B {list(second.shape)}",
            kind=KIND,
        )
    if rank != wanted:
        raise InvalidInputError(
            f"{source.label}: module `{name}` has rank {rank}, its config says {wanted}: the scaling cannot be known",
            kind=KIND,
        )
    return _made(name, a, b, factor, first, second)


def _made(name: str, a: int, b: int, factor: FactorName, first: TensorSpec, second: TensorSpec) -> Module:
    return Module(
        name=name,
        a=a,
        b=b,
        is_table=factor.is_table,
        rank=first.shape[0],
        rows=second.shape[0],
        columns=math.prod(first.shape[1:]),
        a_shape=first.shape,
        b_shape=second.shape,
    )
