"""Model Stock: how far to go from the base to the mean of fine-tunes, by the angle between them (Jang et al. 2024)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.merge.method import Needs, SourceInfo
from ckpt.merge.registry import merge_method
from ckpt.merge.spanned import Spanned


@merge_method("model_stock")
@dataclass(frozen=True, kw_only=True)
class ModelStock(Spanned):
    """The base plus `t` times the mean change, tensor by tensor: t = N c / (1 + (N - 1) c), with c the mean cosine between the
    changes of two sources. A mean cosine below 0 counts as 0: the base stays. A change that is zero has cosine 0 to all others.
    """

    @property
    def needs(self) -> Needs:
        return Needs(base=True, passes=1, scope="tensor", num_sources_min=2, weights=False)

    def weigh(self, dots: Sequence[Sequence[float]], sources: Sequence[SourceInfo]) -> list[float]:
        num = len(dots)
        pairs = list(itertools.combinations(range(num), 2))
        cosines = [_cosine(dots[i][j], dots[i][i], dots[j][j]) for i, j in pairs]
        cosine = max(0.0, math.fsum(cosines) / len(pairs))
        t = num * cosine / (1.0 + (num - 1) * cosine)
        return [t / num] * num


def _cosine(product: float, one: float, other: float) -> float:
    # The root of the product: it is exact where both are the same, so that equal sources come out as they are.
    norms = math.sqrt(one * other)
    return max(-1.0, min(1.0, product / norms)) if norms > 0.0 else 0.0
