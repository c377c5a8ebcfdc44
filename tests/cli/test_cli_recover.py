"""`ckpt recover` tells what is left where, and writes it to a store. Real agents and snapshots (tests/agent/snapshots.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.layout.files import read_layout
from tests.agent.snapshots import Cluster, Cut, cut
from tests.cli.conftest import Program

NUM_LAYERS, WIDTH = 6, 16
GROUPS = ((0, 1, 2), (3, 4, 5))
LAYOUT = f"""
version: 1
mesh: [{{pp: 3}}, {{dp: 2}}]
pipeline: {{axis: pp, layers: {NUM_LAYERS}}}
rules:
  - {{match: "embedding.weight", shard: [{{dp: 0}}], stage: first}}
  - {{match: "head.weight", shard: [{{dp: 0}}], stage: last}}
  - {{match: "layers.{{layer}}.w.weight", shard: [{{dp: 0}}]}}
  - {{match: "layers.{{layer}}.w.bias"}}
  - {{match: "layers.{{layer}}.norm.*"}}
"""


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH, dtype=torch.bfloat16)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(32, WIDTH)
        self.layers = torch.nn.ModuleList([Block() for _ in range(NUM_LAYERS)])
        self.head = torch.nn.Linear(WIDTH, 32, bias=False)


def make_state(seed: int) -> tuple[dict[str, object], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * (seed + 1))
    return {"model": model, "optimizer": optimizer, "progress": {"epoch": seed}}, optimizer


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Cut]]]:
    """A run that has steps 10 and 20, and how the six ranks of LAYOUT cut them."""
    folder = tmp_path_factory.mktemp("source")
    state, optimizer = make_state(1)
    for step in (10, 20):
        sum(p.float().square().sum() for p in state["model"].parameters()).backward()  # type: ignore[attr-defined]
        optimizer.step()
        ckpt.save(state, folder / "run", step=step, metadata={"note": "a test"})
    layout = read_layout(LAYOUT, source="test")
    return folder / "run", {step: cut(folder / "run", step, layout, folder / f"cut-{step}") for step in (10, 20)}


@pytest.fixture
def cluster(
    steps: tuple[Path, dict[int, list[Cut]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    """Six nodes that hold steps 10 and 20 of the run at `tmp_path / "run"`, whose trainers are gone; we are on node 0."""
    with Cluster(str(tmp_path / "run"), GROUPS, 1) as made:
        made.join(max(len(one.image) + len(one.receipt) for one in steps[1][20]))
        for step in (10, 20):
            made.keep(steps[1][step])
        made.leave()
        for name, value in made.nodes[0].environment().items():
            monkeypatch.setenv(name, value)
        yield made


def values(url: Path, step: int) -> dict[str, bytes]:
    with ckpt.open(url, step=step) as checkpoint:
        return {name: view[...].view(torch.uint8).numpy().tobytes() for name, view in checkpoint.items() if view.shape}


def states(document: dict, step: int) -> str:
    (one,) = (one for one in document["memory"] if one["step"] == step)
    return "".join(rank["state"][0] for rank in one["ranks"])


def test_two_lost_nodes_are_decoded_into_a_checkpoint_that_is_equal_and_verifies(
    program: Program, cluster: Cluster, steps: tuple[Path, dict[int, list[Cut]]], tmp_path: Path
) -> None:
    whole = program("recover", tmp_path / "run", "--json").document
    cluster.nodes[2].kill()
    cluster.nodes[4].kill()
    seen = program("recover", tmp_path / "run", "--json").document
    table = program("recover", tmp_path / "run").out
    made = program("recover", tmp_path / "run", "--to", tmp_path / "out", "--json")
    verified = program("verify", tmp_path / "out")

    assert (whole["recoverable"], states(whole, 20), states(whole, 10)) == (
        {"step": 20, "tier": "memory"},
        "hhhhhh",
        "hhhhhh",
    )
    assert (states(seen, 20), seen["recoverable"], seen["lost_steps"]) == ("hhdhdh", {"step": 20, "tier": "memory"}, 0)
    assert [one["rank"] for one in seen["agents"] if one["error"]] == [2, 4]
    assert "0-1, 3, 5" in table and "does not answer" in table and "nothing newer is known" in table
    assert made.code == 0 and made.document["written"]["decoded_ranks"] == [2, 4]
    assert verified.code == 0
    assert values(tmp_path / "out", 20) == values(steps[0], 20)
    state, optimizer = make_state(5)
    ckpt.load(state, tmp_path / "out")
    assert optimizer.param_groups[0]["lr"] == 1e-3 * 2 and state["progress"] == {"epoch": 1}
