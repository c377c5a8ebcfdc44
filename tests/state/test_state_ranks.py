"""Real gloo ranks: what torch's own parallelism cuts is stored as the whole, and loads back.

Goal: boxes and addresses of every kind of parallelism are exact. Method: see rank_scenarios; here are the worlds and
sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.state.rank_pool import RankPool
from tests.state.rank_scenarios import EVEN, UNEVEN

pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    pool = RankPool(request.param)
    yield pool
    pool.close()


SIZES = pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])


@SIZES
@pytest.mark.parametrize("scenario", ["fsdp2", "hsdp", "tp", "tp_fsdp2", "fsdp1", "zero"])
def test_stored_as_the_plain_model_and_loads_back(ranks: RankPool, scenario: str, sizes: dict[str, int]) -> None:
    ranks.run(scenario, sizes=sizes)


@pytest.mark.parametrize("scenario", ["fsdp2", "fsdp1"])
def test_tied_weights_are_one_on_every_rank(ranks: RankPool, scenario: str) -> None:
    ranks.run(scenario, sizes=UNEVEN, tied=True)


@pytest.mark.parametrize("strategy", ["SHARD_GRAD_OP", "NO_SHARD"])
def test_fsdp1_strategies(ranks: RankPool, strategy: str) -> None:
    ranks.run("fsdp1", sizes=UNEVEN, strategy=strategy)


@pytest.mark.parametrize(
    "scenario",
    [
        "fsdp2_on_last_dim",
        "tp_fsdp2_equals_full_tensor",
        "fsdp2_after_a_forward_only",
        "ddp_trains_on",
        "fsdp1_trains_between",
        "fsdp1_without_original_parameters_is_refused",
        "zero_restores_hyperparameters",
        "fsdp2_into_plain_and_zero_into_fsdp2",
        "a_rank_outside_the_mesh_holds_nothing",
        "a_partial_tensor_is_refused",
        "dtensors_in_plain_values",
        "plain_tensors_under_a_layout",
    ],
)
def test_promise_of_the_scenario(ranks: RankPool, scenario: str) -> None:
    ranks.run(scenario)


def test_cut_by_tensor_parallel_first_where_the_order_of_cuts_shows() -> None:
    """Up to 4 ranks both orders of cutting give the same pieces; 7 rows on dp 3 x tp 2 do not."""
    pool = RankPool(6)
    try:
        pool.run("tp_fsdp2", sizes={"vocabulary": 7, "width": 3, "hidden": 7}, dp=3)
    finally:
        pool.close()
