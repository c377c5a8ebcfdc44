"""What a merge of adapters will do with which module, decided before a factor is read.

In: opened adapters, a method, weights; for `fold` the base. Out: `LoraPlan`. Pure: looks at names, shapes and configs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ckpt.config import ADAPTER_RANK_MAX, MERGE_LISTED_MAX, MERGE_TILE_ELEMENTS, Options
from ckpt.convert.peft import KIND, PREFIX, parse_factor
from ckpt.errors import BudgetError, InvalidInputError, MismatchError
from ckpt.format.dtypes import dtype_of
from ckpt.format.spec import TensorSpec
from ckpt.kernels.merge import is_float
from ckpt.lora.adapter import Adapter, Module
from ckpt.merge.estimate import PROGRAM_BYTES
from ckpt.merge.slots import ROLE, master_of
from ckpt.merge.sources import Source

MethodName = Literal["concat", "svd", "lego", "factors", "fold"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)


@dataclass(frozen=True, kw_only=True)
class Share:
    """One adapter's part in a module."""

    adapter: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class ModulePlan:
    """One module of the result."""

    name: str
    form: Module  # of the first adapter that has it
    shares: tuple[Share, ...]
    rank: int  # of the result, at most; 0 of `fold`


@dataclass(frozen=True, kw_only=True)
class BaseTensor:
    """One tensor of a folded result."""

    spec: TensorSpec  # as it will be
    tensor: int  # id in the base: of its master copy, where it is changed and has one
    module: str | None  # whose product is added
    instead: tuple[int, int] | None = None  # (adapter, tensor id): a whole module that the adapter brings


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraPlan:
    """A merge of adapters, decided."""

    method: MethodName
    adapters: tuple[Adapter, ...]  # in canonical order
    weights: tuple[float, ...]
    modules: tuple[ModulePlan, ...]  # by name
    dtype: str  # of the factors of the result
    base: Source | None
    tensors: tuple[BaseTensor, ...]  # of `fold`, by name
    notes: tuple[str, ...]
    seed: int = 0

    @property
    def is_transposed(self) -> bool:
        return self.adapters[0].config.is_transposed

    def memory_bytes(self, options: Options) -> int:
        """About the peak: the program, the buffers of writing, and the largest module's factors several times in fp64."""
        sizes = [
            8
            * (one.form.rows + one.form.columns)
            * sum(self.adapters[s.adapter].modules[one.name].rank for s in one.shares)
            for one in self.modules
        ]
        tile = 4 * 8 * max(MERGE_TILE_ELEMENTS, max((one.form.columns for one in self.modules), default=0))
        return PROGRAM_BYTES + (options.write_buffers + 1) * options.chunk_bytes + tile + 8 * max(sizes, default=0)


def make_plan(
    adapters: Sequence[Adapter],
    method: str,
    *,
    weights: Sequence[float],
    rank: int | None,
    dtype: str | None,
    base: Source | None,
    key: str,
    seed: int,
) -> LoraPlan:
    """Decide.

    Raises:
        InvalidInputError: an unknown method, a rank that cannot be, tensors that are no factors.
        MismatchError: adapters, or an adapter and the base, that do not fit; lists every module.
    """
    if method not in METHODS:
        raise InvalidInputError(
            f"unknown method `{method}` for adapters", kind="unknown-method", hints=(f"known: {', '.join(METHODS)}",)
        )
    chosen = METHODS[METHODS.index(method)]
    if (base is None) == (chosen == "fold"):
        raise InvalidInputError(
            "method `fold` needs the base, and no other method takes one", kind="no-base", hints=("`--base URL@STEP`",)
        )
    if rank is not None and (chosen not in ("svd", "lego") or not 1 <= rank <= ADAPTER_RANK_MAX):
        raise InvalidInputError(
            f"`rank` is of methods svd and lego, from 1 to {ADAPTER_RANK_MAX}; found {rank}", kind="usage"
        )
    _refuse_others(adapters, chosen)
    modules = _modules(adapters, weights, chosen, rank)
    return LoraPlan(
        method=chosen,
        adapters=tuple(adapters),
        weights=tuple(weights),
        modules=modules,
        dtype=dtype or _widest(adapters),
        base=base,
        tensors=() if base is None else _base_tensors(adapters, modules, base, key, dtype),
        notes=tuple(_notes(adapters)),
        seed=seed,
    )


def _refuse_others(adapters: Sequence[Adapter], method: MethodName) -> None:
    for adapter in adapters:
        if adapter.others and not (method == "fold" and len(adapters) == 1):
            first = next(iter(adapter.others))
            raise InvalidInputError(
                f"{adapter.label} has {len(adapter.others)} tensors that are no factors of a product, such as `{first}`",
                kind=KIND,
                hints=("whole modules go into the base with `--method fold`, one adapter at a time",),
            )


def _modules(
    adapters: Sequence[Adapter], weights: Sequence[float], method: MethodName, rank: int | None
) -> tuple[ModulePlan, ...]:
    if len({adapter.config.is_transposed for adapter in adapters}) > 1:
        raise MismatchError(
            "the adapters differ in `fan_in_fan_out`: some have weights as [in, out], some as [out, in]"
        )
    names = sorted({name for adapter in adapters for name in adapter.modules})
    wrong, out = [], []
    for name in names:
        having = [number for number, adapter in enumerate(adapters) if name in adapter.modules]
        forms = {adapters[number].modules[name].form for number in having}
        if len(forms) > 1:
            shapes = ", ".join(
                f"A {list(adapters[n].modules[name].a_shape)} B {list(adapters[n].modules[name].b_shape)}"
                for n in having
            )
            wrong.append(f"`{name}`: {shapes}")
        if method == "factors" and len(having) < len(adapters):
            wrong.append(f"`{name}`: only in {', '.join(adapters[n].label for n in having)}; `factors` needs it in all")
        shares = tuple(Share(adapter=n, weight=weights[n]) for n in having if weights[n] != 0.0)
        if shares:
            form = adapters[having[0]].modules[name]
            ranks = [adapters[share.adapter].modules[name].rank for share in shares]
            out.append(ModulePlan(name=name, form=form, shares=shares, rank=_rank(method, form, ranks, rank)))
    if wrong:
        raise MismatchError(f"the adapters differ in {len(wrong)} modules:\n" + _listed(wrong))
    if not out:
        raise InvalidInputError("all weights are 0: there is nothing to merge", kind="zero-weights")
    return tuple(out)


def _rank(method: MethodName, form: Module, ranks: Sequence[int], wanted: int | None) -> int:
    whole = sum(ranks)
    if method == "fold":
        return 0
    if method == "concat":
        return whole
    if method == "factors":
        return max(ranks)
    if method == "svd":
        return min(wanted or max(ranks), whole, form.rows, form.columns)
    return min(wanted or max(ranks), whole)


def _widest(adapters: Sequence[Adapter]) -> str:
    """Of the factors: the widest float that there is."""
    found = {
        adapter.source.specs[i].dtype
        for adapter in adapters
        for one in adapter.modules.values()
        for i in (one.a, one.b)
    }
    return max(found, key=lambda name: (dtype_of(name).itemsize, name))


def _base_tensors(
    adapters: Sequence[Adapter], modules: Sequence[ModulePlan], base: Source, key: str, dtype: str | None
) -> tuple[BaseTensor, ...]:
    by_name = {one.name: one for one in modules}
    brought = {_plain(name): i for name, i in adapters[0].others.items()} if len(adapters) == 1 else {}
    out, missed = [], dict.fromkeys(by_name)
    wrong = []
    for i, spec in enumerate(base.specs):
        first, _, rest = spec.name.partition("/")
        if spec.role.startswith(ROLE) or (first == key and (parse_factor(rest) or ".modules_to_save." in rest)):
            continue
        plain = _plain(rest) if first == key else None
        module = plain.removesuffix(".weight") if plain is not None and plain.endswith(".weight") else None
        if module in by_name and module is not None:
            missed.pop(module)
            wrong += _misfit(by_name[module], spec, transposed=adapters[0].config.is_transposed)
            made = _tensor(base, i, f"{key}/{plain}", dtype, module=module)
        elif plain is not None and plain in brought:
            made = _tensor(base, i, f"{key}/{plain}", dtype, instead=(0, brought.pop(plain)))
        else:
            made = _tensor(base, i, spec.name if plain is None else f"{key}/{plain}", dtype)
        out.append(made)
    wrong += [f"`{name}`: {base.label} has no `{key}/{name}.weight`" for name in missed]
    wrong += [f"`{name}`: {base.label} has no `{key}/{name}`" for name in brought]
    if wrong:
        raise MismatchError(f"the adapters do not fit {base.label}:\n" + _listed(wrong))
    return tuple(sorted(out, key=lambda one: one.spec.name))


def _plain(name: str) -> str:
    """The name that a tensor has in the model without adapters."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def _misfit(module: ModulePlan, spec: TensorSpec, *, transposed: bool) -> list[str]:
    form = module.form
    shape: tuple[int, ...] = (form.rows, *form.a_shape[1:])
    if transposed or form.is_table:
        shape = tuple(reversed(shape))
    if spec.shape != shape:
        return [f"`{module.name}`: {list(shape)} of the adapter, {list(spec.shape)} of the base"]
    return [] if is_float(spec.dtype) else [f"`{module.name}`: the base has it as `{spec.dtype}`, which is no float"]


def _tensor(
    base: Source,
    i: int,
    name: str,
    dtype: str | None,
    *,
    module: str | None = None,
    instead: tuple[int, int] | None = None,
) -> BaseTensor:
    spec = base.specs[i]
    cast = dtype if dtype is not None and is_float(spec.dtype) else spec.dtype
    master = None
    if module is not None:
        master = master_of(spec, base.slots.by_param.get(base.names[i], {}), base.specs, "auto")
    made = TensorSpec(name=name, role=spec.role, dtype=cast, shape=spec.shape, aliases=spec.aliases)
    return BaseTensor(spec=made, tensor=i if master is None else master, module=module, instead=instead)


def _notes(adapters: Sequence[Adapter]) -> list[str]:
    bases = {str(a.config.document.get("base_model_name_or_path")) for a in adapters} - {"None", ""}
    out = []
    if len(bases) > 1:
        out.append(f"the adapters name different bases: {', '.join(sorted(bases))}")
    odd = {str(a.config.document.get("init_lora_weights")) for a in adapters}
    residual = sorted(name for name in odd if name.lower().startswith(("pissa", "olora", "corda")))
    if residual:
        out.append(
            f"adapters that began as {', '.join(residual)} belong to a changed base, unless they were converted when saved"
        )
    return out


def check_memory(plan: LoraPlan, memory_bytes: int | None, options: Options) -> None:
    """BudgetError when the plan takes more than is allowed."""
    needed = plan.memory_bytes(options)
    if memory_bytes is not None and needed > memory_bytes:
        raise BudgetError(
            f"this takes about {needed >> 20} MiB, and may take {memory_bytes >> 20} MiB",
            hints=("allow more with `--memory`",),
        )


def _listed(lines: Sequence[str]) -> str:
    more = [f"  and {len(lines) - MERGE_LISTED_MAX} more"] if len(lines) > MERGE_LISTED_MAX else []
    return "\n".join([*(f"  {line}" for line in lines[:MERGE_LISTED_MAX]), *more])


def check_weights(weights: Sequence[float] | None, num: int) -> list[float]:
    """One weight per adapter; equal shares when none are given."""
    if weights is None:
        return [1.0 / num] * num
    if len(weights) != num or not all(math.isfinite(one) for one in weights):
        raise InvalidInputError(f"{num} adapters have {num} finite weights, found {list(weights)}", kind="usage")
    return list(weights)
