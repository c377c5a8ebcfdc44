"""Merge the factors of one module: concatenation, its best approximation, clusters of ranks, means of factors.

In: the factors of several adapters in fp64, with the share that each product has. Out: the factors of one adapter. Pure. What is
merged is the weighted sum of the products, `sum(share * B @ A)`; how far a result is from it can be measured without ever making
a product.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError

Array = NDArray[np.float64]

_ROUNDS_MAX = 100  # of k-means; it ends when nothing moves


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One adapter's share of a module."""

    a: Array  # [rank, in]
    b: Array  # [out, rank]
    scaling: float  # of its product
    weight: float  # of the adapter

    @property
    def share(self) -> float:
        return self.weight * self.scaling

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True, kw_only=True, eq=False)
class Low:
    """Factors of the result; its product is `scaling * b @ a`."""

    a: Array
    b: Array
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.a)


def concat(parts: Sequence[Part]) -> Low:
    """Exactly the weighted sum, at the sum of the ranks.

    Where all shares are equal the factors stay as they are, to the bit, and the share is the scaling; else each B takes its own.
    """
    shares = {part.share for part in parts}
    common = shares.pop() if len(shares) == 1 else None
    return Low(
        a=np.concatenate([part.a for part in parts]),
        b=np.concatenate([part.b if common is not None else part.share * part.b for part in parts], axis=1),
        scaling=1.0 if common is None else common,
    )


def svd(parts: Sequence[Part], rank: int) -> Low:
    """The weighted sum's best approximation of a rank, in the Frobenius norm: the singular vectors of the product, by way of the
    QR decompositions of both stacks (the product itself is never made)."""
    whole = concat(parts)
    left, middle_left = np.linalg.qr(whole.scaling * whole.b)
    right, middle_right = np.linalg.qr(whole.a.T)
    u, s, vt = np.linalg.svd(middle_left @ middle_right.T)
    kept = min(rank, len(s))
    root = np.sqrt(s[:kept])
    b, a = (left @ u[:, :kept]) * root, (root[:, None] * vt[:kept]) @ right.T
    signs = np.sign(
        b[np.abs(b).argmax(axis=0), range(kept)]
    )  # of vectors a sign is free: the greatest element of B is positive
    signs[signs == 0] = 1.0
    return Low(a=a * signs[:, None], b=b * signs, scaling=1.0)


def lego(parts: Sequence[Part], num: int, *, seed: int, name: str) -> Low:
    """Cluster the ranks of all adapters (LoRA-LEGO, Zhao et al. 2024): a row of A and its column of B are one unit.

    Units are clustered by k-means; each centroid gets the mean norm of its members and becomes a rank of the result, whose
    scaling is sqrt(rank / num), with the mean rank of the adapters. Weights count as the numbers of units. Random starts follow
    from `seed` and `name`.
    """
    if min(part.weight for part in parts) < 0:
        raise InvalidInputError("method `lego` takes no negative weights: they count members of clusters", kind="usage")
    units = np.concatenate([_units(part) for part in parts])
    weights = np.concatenate([np.full(part.rank, part.weight) for part in parts])
    total = math.fsum(part.weight for part in parts)
    num = min(num, int(np.count_nonzero(weights)))
    centroids, members = _k_means(units, weights, num, _random(seed, name))
    norms = np.linalg.norm(units, axis=1)
    for cluster in range(num):
        of = members == cluster
        length = np.linalg.norm(centroids[cluster])
        if length > 0 and weights[of].sum() > 0:
            centroids[cluster] *= np.average(norms[of], weights=weights[of]) / length
    columns = parts[0].a.shape[1]
    rank = math.fsum(part.weight * part.rank for part in parts) / total if total else 0.0
    return Low(a=centroids[:, :columns], b=centroids[:, columns:].T, scaling=total * math.sqrt(rank / num))


def _units(part: Part) -> Array:
    """[rank, in + out]; the scaling goes to both factors alike."""
    root = math.sqrt(abs(part.scaling))
    return np.concatenate([root * part.a, math.copysign(root, part.scaling) * part.b.T], axis=1)


def _random(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"ckpt.lora/1\0{seed}\0{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _k_means(units: Array, weights: Array, num: int, rng: np.random.Generator) -> tuple[Array, NDArray[np.int64]]:
    """Centroids, and the cluster of each unit. Starts as k-means++ does."""
    centroids = units[[_pick(weights, rng)]]
    while len(centroids) < num:
        nearest = _distances(units, centroids).min(axis=1)
        chance = weights * nearest
        centroids = np.concatenate([centroids, units[[_pick(chance if chance.sum() > 0 else weights, rng)]]])
    members = np.full(len(units), -1)
    for _ in range(_ROUNDS_MAX):
        distances = _distances(units, centroids)
        found = distances.argmin(axis=1)
        for cluster in range(num):
            if not weights[found == cluster].sum() > 0:  # nobody's: it takes the unit that is farthest from its own
                far = int((distances[range(len(units)), found] * (weights > 0)).argmax())
                found[far] = cluster
                distances[far, :] = 0.0
        if (found == members).all():
            break
        members = found
        for cluster in range(num):
            of = (members == cluster) & (weights > 0)
            if of.any():
                centroids[cluster] = np.average(units[of], axis=0, weights=weights[of])
    return centroids, members


def _pick(chance: Array, rng: np.random.Generator) -> int:
    edges = np.cumsum(chance)
    return int(min(np.searchsorted(edges, rng.random() * edges[-1], side="right"), len(chance) - 1))


def _distances(units: Array, centroids: Array) -> Array:
    """[units, centroids] squares, none below zero."""
    squares = (units**2).sum(axis=1)[:, None] - 2 * units @ centroids.T + (centroids**2).sum(axis=1)
    return np.asarray(np.maximum(squares, 0.0))


def shared_side(parts: Sequence[Part]) -> str | None:
    """The factor that all parts have in common, to the bit: "A" or "B"; None: they differ in both."""
    first = parts[0]
    if all(part.a.shape == first.a.shape and (part.a == first.a).all() for part in parts):
        return "A"
    if all(part.b.shape == first.b.shape and (part.b == first.b).all() for part in parts):
        return "B"
    return None


def factors(parts: Sequence[Part]) -> Low:
    """The weighted sum of the factor in which the adapters differ, beside the one that they share: exactly the weighted sum of
    the products, at the rank of one. Only right where `shared_side` finds one."""
    side = shared_side(parts)
    assert side is not None
    scalings = {part.scaling for part in parts}
    scaling = scalings.pop() if len(scalings) == 1 else None
    by = [part.weight if scaling is not None else part.share for part in parts]
    total = sum(w * (part.b if side == "A" else part.a) for w, part in zip(by, parts, strict=True))
    first = parts[0]
    return Low(
        a=first.a if side == "A" else np.asarray(total),
        b=np.asarray(total) if side == "A" else first.b,
        scaling=1.0 if scaling is None else scaling,
    )


def means_of_both(parts: Sequence[Part]) -> Low:
    """What averaging both factors by themselves would give: to say how far off it is."""
    scaling = parts[0].scaling
    total = math.fsum(part.weight for part in parts) or 1.0
    a = sum(part.weight / total * part.a for part in parts)
    b = sum(part.weight / total * part.scaling / scaling * part.b for part in parts)
    return Low(a=np.asarray(a), b=np.asarray(b), scaling=scaling * total)


def relative_error(parts: Sequence[Part], low: Low) -> float:
    """The Frobenius norm of what the result's product is off by, over that of the weighted sum."""
    whole = concat(parts)
    b = np.concatenate([whole.scaling * whole.b, -low.scaling * low.b], axis=1)
    off = _norm(b, np.concatenate([whole.a, low.a]))
    norm = _norm(whole.scaling * whole.b, whole.a)
    return off / norm if norm else (math.inf if off else 0.0)


def _norm(b: Array, a: Array) -> float:
    """Of b @ a."""
    left, right = np.linalg.qr(b)[1], np.linalg.qr(a.T)[1]
    return float(np.linalg.norm(left @ right.T))
