"""Merge the trajectory of a classifier by fixed rules and by search, and compare on images that nothing was chosen by.

    python -m examples.merging.trajectory --seeds 10 --picture digits.png

For each seed: split the digits, train at a constant rate, save snapshots of the second half of the training, merge them. Weights
and snapshots are chosen by the validation part alone; what is reported is accuracy on the held-out part.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ckpt
from examples.merging import digits

State = dict[str, torch.Tensor]
EPOCHS = 16.0
BEGIN, END = "<!-- results of examples/merging/trajectory.py -->", "<!-- end of results -->"
SNAPSHOTS = 12
FIXED: dict[str, dict[str, Any]] = {
    "mean of all": {"method": "uniform"},
    "mean of last 6": {"method": "lawa", "last": 6},
    "EMA, decay 0.8": {"method": "ema", "decay": 0.8},
    "MWA by validation loss": {"method": "mwa", "by": "loss"},
}
SEARCHED: dict[str, dict[str, Any]] = {
    "greedy soup": {"driver": "greedy", "budget": 2 * SNAPSHOTS - 1},
    "CMA-ES": {"driver": "cma_es", "budget": 120},
    "LCSC": {"driver": "lcsc", "budget": 120},
    "M2N2": {"driver": "m2n2", "budget": 120},
}


def save_trajectory(folder: Path, data: digits.Digits, *, seed: int, epochs: float, num: int) -> torch.nn.Module:
    """Train, and save `num` snapshots of the second half, each with its validation loss."""
    model = digits.classifier(seed)
    last = int(epochs * len(data.train.y) / digits.BATCH)
    steps = set(np.linspace(last // 2, last, num).astype(int).tolist())
    for step in digits.train(model, data.train, epochs=epochs, seed=seed):
        if step in steps:
            found = digits.score(model, model.state_dict(), data.validation)
            metrics = {"loss": -found["log_likelihood"], "accuracy": found["accuracy"]}
            ckpt.save({"model": model}, folder, step=step, metrics=metrics)
    return model


def loaded(url: Path, step: int | None = None) -> State:
    """The tensors of a snapshot or of a merge."""
    with ckpt.open(url, step=step) as checkpoint:
        return {name.removeprefix("model/"): checkpoint[name][...] for name in checkpoint if name.startswith("model/")}


def steps_of(run: Path) -> list[int]:
    """Those that are saved."""
    return sorted(int(folder.name.removeprefix("step-")) for folder in run.glob("step-*"))


def evaluator(model: torch.nn.Module, part: digits.Part) -> Callable[[ckpt.search.Candidate], dict[str, Any]]:
    """Scores a candidate on one part."""

    def scored(candidate: ckpt.search.Candidate) -> dict[str, Any]:
        state = candidate.state_dict()
        return {**digits.score(model, state, part), "per_example": digits.by_example(model, state, part)}

    return scored


def compare(seed: int, folder: Path, *, epochs: float = EPOCHS, num: int = SNAPSHOTS) -> dict[str, float]:
    """Held-out accuracy of every way, for one seed."""
    data = digits.load(seed)
    run = folder / "run"
    model = save_trajectory(run, data, seed=seed, epochs=epochs, num=num)
    steps = steps_of(run)
    on_validation = {step: digits.score(model, loaded(run, step), data.validation) for step in steps}
    best = max(steps, key=lambda step: on_validation[step]["accuracy"])
    states = {"last snapshot": loaded(run, steps[-1]), "best snapshot by validation": loaded(run, best)}
    for name, method in FIXED.items():
        ckpt.merge(f"{run}@0..", folder / name, **method)
        states[name] = loaded(folder / name)
    for name, how in SEARCHED.items():
        objective = "accuracy" if how["driver"] == "greedy" else "log_likelihood"
        budget = 2 * num - 1 if how["driver"] == "greedy" else how["budget"]
        found = ckpt.search(
            f"{run}@0..",
            folder / name,
            evaluator=evaluator(model, data.validation),
            objective=objective,
            seed=seed,
            references=False,
            **{**how, "budget": budget},
        )
        states[name] = loaded(folder / name)
        assert digits.score(model, states[name], data.validation) == found.best.score.metrics
    return {name: digits.score(model, state, data.heldout)["accuracy"] for name, state in states.items()}


def table(results: Sequence[dict[str, float]]) -> list[str]:
    """Lines of a Markdown table: mean and standard deviation over seeds, and of the difference to the two single snapshots."""
    last, best = (np.array([r[name] for r in results]) for name in ("last snapshot", "best snapshot by validation"))
    lines = [
        "| | held-out accuracy, % | less last snapshot | less best snapshot |",
        "| --- | --- | --- | --- |",
    ]
    for name in results[0]:
        found = np.array([r[name] for r in results])
        cells = [_spread(found)]
        cells += [
            "" if name.endswith(("snapshot", "validation")) else _spread(found - one, "+") for one in (last, best)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def write_table(results: Sequence[dict[str, float]], page: Path) -> None:
    """Put the table between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    head, tail = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text("\n".join([text[:head], *table(results), text[tail:]]), encoding="utf-8")


def _spread(values: np.ndarray, sign: str = "") -> str:
    return f"{100 * values.mean():{sign}.2f} ± {100 * values.std(ddof=1) if len(values) > 1 else 0:.2f}"


def draw(results: Sequence[dict[str, float]], path: Path) -> None:
    """A dot for every seed, a bar for the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    names = list(results[0])
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        found = 100 * np.array([r[name] for r in results])
        colour = "#777777" if i < 2 else "#0b6e99" if name in FIXED else "#b3261e"
        axes.plot(found, i + rng.uniform(-0.18, 0.18, len(found)), "o", color=colour, alpha=0.45, markersize=4)
        axes.plot([found.mean()] * 2, [i - 0.32, i + 0.32], color=colour, linewidth=2.5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(100 * np.mean([r[names[1]] for r in results]), color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlabel(f"held-out accuracy, %: {len(results)} seeds, and their mean")
    axes.set_title("Digits: single snapshots, fixed rules (blue), searched on validation (red)", fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Compare, print the table; draw where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--snapshots", type=int, default=SNAPSHOTS)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--results", type=Path, help="write every figure as JSON")
    parser.add_argument("--page", type=Path, help="put the table between the marks of this page")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as folder:
            results.append(compare(seed, Path(folder), epochs=given.epochs, num=given.snapshots))
        print(seed, {name: round(value, 4) for name, value in results[-1].items()}, flush=True)
    print("\n".join(table(results)))
    if given.picture is not None:
        draw(results, given.picture)
    if given.results is not None:
        given.results.write_text(json.dumps(results, indent=1) + "\n")
    if given.page is not None:
        write_table(results, given.page)
    return results


if __name__ == "__main__":
    main()
