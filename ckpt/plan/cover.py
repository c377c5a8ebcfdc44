"""Prove that boxes tile their tensors: every element once.

In: specs and boxes. Out: the tensors that are not tiled. Pure, no loop per box.

Method: a box is the product of its half-open ranges, so the sum over all boxes of prod_d (h_d(start) - h_d(stop)) equals
that product for the whole tensor exactly when every element is covered once, for an h that is generic. h is a 64-bit mixing
function with arithmetic modulo 2^64; a false "tiled" has a chance of about 2^-60 for boxes not built to deceive it, and the
number of elements is compared as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ckpt.format.spec import TensorSpec, global_shapes
from ckpt.layout.box import BoxTable, Int64Array
from ckpt.plan.records import corners, mix


def not_tiled(specs: Sequence[TensorSpec], boxes: BoxTable, *, seed: int = 0) -> list[tuple[int, int]]:
    """Tensors that the boxes do not tile, as (tensor index, elements covered, counted with multiplicity)."""
    shapes = global_shapes(specs, boxes.num_dims)
    zeros = np.zeros_like(shapes)
    volumes = np.array([math.prod(spec.shape) for spec in specs], np.int64)
    expected = np.where(volumes > 0, _signature(zeros, shapes, seed), np.uint64(0))
    found = np.zeros(len(specs), np.uint64)
    np.add.at(found, boxes.tensor, _signature(boxes.offsets, boxes.lengths, seed))
    covered = np.bincount(boxes.tensor, weights=boxes.volumes(), minlength=len(specs)).astype(np.int64)
    wrong = (found != expected) | (covered != volumes)
    return [(int(i), int(covered[i])) for i in np.flatnonzero(wrong)]


def not_in_order(specs: Sequence[TensorSpec], boxes: BoxTable, *, seed: int) -> list[int]:
    """Tensors whose boxes are not sorted by their first element, or overlap. Holes are not looked for.

    Args:
        boxes: sorted by tensor.
        seed: random where the boxes may have been made to deceive.
    """
    first, last = corners(specs, boxes)
    same = boxes.tensor[1:] == boxes.tensor[:-1]
    wrong = set(np.unique(boxes.tensor[1:][same & (first[1:] <= first[:-1])]).tolist())
    # A box that is one run of elements (any cut along the first dims) needs no more than a look at its neighbours.
    broken = np.zeros(len(specs), bool)
    broken[boxes.tensor[boxes.volumes() != last - first + 1]] = True
    broken[boxes.tensor[1:][same & (first[1:] <= last[:-1])]] = True
    if broken.any():
        rows = np.flatnonzero(broken[boxes.tensor])
        wrong |= {i for i, _ in not_tiled(specs, boxes.take(rows), seed=seed) if broken[i]}
    return sorted(wrong)


def _signature(offsets: Int64Array, lengths: Int64Array, seed: int) -> NDArray[np.uint64]:
    out = np.ones(len(offsets), np.uint64)
    for dim in range(offsets.shape[1]):
        salt = np.uint64((seed * 64 + dim + 1) * 0x632BE59BD9B4E019 % 2**64)
        start = offsets[:, dim].astype(np.uint64)
        stop = (offsets[:, dim] + lengths[:, dim]).astype(np.uint64)
        out *= mix(start ^ salt) - mix(stop ^ salt)
    return out
