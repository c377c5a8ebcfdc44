"""A base model and an expert for each way of showing the digits, saved as checkpoints: what methods that follow a gradient merge.

The base has seen images as they are, transposed, and inverted, for a short time; each expert goes on from it with one of
these, and forgets the others.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import ckpt
from examples.merging import digits

TASKS = ("plain", "transposed", "inverted")
RATE = 0.02


def shown(part: digits.Part, task: str) -> digits.Part:
    """Images as a task shows them."""
    if task == "transposed":
        return digits.Part(x=part.x.reshape(-1, 8, 8).transpose(1, 2).reshape(-1, 64), y=part.y)
    return digits.Part(x=1 - part.x if task == "inverted" else part.x, y=part.y)


def all_tasks(part: digits.Part) -> digits.Part:
    """Images as every task shows them."""
    parts = [shown(part, task) for task in TASKS]
    return digits.Part(x=torch.cat([one.x for one in parts]), y=torch.cat([one.y for one in parts]))


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The opened space of weights of changes to the base, layer by layer, and the data."""

    model: torch.nn.Module
    data: digits.Digits
    opened: ckpt.search.OpenSpace

    def accuracy(self, state: dict[str, torch.Tensor]) -> float:
        """On held-out images of all tasks."""
        return digits.score(self.model, state, all_tasks(self.data.heldout))["accuracy"]

    def merged(self, point: ckpt.search.Point) -> dict[str, torch.Tensor]:
        """The tensors of a point, ready for a gradient."""
        return {name: tensor.requires_grad_() for name, tensor in self.opened.state_dict(point).items()}


@contextlib.contextmanager
def experts(folder: Path, *, seed: int = 0, epochs: float = 6.0) -> Iterator[Experts]:
    """Train and save a base (step 0) and experts (steps 1, 2, 3), and open them.

    Args:
        epochs: of each expert.
    """
    data = digits.load(seed)
    model = digits.classifier(seed)
    for _ in digits.train(model, all_tasks(data.train), epochs=2.0, seed=seed, rate=RATE):
        pass
    ckpt.save({"model": model}, folder / "base", step=0)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, task in enumerate(TASKS, 1):
        model.load_state_dict(start)
        for _ in digits.train(model, shown(data.train, task), epochs=epochs, seed=seed + number, rate=RATE):
            pass
        ckpt.save({"model": model}, folder / "experts", step=number)
    with ckpt.search.open_space(f"{folder}/experts@1..3", base=f"{folder}/base@0", layers=3) as opened:
        yield Experts(model=model, data=data, opened=opened)


def arguments_of(text: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What every example of this folder takes."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("merging-out"), help="where checkpoints go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the method")
    torch.set_num_threads(1)
    return parser.parse_args(arguments)


def report(found: Experts, ways: dict[str, ckpt.search.Point]) -> dict[str, float]:
    """Print the held-out accuracy of points; also of the base and of each expert."""
    space = found.opened.space
    zero = space.point([0.0] * space.num_sources)
    every = {"base": zero, **{f"expert of {task} images": space.single(i) for i, task in enumerate(TASKS)}, **ways}
    accuracy = {name: found.accuracy(found.opened.state_dict(point)) for name, point in every.items()}
    for name, value in accuracy.items():
        print(f"{name:<28} {100 * value:6.2f} % of all held-out images")
    return accuracy
