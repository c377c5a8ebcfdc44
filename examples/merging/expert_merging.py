"""Expert Merging (Zhang et al. 2025): learn layer-wise coefficients by which the merged model agrees with each expert.

    python -m examples.merging.expert_merging --out merging-out

On a few images of an expert's own task, without labels, hidden layers and outputs of the merged model are drawn to the
expert's; a penalty keeps coefficients near their start. The paper's weighting of layers by importance ("++") is left out. The
images are those of the validation part; which expert an image is for is known, its label is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import ckpt
from examples.merging import digits
from examples.merging.experts import TASKS, Experts, arguments_of, experts, report, shown

START = 1 / 3
RATE = 0.02  # of Adam
IMAGES = 32  # of each expert, in a step
KEEP = 0.01  # the penalty on the square of what a coefficient has moved
STEPS = 120
State = dict[str, torch.Tensor]


def hidden(model: torch.nn.Module, state: State, x: torch.Tensor) -> list[torch.Tensor]:
    """What every linear layer gives."""
    out: list[torch.Tensor] = []
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    hooks = [layer.register_forward_hook(lambda layer, given, made: out.append(made)) for layer in layers]
    try:
        digits.logits(model, state, x)
    finally:
        for hook in hooks:
            hook.remove()
    return out


def disagreement(model: torch.nn.Module, merged: State, expert: State, x: torch.Tensor) -> torch.Tensor:
    """Relative square difference of hidden layers, and the divergence of the outputs."""
    with torch.no_grad():
        wanted = hidden(model, expert, x)
    made = hidden(model, merged, x)
    apart = [F.mse_loss(a, b) / b.square().mean() for a, b in zip(made[:-1], wanted[:-1], strict=True)]
    last = F.kl_div(made[-1].log_softmax(1), wanted[-1].log_softmax(1), log_target=True, reduction="batchmean")
    return torch.stack(apart).mean() + last


def learn(found: Experts, *, steps: int, seed: int) -> tuple[ckpt.search.Point, list[float]]:
    """The point, and the disagreement on all images before and after."""
    space = found.opened.space
    weights = torch.full((space.num_groups, space.num_sources), START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    own = [shown(found.data.validation, task).x for task in TASKS]
    states = [found.opened.state_dict(space.single(i)) for i in range(space.num_sources)]

    def total(merged: State, images: Sequence[torch.Tensor]) -> torch.Tensor:
        return sum(
            (disagreement(found.model, merged, s, x) for s, x in zip(states, images, strict=True)), torch.zeros(())
        )

    before = float(total(found.opened.state_dict(space.point(weights.detach().numpy())), own))
    for _ in range(steps):
        images = [x[torch.randint(len(x), (IMAGES,), generator=generator)] for x in own]
        state = found.merged(space.point(weights.detach().numpy()))
        total(state, images).backward()
        gradients = {f"model/{name}": tensor.grad for name, tensor in state.items()}
        weights.grad = torch.from_numpy(found.opened.pull_back(gradients)) + 2 * KEEP * (weights.detach() - START)
        optimizer.step()
    point = space.point(weights.detach().numpy())
    return point, [before, float(total(found.opened.state_dict(point), own))]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train experts, learn, report, and publish the merge in `<out>/expert-merging`."""
    given = arguments_of(__doc__, arguments)
    with experts(given.out, seed=given.seed) as found:
        point, apart = learn(found, steps=given.steps or STEPS, seed=given.seed)
        accuracy = report(found, {"mean of the experts": found.opened.space.mean(), "Expert Merging": point})
        step = found.opened.publish(point, given.out / "expert-merging")
    print(np.array_str(point.array, precision=3), f"disagreement {apart[0]:.3f} -> {apart[1]:.3f}, step {step}")
    return {"accuracy": accuracy, "disagreement": apart, "weights": point.rows}


if __name__ == "__main__":
    main()
