"""Scikit-learn's digits, a small classifier, and what it scores.

1,797 images of 8 x 8 pixels, written by 43 people; split into training, validation and held-out parts by a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BATCH = 16
LEARNING_RATE = 0.05


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images in [0, 1] and their digits."""

    x: torch.Tensor  # [n, 64]
    y: torch.Tensor  # [n]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Three parts that share no image."""

    train: Part
    validation: Part
    heldout: Part


def load(seed: int, *, train: float = 0.4) -> Digits:
    """Split anew by a seed, each digit in proportion; what is not for training is halved."""
    data = load_digits()
    x = np.asarray(data.data, np.float32) / 16
    first, rest = train_test_split(np.arange(len(x)), train_size=train, random_state=seed, stratify=data.target)
    second, third = train_test_split(rest, train_size=0.5, random_state=seed, stratify=data.target[rest])
    parts = [Part(x=torch.from_numpy(x[i]), y=torch.from_numpy(data.target[i])) for i in (first, second, third)]
    return Digits(train=parts[0], validation=parts[1], heldout=parts[2])


def classifier(seed: int) -> torch.nn.Sequential:
    """64 pixels, two hidden layers, 10 digits."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    )


def train(
    model: torch.nn.Module, part: Part, *, epochs: float, seed: int, rate: float = LEARNING_RATE
) -> Iterator[int]:
    """SGD at a constant rate; gives the number of each step after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, int(epochs * len(part.y) / BATCH) + 1):
        chosen = torch.randint(len(part.y), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(part.x[chosen]), part.y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step


def logits(model: torch.nn.Module, state: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What a model with these tensors says: [n, 10]."""
    return torch.func.functional_call(model, dict(state), (x,))


@torch.no_grad()
def score(model: torch.nn.Module, state: Mapping[str, torch.Tensor], part: Part) -> dict[str, float]:
    """Accuracy, and the mean log-likelihood in nats: higher is better for both."""
    found = logits(model, state, part.x)
    return {
        "accuracy": float((found.argmax(1) == part.y).float().mean()),
        "log_likelihood": -float(F.cross_entropy(found, part.y)),
    }


@torch.no_grad()
def by_example(model: torch.nn.Module, state: Mapping[str, torch.Tensor], part: Part) -> list[float]:
    """The probability of the right digit, for each image."""
    return F.softmax(logits(model, state, part.x), 1)[torch.arange(len(part.y)), part.y].tolist()
