"""Second moments of the gradients of each source, as its optimizer kept them: Adam's, or the factors of Adafactor.

In: the optimizer slots of a tile. Out: fp64 arrays, one per source. Every root and power is made of IEEE square roots and
products, so that the bits are the same on every processor. Pure.

    exp_avg_sq                          Adam, AdamW, LAMB, and Adafactor for vectors
    max_exp_avg_sq                      AMSGrad's; only where `moment` says so
    exp_avg_sq_row, exp_avg_sq_col      Adafactor of transformers and fairseq: means over the last dim, and over the one before it
    row_var, col_var, variance          Adafactor of torch: the same, with dims of length 1 kept; `variance` for vectors
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ckpt.config import MERGE_LISTED_MAX
from ckpt.errors import InvalidInputError
from ckpt.kernels import merge as kernels
from ckpt.merge.hyperparameters import BETA2, STEP
from ckpt.merge.method import Float64Array, SourceTensor
from ckpt.merge.tile import Tile

FULL = ("exp_avg_sq", "variance")
LARGEST = "max_exp_avg_sq"
FACTORS = (("exp_avg_sq_row", "exp_avg_sq_col"), ("row_var", "col_var"))
COUNTER = "step"
BUFFER = "buffer"  # role of tensors that no optimizer has state of

Moment = Literal["auto", "exp_avg_sq", "max_exp_avg_sq", "factors"]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Which second moments are read, and what is made of them.

    Args:
        moment: which slot; `auto` takes the full moment where there is one, else the factors.
        bias_correction: division by 1 - beta2^step, which matters where sources differ in them. `auto`: where step and beta2
            are known of every source.
        missing: what becomes of a parameter of which some source has no second moment: `error`, or `mean`: all sources count
            alike. Buffers have none, and count alike always.
    """

    hyperparameters: ClassVar[bool] = True

    moment: Moment = "auto"
    bias_correction: Literal["auto", "never"] = "auto"
    missing: Literal["error", "mean"] = "error"

    @property
    def slots(self) -> tuple[str, ...]:
        """Of the optimizer."""
        factors = tuple(slot for pair in FACTORS for slot in pair)
        chosen = {
            "auto": (*FULL, *factors),
            "exp_avg_sq": FULL,
            "max_exp_avg_sq": (LARGEST,),
            "factors": factors,
        }[self.moment]
        return (*chosen, COUNTER) if self.bias_correction != "never" else chosen

    def refuse_missing(self, found: Sequence[SourceTensor]) -> None:
        """Refuse parameters without a second moment, and those whose bias can be corrected in some sources only."""
        lacking = [one for one in found if one.tensor.role != BUFFER and not self._has_moment(one)]
        if lacking and self.missing == "error":
            raise InvalidInputError(
                f"{len(lacking)} parameters have no second moment in the optimizer state of a source:\n"
                + _listed(lacking),
                kind="no-slots",
                hints=(
                    "`missing: mean` merges such parameters with equal weights",
                    "a rule gives them another method: `rules: [{match: PATTERN, combine: {method: uniform}}]`",
                ),
            )
        if self.bias_correction == "never":
            return
        corrected: dict[str, set[bool]] = {}
        for one in found:
            if self._has_moment(one) and not _is_factored(one.slots):
                corrected.setdefault(one.tensor.name, set()).add(_knows_bias(one))
        mixed = [name for name, kinds in corrected.items() if len(kinds) > 1]
        if mixed:
            raise InvalidInputError(
                f"the bias of second moments can be corrected in some sources and not in others: of {len(mixed)} parameters, "
                f"the first `{mixed[0]}`, not every source says its step and beta2",
                kind="no-hyperparameters",
                hints=(
                    "`bias_correction: never` takes them as they are: right where all sources are far into training",
                ),
            )

    def _has_moment(self, one: SourceTensor) -> bool:
        slots = one.slots
        shape = tuple(one.tensor.shape)
        if any(slot in slots and slots[slot].shape == shape for slot in (*FULL, LARGEST)):
            return True
        return any(
            row in slots and col in slots and _are_factors(shape, slots[row].shape, slots[col].shape)
            for row, col in FACTORS
        )

    def moments(self, tile: Tile) -> list[Float64Array] | None:
        """Of each source, of the tile's shape; None when one has none."""
        out = []
        for source in range(len(tile)):
            found = self._moment(tile, source)
            if found is None:
                return None
            out.append(found)
        return out

    def _moment(self, tile: Tile, source: int) -> Float64Array | None:
        for slot in (*FULL, LARGEST):
            if slot in tile.slots and not tile.slot_is_whole(slot, source):
                full = tile.slot(slot, source)
                if full is not None:
                    return full * self._factor(tile, source)
        for row, col in FACTORS:
            if row in tile.slots:
                rows, columns = tile.slot(row, source), tile.slot(col, source)
                if rows is not None and columns is not None:
                    return _product(tile, rows, columns)
        return None

    def _factor(self, tile: Tile, source: int) -> float:
        """1 / (1 - beta2^step), or 1 where that is not known."""
        if self.bias_correction == "never" or not tile.hyperparameters:
            return 1.0
        known = tile.hyperparameters[source]
        counter = tile.slot(COUNTER, source) if COUNTER in tile.slots else None
        step = float(counter.reshape(-1)[0]) if counter is not None and counter.size == 1 else known.get(STEP)
        beta2 = known.get(BETA2)
        if step is None or beta2 is None or not step >= 1 or not 0 < beta2 < 1:
            return 1.0
        return 1.0 / (1.0 - power_of(beta2, int(step)))


def _knows_bias(one: SourceTensor) -> bool:
    known = one.hyperparameters()
    counted = COUNTER in one.slots and math.prod(one.slots[COUNTER].shape) == 1
    return BETA2 in known and (counted or STEP in known)


def _is_factored(slots: Mapping[str, object]) -> bool:
    """Adafactor's decay begins at 0: its moments have no bias. `variance` is its own for vectors."""
    return "exp_avg_sq" not in slots and LARGEST not in slots


def _are_factors(shape: tuple[int, ...], rows: tuple[int, ...], columns: tuple[int, ...]) -> bool:
    if len(shape) < 2:
        return False
    lead, height, width = shape[:-2], shape[-2], shape[-1]
    plain = rows == (*lead, height) and columns == (*lead, width)
    kept = rows == (*lead, height, 1) and columns == (*lead, 1, width)
    return plain or kept


def _product(tile: Tile, rows: Float64Array, columns: Float64Array) -> Float64Array:
    """rows x columns / mean(rows): what the factors stand for, of the elements of a tile."""
    lead, height, width = tile.shape[:-2], tile.shape[-2], tile.shape[-1]
    *places, row, column = (slice(o, o + n) for o, n in zip(tile.box.offsets, tile.box.lengths, strict=True))
    own_rows = rows.reshape(*lead, height)[tuple(places)]
    own_columns = columns.reshape(*lead, width)[(*places, column)]
    sums = [kernels.total(one) for one in own_rows.reshape(-1, height)]  # NumPy's sums differ by processor
    mean = np.array(sums).reshape(own_rows.shape[:-1]) / height
    shares = own_rows[..., row] / np.where(mean == 0.0, 1.0, mean)[..., None]
    out: Float64Array = shares[..., :, None] * own_columns[..., None, :]
    return out


def power_of(base: float, exponent: int) -> float:
    """base^exponent by products alone: libraries differ in the last bit of `pow`."""
    out, square = 1.0, base
    while exponent > 0:
        if exponent & 1:
            out *= square
        square *= square
        exponent >>= 1
    return out


def root_power(values: Float64Array, power: float) -> Float64Array:
    """values^power for a multiple of 1/8, by square roots and products."""
    eighths = round(power * 8)
    assert eighths == power * 8 and eighths >= 0
    whole, rest = divmod(eighths, 8)
    out: Float64Array | None = None
    root = values
    for bit in (4, 2, 1):
        if rest & (2 * bit - 1):
            root = np.sqrt(root)
        if rest & bit:
            out = root if out is None else out * root
    for _ in range(whole):
        out = values if out is None else out * values
    return np.ones_like(values) if out is None else out


def _listed(lacking: Sequence[SourceTensor]) -> str:
    lines = [f"  `{one.tensor.name}` of {one.source}" for one in lacking[:MERGE_LISTED_MAX]]
    more = [f"  and {len(lacking) - MERGE_LISTED_MAX} more"] if len(lacking) > MERGE_LISTED_MAX else []
    return "\n".join(lines + more)
