"""Goal: a weight that was saved under two names (on two pipeline stages) loads where the two names are one tensor.

Method: save both names with equal values, load into a module that ties them.
"""

from __future__ import annotations

import pathlib

import torch

import ckpt


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(6, 4)
        self.output = torch.nn.Linear(4, 6, bias=False)
        self.output.weight = self.embedding.weight


def test_an_untied_checkpoint_loads_into_a_tied_target(tmp_path: pathlib.Path) -> None:
    weight = torch.randn(6, 4)
    ckpt.save({"model": {"embedding.weight": weight, "output.weight": weight.clone()}}, tmp_path, step=1)
    model = Tied()
    loaded = ckpt.load({"model": model}, tmp_path)

    assert torch.equal(model.output.weight, weight) and loaded.extra == ()
