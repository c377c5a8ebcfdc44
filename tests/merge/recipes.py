"""Task-vector methods as their papers and docs/explanation/task-vectors.md have them, in straightforward NumPy.

Whole models in memory as fp64, one array per tensor; no tiles, no passes, no kernels of ckpt but the reference of its random
numbers. `Model` is the change of one source, or of the result, to the base.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ckpt.kernels import merge_reference

Array = NDArray[np.float64]
Model = dict[str, Array]


def groups_of(names: Sequence[str], scope: str) -> list[list[str]]:
    """Tensors whose statistics are made together."""
    if scope == "model":
        return [list(names)]
    if scope == "tensor":
        return [[name] for name in names]
    layers: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r".*?\.[0-9]+", name)
        layers.setdefault(found[0] if found else name, []).append(name)
    return list(layers.values())


def sizes(one: Model, names: Sequence[str]) -> NDArray[np.float32]:
    """Magnitudes as they are compared."""
    return np.concatenate([np.abs(one[name]).astype(np.float32).reshape(-1) for name in names])


def ranked(one: Model, first: Callable[[int], int], last: Callable[[int], int], scope: str) -> Model:
    """What stands at the ranks `first` to `last`, 1 being the greatest magnitude; equal ones with the better of their ranks."""
    out: Model = {}
    for names in groups_of(list(one), scope):
        every = np.sort(sizes(one, names))[::-1]
        if not len(every):
            out |= {name: one[name] for name in names}
            continue
        most, least = every[first(len(every)) - 1], every[last(len(every)) - 1]
        for name in names:
            size = np.abs(one[name]).astype(np.float32)
            out[name] = np.where((size >= least) & (size <= most), one[name], 0.0)
    return out


def top_k(models: Sequence[Model], keep: float, scope: str) -> list[Model]:
    return [ranked(one, lambda n: 1, lambda n: max(1, round(keep * n)), scope) for one in models]


def band(models: Sequence[Model], keep: float, out: float, scope: str) -> list[Model]:
    return [
        ranked(one, lambda n: int(out * n) + 1, lambda n: int(out * n) + max(1, int(keep * n)), scope) for one in models
    ]


def row_band(models: Sequence[Model], keep: float, out: float) -> list[Model]:
    """By sorting every row along the last dim."""

    def of(array: Array) -> Array:
        if not array.size or not array.ndim:
            return array
        length = array.shape[-1]
        kept = min(length, max(1, int(length * keep)))
        first = min(int(length * out), length - kept)
        places = np.argsort(-np.abs(array), axis=-1)[..., first : first + kept]
        mask = np.zeros(array.shape, bool)
        np.put_along_axis(mask, places, True, axis=-1)
        return np.where(mask, array, 0.0)

    return [{name: of(array) for name, array in one.items()} for one in models]


def chance(model: Model, source: str, seed: int = 0) -> Model:
    """The random numbers that belong to a source's elements."""
    out = {}
    for name, array in model.items():
        text = f"{seed}\0{source}\0model/{name}".encode()
        numbers = np.empty(array.size)
        merge_reference.uniform(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"), 0, numbers)
        out[name] = numbers.reshape(array.shape)
    return out


def row_chances(array: Array, keep: float, spread: float) -> Array:
    """From `keep - spread` for the least of a row up to `keep + spread` for the greatest."""
    length = array.shape[-1] if array.ndim else 1
    if length < 2 or not array.size:
        return np.full(array.shape, keep)
    ranks = np.argsort(np.argsort(np.abs(array), axis=-1), axis=-1)
    return keep - spread + 2 * spread * ranks / (length - 1)


def rescaled(
    before: Sequence[Model], after: Sequence[Model], kind: str, keep: float, scope: str = "tensor"
) -> list[Model]:
    """`l1` and `l2`: as great a norm as before."""
    if kind in ("none", "inverse_keep"):
        return [{n: a / (keep if kind == "inverse_keep" else 1.0) for n, a in one.items()} for one in after]
    order = 1 if kind == "l1" else 2
    out: list[Model] = []
    for old, new in zip(before, after, strict=True):
        made: Model = {}
        for names in groups_of(list(new), scope):
            norms = [
                np.linalg.norm(np.concatenate([one[n].reshape(-1) for n in names]), order)
                if any(one[n].size for n in names)
                else 0.0
                for one in (old, new)
            ]
            factor = norms[0] / norms[1] if norms[1] > 0 else 1.0
            made |= {n: new[n] * factor for n in names}
        out.append(made)
    return out


def elected(
    models: Sequence[Model], weights: Sequence[float], *, zero: str, scope: str, by: str = "sum"
) -> list[Model]:
    """What has the sign of the (weighted) sum, or of the most sources; the rest is zero."""
    weighted = [{n: w * a for n, a in one.items()} for one, w in zip(models, weights, strict=True)]
    out: list[Model] = [{} for _ in models]
    for names in groups_of(list(models[0]), scope):
        votes = {n: sum(np.sign(one[n]) if by == "count" else one[n] for one in weighted) for n in names}
        majority = np.sign(sum(int(np.sign(votes[n]).sum()) for n in names)) or 1
        for n in names:
            at_zero = {"majority": majority, "positive": 1, "drop": 0}[zero]
            sign = np.where(votes[n] == 0, at_zero, np.sign(votes[n]))
            for made, one, heavy in zip(out, models, weighted, strict=True):
                made[n] = np.where((np.sign(heavy[n]) == sign) & (sign != 0), one[n], 0.0)
    return out


def summed(models: Sequence[Model], weights: Sequence[float]) -> Model:
    return {n: np.asarray(sum(w * one[n] for one, w in zip(models, weights, strict=True))) for n in models[0]}


def mean_of_nonzero(models: Sequence[Model], weights: Sequence[float]) -> Model:
    total = summed(models, weights)
    share = summed([{n: (a != 0).astype(float) for n, a in one.items()} for one in models], weights)
    return {n: total[n] / np.where(share[n] == 0, 1.0, share[n]) for n in total}


def greatest(models: Sequence[Model], weights: Sequence[float]) -> Model:
    out: Model = {}
    for n in models[0]:
        stacked = np.stack([w * one[n] for one, w in zip(models, weights, strict=True)])
        out[n] = np.take_along_axis(stacked, np.abs(stacked).argmax(axis=0)[None], axis=0)[0]
    return out


def aggregated(models: Sequence[Model], weights: Sequence[float], kind: str) -> Model:
    return {"mean": mean_of_nonzero, "sum": summed, "max": greatest}[kind](models, weights)


def scaled(model: Model, by: float | Callable[[str], float]) -> Model:
    return {n: a * (by(n) if callable(by) else by) for n, a in model.items()}


def tall(models: Sequence[Model], together: Model, threshold: Sequence[float], least: int) -> Model:
    """The merged change where at least so many sources need it."""
    out = {}
    for n, merged in together.items():
        needed = sum(
            (np.abs(one[n]) > t * np.abs(merged - one[n])).astype(int) for one, t in zip(models, threshold, strict=True)
        )
        out[n] = np.where(needed >= least, merged, 0.0)
    return out


def pcb(models: Sequence[Model], weights: Sequence[float], *, keep: float, clamp: float, scope: str) -> Model:
    """Intra- and inter-balancing, then the mean by score."""
    together = summed(models, [1.0] * len(models))
    out: Model = {}
    for names in groups_of(list(together), scope):
        if not any(together[n].size for n in names):
            out |= {n: together[n] for n in names}
            continue
        scores: list[Model] = []
        for one in models:
            every = np.sort(sizes(one, names)).astype(float)
            cut = min(int(len(every) * clamp), (len(every) - 1) // 2)
            low, high = every[cut], every[len(every) - 1 - cut]
            score: Model = {}
            for n in names:
                near = (
                    (np.clip(np.abs(one[n]), low, high) - low) / (high - low) if high > low else np.zeros(one[n].shape)
                )
                score[n] = np.exp(len(models) * near**2) * np.tanh(one[n] * together[n])
            flat = np.maximum(np.concatenate([score[n].reshape(-1) for n in names]), 0.0)
            least = np.sort(flat.astype(np.float32))[::-1][max(1, round(keep * len(flat))) - 1].astype(float)
            span = flat.max() - least
            scores.append(
                {n: np.clip((s - least) / span, 0.0, 1.0) if span > 0 else np.ones(s.shape) for n, s in score.items()}
            )
        for n in names:
            total = sum(w * s[n] * one[n] for one, s, w in zip(models, scores, weights, strict=True))
            out[n] = np.asarray(total / np.maximum(sum(s[n] for s in scores), 1e-12))
    return out


def ram(models: Sequence[Model], *, least: float, boost: float, boost_max: float, scope: str) -> Model:
    """Changes that one source has alone, and the mean of those that several have."""
    has = [{n: np.abs(a) > least for n, a in one.items()} for one in models]
    owners = {n: sum(one[n].astype(int) for one in has) for n in models[0]}
    out: Model = {}
    for names in groups_of(list(models[0]), scope):
        factors = []
        for one in has:
            alone = sum(int((one[n] & (owners[n] == 1)).sum()) for n in names)
            shared = sum(int((one[n] & (owners[n] > 1)).sum()) for n in names)
            factors.append(1 + boost * min(shared / alone, boost_max) if alone else 1.0)
        for n in names:
            single = sum(f * np.where(one[n], m[n], 0.0) for f, one, m in zip(factors, has, models, strict=True))
            mean = sum(np.where(one[n], m[n], 0.0) for one, m in zip(has, models, strict=True)) / np.maximum(
                owners[n], 1
            )
            out[n] = np.where(owners[n] > 1, mean, single)
    return out


def weighted_mean(models: Sequence[Model], importance: Sequence[Model]) -> Model:
    """Each element by its own weights; the plain mean where all of them are zero."""
    out: Model = {}
    for n in models[0]:
        share = np.asarray(sum(one[n] for one in importance))
        total = np.asarray(sum(p[n] * one[n] for p, one in zip(importance, models, strict=True)))
        mean = np.asarray(sum(one[n] for one in models)) / len(models)
        out[n] = np.where(share == 0, mean, total / np.where(share == 0, 1.0, share))
    return out
