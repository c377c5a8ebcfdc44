"""Stages that choose which elements of each source's change take part.

In: the changes of one tile. Out: masks. A share is of all elements of the scope, in each source by itself. Magnitudes are
compared as float32; equal ones share their fate. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.merge import thresholds
from ckpt.merge.method import Constants, Context, Float64Array, Scope, SourceTensor, Summary
from ckpt.merge.stages.moments import Moments
from ckpt.merge.stages.stage import Mask, Stage, Work, of_arrays, stage

Float32Array = NDArray[np.float32]


def share_of(name: str, value: float, *, least: float = 0.0) -> None:
    """Refuse what is no share: `least` < value <= 1."""
    if not least < value <= 1:
        raise InvalidInputError(f"`{name}` must be above {least:g} and at most 1, found {value}")


def sizes_of(values: Float64Array) -> Float32Array:
    """Magnitudes as they are compared."""
    with np.errstate(over="ignore"):
        return np.abs(values).astype(np.float32)


def as_sizes(bits: NDArray[np.uint32]) -> Float32Array:
    """Thresholds out of their bits."""
    return bits.view(np.float32)


@stage("sparsify", "top_k")
@dataclass(frozen=True, kw_only=True)
class TopK(Stage):
    """The greatest magnitudes (TIES).

    Args:
        keep: share of the elements that is kept.
        scope: what this share is of: the whole model, a layer, or each tensor.
    """

    keep: float = 0.2
    scope: Scope = "model"

    def __post_init__(self) -> None:
        share_of("keep", self.keep)

    @property
    def passes(self) -> int:
        return thresholds.PASSES

    def observe(self, work: Work, number: int, constants: Constants) -> Summary:
        return thresholds.counted(work.raw(), number, constants, threads=work.tile.threads)

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        return thresholds.resolved(number, summary, constants, lambda count: [thresholds.rank_of(self.keep, count)])

    def apply(self, work: Work, constants: Constants) -> None:
        for source, least in enumerate(as_sizes(constants["bits"][0])):
            work.keep(source, sizes_of(work.values[source]) >= least)
            work.share[source] = work.share[source] * self.keep


@stage("sparsify", "band")
@dataclass(frozen=True, kw_only=True)
class Band(Stage):
    """Great magnitudes but for the very greatest (Breadcrumbs, of whole tensors or of the model).

    Args:
        keep: share of the elements that is kept, after
        out: the share, of the greatest, that is left out.
        scope: what these shares are of.
    """

    keep: float = 0.9
    out: float = 0.01
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        _check_band(self.keep, self.out)

    @property
    def passes(self) -> int:
        return thresholds.PASSES

    def observe(self, work: Work, number: int, constants: Constants) -> Summary:
        return thresholds.counted(work.raw(), number, constants, threads=work.tile.threads)

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        return thresholds.resolved(number, summary, constants, lambda count: _band(count, self.keep, self.out))

    def apply(self, work: Work, constants: Constants) -> None:
        most, least = (as_sizes(bits) for bits in constants["bits"])
        for source in range(len(work)):
            sizes = sizes_of(work.values[source])
            work.keep(source, (sizes <= most[source]) & (sizes >= least[source]))
            work.share[source] = work.share[source] * self.keep


@stage("sparsify", "row_band")
@dataclass(frozen=True, kw_only=True)
class RowBand(Stage):
    """Great magnitudes but for the very greatest, in each row: along the last dim (Breadcrumbs as published).

    Args:
        keep: share of a row that is kept, after
        out: the share, of its greatest, that is left out.
    """

    keep: float = 0.15
    out: float = 0.006
    unit = "row"

    def __post_init__(self) -> None:
        _check_band(self.keep, self.out)

    def apply(self, work: Work, constants: Constants) -> None:
        for source in range(len(work)):
            sizes = sizes_of(work.values[source])
            if not sizes.shape or not sizes.shape[-1]:
                continue  # a scalar has no rows, and is left as it is
            first, last = _band(sizes.shape[-1], self.keep, self.out)
            places = [sizes.shape[-1] - first, sizes.shape[-1] - last]  # ascending
            ends = np.partition(sizes, sorted(set(places)), axis=-1)
            most, least = ends[..., places[0], None], ends[..., places[1], None]
            work.keep(source, (sizes <= most) & (sizes >= least))
            work.share[source] = work.share[source] * self.keep


def _check_band(keep: float, out: float) -> None:
    share_of("keep", keep)
    if not 0 <= out < 1 or keep + out > 1 + 1e-12:
        raise InvalidInputError(f"`out` must be 0 to 1, and with `keep` at most 1; found {out} and {keep}")


def _band(count: int, keep: float, out: float) -> list[int]:
    """Ranks of the greatest and the least element that is kept. At least one is, whatever the shares come to."""
    num_kept = min(max(1, int(count * keep)), max(count, 1))
    first = min(int(count * out), max(count - num_kept, 0)) + 1
    return [first, first + num_kept - 1]


@stage("sparsify", "random")
@dataclass(frozen=True, kw_only=True)
class Random(Stage):
    """Elements by chance, in each source by itself (DARE). The numbers are those of the elements, by the recipe's seed.

    Args:
        keep: the chance of an element.
    """

    keep: float = 0.1

    def __post_init__(self) -> None:
        share_of("keep", self.keep)

    def apply(self, work: Work, constants: Constants) -> None:
        for source in range(len(work)):
            work.keep(source, work.tile.uniform(source) < self.keep)
            work.share[source] = work.share[source] * self.keep


@stage("sparsify", "row_random")
@dataclass(frozen=True, kw_only=True)
class RowRandom(Stage):
    """Elements by a chance that rises with the rank of their magnitude in their row, along the last dim (DELLA).

    Args:
        keep: the mean chance.
        spread: the least of a row has the chance `keep - spread`, the greatest `keep + spread`.
    """

    keep: float = 0.3
    spread: float = 0.15
    unit = "row"

    def __post_init__(self) -> None:
        share_of("keep", self.keep)
        if not 0 <= self.spread <= min(self.keep, 1 - self.keep) + 1e-12 or self.spread == self.keep:
            raise InvalidInputError(
                f"`spread` must leave every chance above 0 and at most 1: below {min(self.keep, 1 - self.keep):g}, found "
                f"{self.spread}"
            )

    def apply(self, work: Work, constants: Constants) -> None:
        for source in range(len(work)):
            chance = self._chances(sizes_of(work.values[source]))
            work.keep(source, work.tile.uniform(source) < chance)
            work.share[source] = work.share[source] * chance

    def _chances(self, sizes: Float32Array) -> Float64Array:
        length = sizes.shape[-1] if sizes.shape else 1
        if length < 2:
            return np.full(sizes.shape, self.keep)
        order = _ranked(sizes)
        chances = (self.keep - self.spread) + (2 * self.spread) * (np.arange(length) / (length - 1))
        out = np.empty(sizes.shape)
        np.put_along_axis(out, order, np.broadcast_to(chances, sizes.shape), axis=-1)
        return out


def _ranked(sizes: Float32Array) -> NDArray[np.int64]:
    """Places in each row, the least magnitude first; of equal ones the first is the lesser.

    A sort of whole numbers, magnitude above place: NumPy has no stable sort of floats that is nearly as fast.
    """
    keys = sizes.view(np.uint32).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(sizes.shape[-1], dtype=np.uint64)
    keys.sort(axis=-1)
    keys &= np.uint64(0xFFFFFFFF)
    return keys.view(np.int64)


@stage("sparsify", "threshold")
@dataclass(frozen=True, kw_only=True)
class Threshold(Stage):
    """Magnitudes of at least a given size.

    Args:
        least: that size.
    """

    least: float

    def __post_init__(self) -> None:
        if self.least < 0:
            raise InvalidInputError(f"`least` must be at least 0, found {self.least}")

    def apply(self, work: Work, constants: Constants) -> None:
        for source in range(len(work)):
            work.keep(source, np.abs(work.values[source]) >= self.least)


@stage("sparsify", "saliency")
@dataclass(frozen=True, kw_only=True)
class Saliency(Moments, Stage):
    """Elements whose change matters: v * change^2, with the second moment v of the source's own optimizer (FFG).

    Tensors of which a source has no second moment (buffers; others only with `missing: mean`) are kept whole.

    Args:
        keep: share of the elements that is kept, those of the greatest saliency; or
        least: the least saliency that is kept.
        scope: what the share is of.
    """

    keep: float | None = None
    least: float | None = None
    scope: Scope = "model"

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.least is None):
            raise InvalidInputError(f"{self.title} has either `keep` or `least`")
        if self.keep is not None:
            share_of("keep", self.keep)
        if self.least is not None and self.least < 0:
            raise InvalidInputError(f"`least` must be at least 0, found {self.least}")

    @property
    def passes(self) -> int:
        return 0 if self.keep is None else thresholds.PASSES

    def check_tensors(self, context: Context, found: Sequence[SourceTensor]) -> None:
        self.refuse_missing(found)

    def observe(self, work: Work, number: int, constants: Constants) -> Summary:
        roots = self._roots(work)
        if roots is None:
            return Summary()
        return thresholds.counted(of_arrays(roots), number, constants, threads=work.tile.threads)

    def resolve(self, number: int, summary: Summary, constants: Constants, context: Context) -> Constants:
        keep = self.keep
        assert keep is not None
        if not summary.sums:
            return {}
        return thresholds.resolved(number, summary, constants, lambda count: [thresholds.rank_of(keep, count)])

    def apply(self, work: Work, constants: Constants) -> None:
        roots = self._roots(work)
        if roots is None:
            return
        for source, root in enumerate(roots):
            work.keep(source, self._mask(root, source, constants))

    def _mask(self, root: Float64Array, source: int, constants: Constants) -> Mask:
        if self.least is not None:
            enough: Mask = root * root >= self.least
            return enough
        reached: Mask = sizes_of(root) >= as_sizes(constants["bits"][0])[source]
        return reached

    def _roots(self, work: Work) -> list[Float64Array] | None:
        """Square roots of saliencies, which float32 has the range for; None: of a tensor without moments."""
        found = self.moments(work.tile)
        if found is None:
            return None
        return [np.sqrt(v) * np.abs(values) for v, values in zip(found, work.values, strict=True)]
