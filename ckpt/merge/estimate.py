"""How much memory a merge takes, and how much it reads.

In: a plan and a limit. Out: limits of one process, and figures for the user. The estimate is of resident memory, the program
itself included, and is meant never to be below what is measured (tests/merge/test_memory.py).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import psutil

from ckpt.config import MIB, Options
from ckpt.errors import BudgetError
from ckpt.merge.method import Matrix
from ckpt.merge.plan import MergePlan, TensorPlan
from ckpt.merge.reading import READS_AT_ONCE, SPANS_AHEAD
from ckpt.merge.spans import Limits, in_memory, must_be_whole, needs_pass

PROGRAM_BYTES = 128 * MIB  # of one process: the interpreter, NumPy, Arrow, indexes of a usual size
SPAN_BYTES = 64 * MIB  # of one span where memory does not matter: more makes nothing faster
SPAN_BYTES_MIN = 4 * MIB
SPANS_AT_ONCE = SPANS_AHEAD
MEMORY_FRACTION = 4  # units may take a quarter of the memory that is free, where no limit is given


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a merge takes."""

    peak_bytes: int  # resident, all processes of this machine together
    matrix_bytes: int  # of that, what a matrix method wants for its largest tensor, whatever the limit
    passes: int  # over the data, at most
    read_nbytes: int  # of tensors in sources, all passes together
    written_nbytes: int
    num_images: int


def limits_for(plan: MergePlan, memory_bytes: int | None, workers: int, options: Options) -> Limits:
    """The limits of each of `workers` processes. BudgetError when the memory is too little for any merge, or for this one."""
    limits = _limits(plan, memory_bytes, workers, options)
    whole = [tensor for tensor in plan.tensors if must_be_whole(plan, tensor)]
    if memory_bytes is None or not whole or estimate(plan, limits, workers, options).peak_bytes <= memory_bytes:
        return limits
    span = SPAN_BYTES_MIN  # whole matrices leave little for anything else
    limits = Limits(span_bytes=span, unit_bytes=span, total_bytes=SPANS_AT_ONCE * span)
    peak = estimate(plan, limits, workers, options).peak_bytes
    if peak <= memory_bytes:
        return limits
    largest = max(whole, key=functools.partial(_matrix_bytes, plan))
    raise BudgetError(
        f"`{largest.spec.name}` {list(largest.spec.shape)} must be in memory whole, which takes "
        f"{-(-_matrix_bytes(plan, largest) // MIB)} MiB; with {workers} processes the merge takes {-(-peak // MIB)} MiB, and may "
        f"take {memory_bytes // MIB} MiB",
        hints=("allow more with `--memory`, or take fewer `--workers`", "a rule can give large tensors another method"),
    )


def _limits(plan: MergePlan, memory_bytes: int | None, workers: int, options: Options) -> Limits:
    fixed = _fixed_bytes(options)
    if memory_bytes is None:
        free = int(psutil.virtual_memory().available) // MEMORY_FRACTION // workers
        return _with_units(plan, Limits(span_bytes=SPAN_BYTES, unit_bytes=max(free, SPAN_BYTES), total_bytes=0))
    parent = _parent_bytes(workers)
    each = (memory_bytes - parent) // workers - fixed
    if each < (SPANS_AT_ONCE + 1) * SPAN_BYTES_MIN:
        least = (fixed + (SPANS_AT_ONCE + 1) * SPAN_BYTES_MIN) * workers + parent
        raise BudgetError(
            f"a merge by {workers} processes takes at least {least >> 20} MiB, and may take {memory_bytes >> 20} MiB",
            hints=("allow more with `--memory`, or take fewer `--workers`",),
        )
    span = max(SPAN_BYTES_MIN, min(SPAN_BYTES, each // (SPANS_AT_ONCE + 1)))
    return _with_units(plan, Limits(span_bytes=span, unit_bytes=max(each - 2 * span, span), total_bytes=0))


def _with_units(plan: MergePlan, limits: Limits) -> Limits:
    """As much for all spans on their way as keeps the disk busy: three of the usual length, or the largest tensor that is kept
    in memory and one more."""
    largest = max((t.read_nbytes for t in plan.tensors if in_memory(plan, t, limits)), default=0)
    total = max(SPANS_AT_ONCE * limits.span_bytes, largest + limits.span_bytes)
    return dataclasses.replace(limits, total_bytes=total)


def _fixed_bytes(options: Options) -> int:
    """Of one process, whatever it merges: program, buffers of reads and writes."""
    buffers = options.write_buffers + 1  # one more in the writer
    reads = READS_AT_ONCE * min(options.read_buffer_bytes_max, 2 * options.read_threads * options.local_read_bytes_max)
    return PROGRAM_BYTES + buffers * options.chunk_bytes + reads


def _parent_bytes(workers: int) -> int:
    """Of the process that starts workers, and does nothing itself."""
    return PROGRAM_BYTES if workers > 1 else 0


def estimate(plan: MergePlan, limits: Limits, workers: int, options: Options) -> Estimate:
    """The figures of a plan."""
    matrix = max((_matrix_bytes(plan, tensor) for tensor in plan.tensors if must_be_whole(plan, tensor)), default=0)
    result = max([limits.span_bytes, *(t.spec.nbytes for t in plan.tensors if in_memory(plan, t, limits))])
    passes = range(plan.num_passes - 1)
    return Estimate(
        peak_bytes=workers * (_fixed_bytes(options) + limits.total_bytes + result + matrix) + _parent_bytes(workers),
        matrix_bytes=matrix,
        passes=plan.num_passes,
        read_nbytes=sum(t.read_nbytes for t in plan.tensors)
        + sum(t.read_nbytes for n in passes for t in plan.tensors if needs_pass(plan, t, n, limits)),
        written_nbytes=plan.written_nbytes,
        num_images=len(plan.images),
    )


def _matrix_bytes(plan: MergePlan, tensor: TensorPlan) -> int:
    """Raw elements, and what the method says that it takes."""
    if tensor.kind != "element":
        return tensor.read_nbytes
    method = plan.bounds[tensor.bound].method
    own = method.memory_bytes(tensor.spec.shape, len(tensor.with_role("x"))) if isinstance(method, Matrix) else 0
    return tensor.read_nbytes + own + tensor.spec.nbytes
