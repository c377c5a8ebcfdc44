"""What a delta will store of which tensor, decided before a byte of a tensor is read.

In: opened fine-tunes and their base, a method. Out: `MakePlan`, and the limits that the memory sets. Pure: reads what is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from ckpt.config import DELTA_CHUNK_ELEMENTS, MIB, Options
from ckpt.delta.methods import Method
from ckpt.delta.record import Coding
from ckpt.errors import BudgetError, InvalidInputError, MismatchError
from ckpt.format.spec import TensorSpec
from ckpt.kernels.merge import is_float
from ckpt.merge.estimate import PROGRAM_BYTES
from ckpt.merge.slots import ROLE
from ckpt.merge.sources import Opened, Source

_CHUNK_BYTES = 64  # per element of a chunk that is coded: raw, widened, and what lies between
_MORE_BYTES = 16  # per element, for each fine-tune beyond the first that is looked at beside it
_KEPT_BYTES_MAX = 1024 * MIB  # of a tensor that is kept between its passes, where no limit is given


@dataclass(frozen=True, kw_only=True)
class Want:
    """One tensor of one fine-tune."""

    task: int
    tensor: int  # id there
    spec: TensorSpec  # there
    coding: Coding
    base: int | None  # id in the base

    @property
    def payload(self) -> str:
        """Name of the tensor that holds what is coded."""
        return f"{self.task}/{self.spec.name}"


@dataclass(frozen=True, kw_only=True, eq=False)
class MakePlan:
    """A delta, decided."""

    method: Method
    opened: Opened
    base: Source
    sources: tuple[Source, ...]  # as they were named
    wants: tuple[Want, ...]  # by fine-tune, then by name
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of all tensors that come back."""
        return sum(want.spec.nbytes for want in self.wants)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the memory allows."""

    ahead: int  # chunks under way
    kept_bytes: int  # of a tensor between its passes


def make_plan(opened: Opened, method: Method, *, keep_optimizer: bool) -> MakePlan:
    """Decide.

    Raises:
        InvalidInputError: several fine-tunes for a method of one.
        MismatchError: a fine-tune that has no tensor in common with the base.
    """
    base = opened.base
    assert base is not None
    sources = tuple(sorted(opened.sources, key=lambda source: source.place))
    if len(sources) > 1 and not method.several:
        raise InvalidInputError(
            f"method `{method.name}` stores one fine-tune, found {len(sources)}",
            kind="wrong-number",
            hints=("make one delta of each, or `--method tall` for all of them together",),
        )
    wants = [
        _want(task, source, i, base, method)
        for task, source in enumerate(sources)
        for i, spec in enumerate(source.specs)
        if keep_optimizer or not spec.role.startswith(ROLE)
    ]
    for task, source in enumerate(sources):
        if not any(want.base is not None for want in wants if want.task == task):
            raise MismatchError(
                f"{source.label} and the base {base.label} have no tensor of one name, shape and dtype in common",
                kind="nothing-in-common",
                hints=(
                    f"`ckpt tensors {base.url}` lists those of the base",
                    "is this the base that it was tuned from?",
                ),
            )
    return MakePlan(
        method=method,
        opened=opened,
        base=base,
        sources=sources,
        wants=tuple(wants),
        notes=tuple(_notes(wants, sources, method, keep_optimizer)),
    )


def _want(task: int, source: Source, tensor: int, base: Source, method: Method) -> Want:
    spec = source.specs[tensor]
    names = (source.names[tensor], *source.aliases(tensor))
    found = next((base.ids[name] for name in names if name in base.ids), None)
    coding: Coding = "planes"
    if found is not None:
        other = base.specs[found]
        both = is_float(spec.dtype) and is_float(other.dtype) and not spec.role.startswith(ROLE)
        if other.shape != spec.shape:
            found = None
        elif both and method.is_lossy:
            coding = method.coding
        elif other.dtype != spec.dtype:
            found = None
    return Want(task=task, tensor=tensor, spec=spec, coding=coding, base=found)


def _notes(wants: Sequence[Want], sources: Sequence[Source], method: Method, keep_optimizer: bool) -> list[str]:
    out = []
    alone = [want for want in wants if want.base is None and want.spec.nbytes]
    if alone:
        nbytes = sum(want.spec.nbytes for want in alone)
        out.append(
            f"{len(alone)} tensors of {nbytes:,} bytes are not in the base in the same form: they are stored whole, bit for bit"
        )
    whole = [w for w in wants if w.coding == "planes" and w.base is not None]
    if method.is_lossy and whole:
        out.append(f"{len(whole)} tensors are no floating-point parameters or buffers: they are stored bit for bit")
    if not keep_optimizer and any(spec.role.startswith(ROLE) for one in sources for spec in one.specs):
        out.append("optimizer state is left out; `--optimizer keep` stores it bit for bit")
    return out


def limits_for(memory_bytes: int | None, num_at_once: int, options: Options) -> Limits:
    """What may be under way. BudgetError when the memory is too little for one chunk.

    Args:
        num_at_once: fine-tunes that are looked at side by side.
    """
    chunk = DELTA_CHUNK_ELEMENTS * (_CHUNK_BYTES + _MORE_BYTES * (num_at_once - 1))
    if memory_bytes is None:
        free = int(psutil.virtual_memory().available) // 4
        return Limits(ahead=options.copy_threads, kept_bytes=min(free, _KEPT_BYTES_MAX))
    fixed = PROGRAM_BYTES + (options.write_buffers + 1) * options.chunk_bytes
    left = memory_bytes - fixed
    if left < 2 * chunk:
        raise BudgetError(
            f"this takes at least {(fixed + 2 * chunk) >> 20} MiB, and may take {memory_bytes >> 20} MiB",
            hints=("allow more with `--memory`",),
        )
    ahead = max(1, min(options.copy_threads, left // chunk - 1))
    return Limits(ahead=ahead, kept_bytes=max(0, left - (ahead + 1) * chunk))
