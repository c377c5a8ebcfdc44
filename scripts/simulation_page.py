"""Make the chart and the table of docs/explanation/simulation.md: 128 to 100,000 ranks with and without a memory tier.

    python scripts/simulation_page.py

In: nothing; seeds and sizes stand below. Out: docs/explanation/simulation.png, and the table between the marks of the page. The
same program gives the same figures (`tests/docs/test_simulation_page.py` makes some of the rows again). About a minute.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from ckpt.simulate import closed
from ckpt.simulate.cluster import Cluster, Policy, Tiers, costs_of
from ckpt.simulate.run import Result, simulate
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
GROUPS = ((5, 1), (2, 1), (10, 2), (12, 3))  # of the chart on the right
CHANCES = (0.002, 0.005, 0.01, 0.02, 0.04)
COLOURS = ("#888888", "#d98c21", "#1b6ca8", "#2a9d5c")
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


def survival(size: int, parity: int, chance: float) -> Result:
    """One group whose nodes are lost with this chance each while a lost share is missing; about 12,000 losses."""
    tiers = Tiers(image_bytes=1, network_bytes_per_s=0.1, code_bytes_per_s=1, memory_bytes_per_s=1e9, slowdown=0)
    policy = Policy(memory_every_s=100, store_every_s=1e6, group_size=size, parity=parity)
    cluster = Cluster(
        num_nodes=size, ranks_per_node=1, nodes_per_domain=1, replace_s=1000,
        trainer_mtbf_s=math.inf, domain_mtbf_s=math.inf, site_mtbf_s=math.inf,
    )  # fmt: skip
    costs = costs_of(cluster, tiers, policy)
    window_s = cluster.detect_s + cluster.replace_s + costs.decode_s + costs.rebuild_s
    cluster = dataclasses.replace(cluster, node_mtbf_s=-window_s / math.log1p(-chance))
    return simulate(cluster, tiers, policy, duration_s=1200 * cluster.node_mtbf_s / size, num_runs=10, seed=SEED)


def draw(rows: dict[str, list[Row]]) -> None:
    """The chart: goodput, and the chance that the loss of a node is one too many for the memory tier."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, found), colour in zip(rows.items(), COLOURS, strict=True):
        ranks = [row.cluster.num_ranks for row in found]
        goodput = [row.result.goodput for row in found]
        bars = [[100 * (g.value - g.low) for g in goodput], [100 * (g.high - g.value) for g in goodput]]
        middle = [100 * g.value for g in goodput]
        left.errorbar(ranks, middle, yerr=bars, label=name, color=colour, marker="o", ms=4, capsize=2)
    left.set(xscale="log", xlabel="ranks", ylabel="goodput, %", ylim=(0, 100), title="Time that is work which counts")
    for (size, parity), colour in zip(GROUPS, COLOURS, strict=True):
        shares = [(p, survival(size, parity, p).node_loss_survival) for p in CHANCES]
        shares = [(p, share) for p, share in shares if share.value < 1]
        lost = [1 - share.value for _, share in shares]
        bars = [[share.high - share.value for _, share in shares], [share.value - share.low for _, share in shares]]
        right.errorbar(
            [p for p, _ in shares], lost, yerr=bars, color=colour, marker="o", ms=4, capsize=2, linestyle="none"
        )
        line = [closed.loss_after(1, -math.log1p(-p), 1.0, size=size, parity=parity) for p in CHANCES]
        right.plot(CHANCES, line, color=colour, label=f"any {parity} of {size}")
    right.set(xscale="log", yscale="log", xlabel="chance of a node to be lost while a share is missing")
    right.set(ylabel="chance", ylim=(1e-5, 1), title="Memory does not survive a node loss")
    right.set_xticks(CHANCES, [f"{100 * p:g} %" for p in CHANCES])
    right.minorticks_off()
    for axis, place in ((left, "lower left"), (right, "lower right")):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc=place)
    figure.savefig(PICTURE, dpi=90, metadata={"Software": None})
    plt.close(figure)


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
