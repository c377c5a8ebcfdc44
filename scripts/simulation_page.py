"""Make the chart and the table of docs/explanation/simulation.md: 128 to 100,000 ranks with and without a memory tier.

    python scripts/simulation_page.py

In: nothing; seeds and sizes stand below. Out: docs/explanation/simulation.png, and the table between the marks of the page. The
same program gives the same figures (`tests/docs/test_simulation_page.py` makes some of the rows again). About two minutes.
"""

from __future__ import annotations

import math
from pathlib import Path

from ckpt.simulate.cluster import Cluster, Tiers
from ckpt.simulate.run import simulate
from ckpt.simulate.search import Demand, best_policy, model_of
from ckpt.simulate.table import Row, sized

PAGE = Path(__file__).resolve().parents[1] / "docs" / "explanation" / "simulation.md"
PICTURE = PAGE.with_suffix(".png")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
SIZES = (128, 1024, 4096, 16384, 32768, 65536, 100_000)  # ranks
SCHEMES = {
    "store only": Demand(memory_every_s=math.inf),
    "copy on a peer (1 of 2)": Demand(group_size=2, parity=1),
    "coded, any 2 of 10": Demand(group_size=10, parity=2),
    "best code": Demand(),
}
DURATION_S, NUM_RUNS, SEARCH_RUNS, SEED = 30 * 86400.0, 40, 6, 0
HEAD = (
    "| ranks | fails every | scheme | memory every | store every | goodput | lost | down | node loss survived "
    "| memory per rank | network per node |\n|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def row_of(num_ranks: int, demand: Demand) -> Row:
    """One cluster of the default kind under the best policy that the demand leaves."""
    cluster, tiers = sized(Cluster(), num_ranks), Tiers()
    policy = best_policy(cluster, tiers, demand, duration_s=DURATION_S, num_runs=SEARCH_RUNS, seed=SEED)
    result = simulate(cluster, tiers, policy, duration_s=DURATION_S, num_runs=NUM_RUNS, seed=SEED)
    return Row(cluster=cluster, tiers=tiers, result=result, model=model_of(cluster, tiers, policy))


def line_of(name: str, row: Row) -> str:
    """A row of the table."""
    result, costs, memory = row.result, row.result.costs, row.result.policy.has_memory
    survival = result.node_loss_survival
    half = (result.goodput.high - result.goodput.low) / 2
    return "| " + " | ".join(
        (
            f"{row.cluster.num_ranks:,}",
            span(row.cluster.mtbf_s),
            name if name != "best code" else f"best: {row.scheme}",
            span(costs.memory_every_s) if memory else "",
            span(costs.store_every_s),
            f"{100 * result.goodput.value:.2f} ± {100 * half:.2f} %",
            f"{100 * result.lost:.2f} %",
            f"{100 * result.down:.2f} %",
            f"{100 * survival.value:.2f} % ({100 * survival.low:.2f} to {100 * survival.high:.2f})" if memory else "",
            f"{costs.memory_bytes_per_rank / 1024**3:.1f} GiB" if memory else "",
            f"{result.network_bytes_per_node_s / 1024**2:.0f} MiB/s" if memory else "",
        )
    ) + " |"  # fmt: skip


def span(seconds: float) -> str:
    """`12 s`, `4.5 min`, `3.1 h`, `15 d`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def draw(rows: dict[str, list[Row]]) -> None:
    """The chart: goodput, and the chance that the loss of a node is one too many for the memory tier."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, found), colour in zip(rows.items(), ("#888888", "#d98c21", "#1b6ca8", "#2a9d5c"), strict=True):
        ranks = [row.cluster.num_ranks for row in found]
        goodput = [row.result.goodput for row in found]
        bars = [[100 * (g.value - g.low) for g in goodput], [100 * (g.high - g.value) for g in goodput]]
        left.errorbar(
            ranks, [100 * g.value for g in goodput], yerr=bars, label=name, color=colour, marker="o", ms=4, capsize=2
        )
        if name != "store only" and name != "best code":
            lost = [row.result.node_loss_survival for row in found]
            middle = [100 * (1 - s.value) for s in lost]
            bars = [[100 * (s.high - s.value) for s in lost], [100 * (s.value - s.low) for s in lost]]
            shown = [i for i, value in enumerate(middle) if value > 0]
            right.errorbar(
                [ranks[i] for i in shown], [middle[i] for i in shown], yerr=[[b[i] for i in shown] for b in bars],
                label=f"{name}, simulated", color=colour, marker="o", ms=4, capsize=2, linestyle="none",
            )  # fmt: skip
            right.plot(ranks, [100 * model_loss(row) for row in found], label=f"{name}, closed form", color=colour)
    left.set(xscale="log", xlabel="ranks", ylabel="goodput, %", ylim=(0, 100), title="Time that is work that counts")
    right.set(
        xscale="log", yscale="log", xlabel="ranks", ylabel="%", title="Outages with nodes lost that need the store"
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=90, metadata={"Software": None})
    plt.close(figure)


def model_loss(row: Row) -> float:
    """By the closed forms, the share of the outages with nodes lost that the memory tier does not survive."""
    rates = row.cluster.rates_per_s
    return row.model.store_rate_per_s / (rates["node"] + rates["domain"] + rates["site"])


def main() -> None:
    """Simulate, write the table, draw the chart."""
    rows = {name: [row_of(size, demand) for size in SIZES] for name, demand in SCHEMES.items()}
    lines = [line_of(name, rows[name][i]) for i in range(len(SIZES)) for name in SCHEMES]
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{HEAD}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")
    draw(rows)


if __name__ == "__main__":
    main()
