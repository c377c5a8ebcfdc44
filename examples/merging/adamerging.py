"""AdaMerging (Yang et al. 2024): learn layer-wise merge coefficients from images without labels, by the entropy of predictions.

    python -m examples.merging.adamerging --out merging-out

Coefficients begin at 0.3 and are kept in [0, 1]; Adam follows the gradient of the mean entropy, which `pull_back` makes from the
gradient by the merged tensors, so no graph goes through the merge. The unlabelled images are those of the validation part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import ckpt
from examples.merging import digits
from examples.merging.experts import Experts, all_tasks, arguments_of, experts, report

START = 0.3
RATE = 1e-3  # of Adam, as in the paper
BATCH = 64
STEPS = 120


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Mean over images, in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def learn(found: Experts, *, steps: int, seed: int) -> tuple[ckpt.search.Point, list[float]]:
    """The point, and the entropy on all unlabelled images before and after."""
    space = found.opened.space
    weights = torch.full((space.num_groups, space.num_sources), START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    images = all_tasks(found.data.validation).x
    before = _entropy_of(found, space.point(weights.detach().numpy()), images)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        state = found.merged(space.point(weights.detach().numpy()))
        entropy(digits.logits(found.model, state, batch)).backward()
        gradients = {f"model/{name}": tensor.grad for name, tensor in state.items()}
        weights.grad = torch.from_numpy(found.opened.pull_back(gradients))
        optimizer.step()
        with torch.no_grad():
            weights.clamp_(0.0, 1.0)
    point = space.point(weights.detach().numpy())
    return point, [before, _entropy_of(found, point, images)]


@torch.no_grad()
def _entropy_of(found: Experts, point: ckpt.search.Point, images: torch.Tensor) -> float:
    return float(entropy(digits.logits(found.model, found.opened.state_dict(point), images)))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train experts, learn, report, and publish the merge in `<out>/adamerging`."""
    given = arguments_of(__doc__, arguments)
    with experts(given.out, seed=given.seed) as found:
        start = found.opened.space.point([START] * found.opened.space.num_sources)
        point, entropies = learn(found, steps=given.steps or STEPS, seed=given.seed)
        accuracy = report(found, {f"Task Arithmetic, {START}": start, "AdaMerging": point})
        step = found.opened.publish(point, given.out / "adamerging")
    print(np.array_str(point.array, precision=3), f"entropy {entropies[0]:.3f} -> {entropies[1]:.3f}, step {step}")
    return {"accuracy": accuracy, "entropy": entropies, "weights": point.rows}


if __name__ == "__main__":
    main()
