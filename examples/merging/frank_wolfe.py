"""Frank-Wolfe merging (Chen et al. 2025): go towards the expert whose change points most against the gradient.

    python -m examples.merging.frank_wolfe --out merging-out

In each step: the gradient of the loss on a few labelled images at the current merge; the expert that minimises the sum over
tensors of the cosine between gradient and change; weights <- (1 - g) * weights + g * SCALE * that expert, with
g = 2 / (t + 2) * DAMP. The labelled images are those of the validation part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import ckpt
from examples.merging import digits
from examples.merging.experts import Experts, all_tasks, arguments_of, experts, report

SCALE = 1.0  # of a change that is gone towards
DAMP = 0.5
IMAGES = 100
STEPS = 20


def walk(found: Experts, *, steps: int, seed: int) -> tuple[ckpt.search.Point, list[int]]:
    """The point, and which expert each step went towards."""
    space = found.opened.space
    weights = np.zeros((space.num_groups, space.num_sources))
    generator = torch.Generator().manual_seed(seed)
    part = all_tasks(found.data.validation)
    chosen = []
    for step in range(steps):
        some = torch.randint(len(part.y), (IMAGES,), generator=generator)
        state = found.merged(space.point(weights))
        F.cross_entropy(digits.logits(found.model, state, part.x[some]), part.y[some]).backward()
        gradients = {f"model/{name}": tensor.grad for name, tensor in state.items() if tensor.grad is not None}
        source = min(range(space.num_sources), key=lambda i: cosines(found, gradients, i))
        chosen.append(source)
        share = 2 / (step + 2) * DAMP
        weights = (1 - share) * weights + share * SCALE * np.eye(space.num_sources)[source]
    return space.point(weights), chosen


def cosines(found: Experts, gradients: dict[str, torch.Tensor], source: int) -> float:
    """The sum over tensors of the cosine between gradient and change."""
    total = 0.0
    for name, gradient in gradients.items():
        change, slope = found.opened.delta(name, source).reshape(-1), gradient.double().numpy().reshape(-1)
        norm = np.linalg.norm(change) * np.linalg.norm(slope)
        total += float(change @ slope / norm) if norm > 0 else 0.0
    return total


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train experts, merge, report, and publish the merge in `<out>/frank-wolfe`."""
    given = arguments_of(__doc__, arguments)
    with experts(given.out, seed=given.seed) as found:
        point, chosen = walk(found, steps=given.steps or STEPS, seed=given.seed)
        thirds = found.opened.space.mean()
        accuracy = report(found, {"mean of the experts": thirds, "Frank-Wolfe": point})
        step = found.opened.publish(point, given.out / "frank-wolfe")
    print(np.array_str(point.array[0], precision=3), f"went towards {chosen}, step {step}")
    return {"accuracy": accuracy, "chosen": chosen, "weights": point.rows}


if __name__ == "__main__":
    main()
