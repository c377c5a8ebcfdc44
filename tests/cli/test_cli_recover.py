"""`ckpt recover` tells what is left where, and writes it to a store. Real agents and snapshots (tests/agent/snapshots.py)."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.agent.identity import places
from ckpt.agent.local import connect
from ckpt.agent.owner import Owner
from ckpt.agent.survey import Holding
from ckpt.agent.transport import Credentials, Peer
from ckpt.cli.standing import look
from ckpt.config import from_environment
from ckpt.engine.approximate import METRIC
from ckpt.errors import InvalidInputError, PeerError
from ckpt.layout.files import read_layout
from tests.agent.conftest import until
from tests.agent.snapshots import SECRET, Cluster, Cut, cut
from tests.cli.conftest import Program

NUM_LAYERS, WIDTH = 6, 16
GROUPS = ((0, 1, 2), (3, 4, 5))
NORMS = {0: 0.5, 1: 1.5, 4: 3.0, 5: 1.0}  # of gradients, by layer
PAIRS = ((0, 1), (2, 3), (4, 5))  # the two ranks of each stage
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


def with_norms(part: Cut) -> Cut:
    metrics = {METRIC.format(layer): norm for layer, norm in NORMS.items()}
    return dataclasses.replace(part, request=dataclasses.replace(part.request, metrics={"loss": 1.0, **metrics}))


@pytest.fixture
def start(
    steps: tuple[Path, dict[int, list[Cut]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Cluster]]:
    """Starts six nodes that hold steps 10 and 20 of the run at `tmp_path / "run"`, whose trainers are gone; we are on node 0."""
    made: list[Cluster] = []

    def start(
        groups: Sequence[Sequence[int]] = GROUPS, *, looking_from: int = 0, metrics: bool = False, **options: Any
    ) -> Cluster:
        cluster = Cluster(str(tmp_path / "run"), groups, 1, **options)
        made.append(cluster)
        cluster.join(max(len(one.image) + len(one.receipt) for one in steps[1][20]))
        for step in (10, 20):
            cluster.keep([with_norms(part) if metrics else part for part in steps[1][step]])
        cluster.leave()
        for name, value in cluster.nodes[looking_from].environment().items():
            monkeypatch.setenv(name, value)
        return cluster

    yield start
    for cluster in made:
        cluster.close()


def values(url: Path, step: int) -> dict[str, bytes]:
    with ckpt.open(url, step=step) as checkpoint:
        return {name: view[...].view(torch.uint8).numpy().tobytes() for name, view in checkpoint.items() if view.shape}


def states(document: dict, step: int) -> str:
    (one,) = (one for one in document["memory"] if one["step"] == step)
    return "".join(rank["state"][0] for rank in one["ranks"])


def test_two_lost_nodes_are_decoded_into_a_checkpoint_that_is_equal_and_verifies(
    program: Program, start: Callable[..., Cluster], steps: tuple[Path, dict[int, list[Cut]]], tmp_path: Path
) -> None:
    cluster = start()
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


def test_more_losses_than_parity_leave_the_store_and_what_is_lost_is_said(
    program: Program, start: Callable[..., Cluster], steps: tuple[Path, dict[int, list[Cut]]], tmp_path: Path
) -> None:
    cluster = start()
    cluster.nodes[1].kill()
    cluster.nodes[2].kill()
    nothing = program("recover", tmp_path / "run")
    refused = program("recover", tmp_path / "run", "--to", tmp_path / "out", "--json")
    assert program("copy", f"{steps[0]}@10", tmp_path / "run").code == 0
    seen = program("recover", tmp_path / "run", "--json").document
    step = program("recover", tmp_path / "run", "--step", "20", "--json")
    made = program("recover", tmp_path / "run", "--to", tmp_path / "out", "--json").document
    there = program("recover", tmp_path / "run", "--to", tmp_path / "run", "--json")

    assert (nothing.code, refused.code, step.code, there.code) == (11, 11, 11, 12)
    assert "step 20 in memory: of ranks 1-2 of 6 too little is left" in nothing.err
    assert (states(seen, 20), seen["recoverable"], seen["lost_steps"]) == ("hllhhh", {"step": 10, "tier": "store"}, 10)
    assert made["written"]["tier"] == "store" and values(tmp_path / "out", 10) == values(steps[0], 10)


def test_a_stopped_agent_and_a_flipped_bit_cost_time_and_nothing_else(
    program: Program, start: Callable[..., Cluster], steps: tuple[Path, dict[int, list[Cut]]], tmp_path: Path
) -> None:
    cluster = start(looking_from=1)
    os.kill(cluster.nodes[4].pid, signal.SIGSTOP)
    for path in cluster.nodes[0].memory.rglob("*.seg"):
        if "parity" not in str(path):
            with path.open("r+b") as file:
                file.seek(64 * 1024 + 9000)
                file.write(bytes([file.read(1)[0] ^ 1]) + b"!")
    begun = time.monotonic()
    made = program("recover", tmp_path / "run", "--to", tmp_path / "out", "--json").document
    took_s = time.monotonic() - begun

    assert states(made, 20) == "dhhhdh" and [one["rank"] for one in made["agents"] if one["error"]] == [4]
    assert values(tmp_path / "out", 20) == values(steps[0], 20)
    assert took_s < 40


def test_the_lease_does_not_end_while_somebody_holds_the_agent_and_does_after(
    program: Program, start: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = start(PAIRS, agent_lease_s=3.0)
    here, there = cluster.nodes[0], cluster.nodes[5]
    client = connect(places(here.identity, here.options).socket, here.identity, here.options, role="observer")
    credentials = Credentials(run_id=here.identity.run_id.hex, secret=SECRET, member="test")
    peer = Peer(there.address, credentials, here.options)
    left_s = client.call("hold", {"seconds": 8})[0]["lease_left_s"]
    far_s = peer.call("hold", {"seconds": 8}, deadline_s=5.0)["lease_left_s"]
    with pytest.raises(InvalidInputError):
        client.call("hold", {"seconds": 1 << 40})
    with pytest.raises(PeerError):
        peer.call("hold", {"seconds": 1 << 40}, deadline_s=5.0)
    client.close()
    peer.close()
    until(lambda: Owner.of(cluster.nodes[2].pid) is None)  # its lease was over
    held = [Owner.of(node.pid) is not None for node in (here, there)]
    until(lambda: Owner.of(here.pid) is None and Owner.of(there.pid) is None)

    assert 7 < left_s <= 8 and 7 < far_s <= 8 and held == [True, True]


def test_agents_stay_while_a_recovery_reads_however_short_their_lease(
    start: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = start(PAIRS, agent_lease_s=4.0)
    standing = look(str(tmp_path / "run"), from_environment())
    with Holding(standing.survey, from_environment()):
        time.sleep(6.0)
        alive = [Owner.of(node.pid) is not None for node in cluster.nodes]
    assert alive == [True] * 6


def rebuilt(source: Path, name: str, share: float) -> torch.Tensor:
    """What a tensor of layer 2 or 3 becomes, by the formula."""
    layer = int(name.split("layers.")[1].split(".")[0])
    with ckpt.open(source, step=20) as checkpoint:
        low, high = (checkpoint[name.replace(f"layers.{layer}.", f"layers.{n}.")][...] for n in (layer - 2, layer + 2))
    return (low.float() * share + high.float() * (1 - share)).to(low.dtype)


@pytest.mark.parametrize("weights", ["file", "metrics", "equal", "none"])
def test_a_lost_inner_stage_is_made_of_its_neighbours_and_all_else_is_as_it_was(
    program: Program,
    start: Callable[..., Cluster],
    steps: tuple[Path, dict[int, list[Cut]]],
    tmp_path: Path,
    weights: str,
) -> None:
    cluster = start(PAIRS, metrics=weights == "metrics")
    assert program("copy", f"{steps[0]}@10", tmp_path / "run").code == 0
    run = ("recover", tmp_path / "run", "--approximate", "checkfree", "--layers", "layers.{}.**", "--json")
    early = program(*run)
    cluster.nodes[2].kill()
    cluster.nodes[3].kill()
    (tmp_path / "norms.json").write_text(json.dumps(NORMS))
    given = {"file": ("--weights", tmp_path / "norms.json"), "metrics": (), "equal": ("--equal-weights",), "none": ()}[
        weights
    ]
    unasked = program("recover", tmp_path / "run", "--json").document
    dry = program(*run, *given)
    made = program(*run, *given, "--to", tmp_path / "out")
    assert (early.code, unasked["recoverable"], states(unasked, 20)) == (2, {"step": 10, "tier": "store"}, "hhllhh")
    if weights == "none":
        assert (dry.code, made.code) == (2, 2) and "gradient norm" in made.err
        return

    share = 0.5 if weights == "equal" else (0.25 + 2.25) / (0.25 + 2.25 + 9 + 1)
    assert (early.code, dry.code, made.code) == (2, 0, 0) and dry.document["approximated"]["url"] is None
    assert made.document["approximated"]["layers"] == [2, 3]
    assert made.document["approximated"]["stages"][0]["weights"][0] == pytest.approx(share)
    assert program("verify", tmp_path / "out").code == 0
    with ckpt.open(tmp_path / "out") as found, ckpt.open(steps[0], step=20) as saved:
        marked = found.manifest.metadata
        assert marked["note"] == "a test" and marked["approximate"]["layers"] == [2, 3]
        assert list(found) == list(saved)
        differing = [name for name in found if not torch.equal(found[name][...], saved[name][...])]
        assert len(differing) > 8 and all("layers.2." in name or "layers.3." in name for name in differing)
        for name in found:
            if "layers.2." in name or "layers.3." in name:
                expected = rebuilt(steps[0], name, share) if name.startswith("model/") else torch.zeros(())
                assert torch.allclose(found[name][...].float(), expected.float(), rtol=1e-2, atol=0), name
    state, optimizer = make_state(7)
    ckpt.load(state, tmp_path / "out")
    assert optimizer.param_groups[0]["lr"] == 1e-3 * 2 and state["progress"] == {"epoch": 1}


@pytest.mark.parametrize(("lost", "why"), [((0, 1), "embedding"), ((4, 5), "head"), ((2, 3, 4, 5), "head")])
def test_an_outer_stage_is_not_made_up(
    program: Program, start: Callable[..., Cluster], steps: tuple[Path, dict[int, list[Cut]]], tmp_path: Path,
    lost: tuple[int, ...], why: str,
) -> None:  # fmt: skip
    cluster = start(PAIRS, looking_from=next(rank for rank in range(6) if rank not in lost))
    assert program("copy", f"{steps[0]}@10", tmp_path / "run").code == 0
    for rank in lost:
        cluster.nodes[rank].kill()
    run = ("recover", tmp_path / "run", "--approximate", "checkfree", "--layers", "layers.{}.**", "--equal-weights")
    refused = program(*run, "--to", tmp_path / "out")
    assert refused.code == 11 and why in refused.err and not (tmp_path / "out").exists()
