"""Goal: the names of a run are written one way and read strictly. Method: round trips and look-alikes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.commit import names
from ckpt.errors import InvalidInputError
from ckpt.store.base import check_keys


@given(st.integers(0, names.STEP_MAX))
def test_step_folders_round_trip_and_sort_by_step(step: int) -> None:
    folder = names.step_folder(step)
    assert names.parse_step_folder(folder) == step
    assert (folder < names.step_folder(names.STEP_MAX)) == (step < names.STEP_MAX)


@pytest.mark.parametrize(
    "name", ["step-1", "step-0000000000001", "step-00000000001x", "step-٠٠٠٠٠٠٠٠٠٠٠١", "step-000000000001\n", "x", ""]
)
def test_folders_that_only_look_like_steps_are_not(name: str) -> None:
    assert names.parse_step_folder(name) is None


@pytest.mark.parametrize("step", [-1, names.STEP_MAX + 1])
def test_steps_out_of_range_are_refused(step: int) -> None:
    with pytest.raises(InvalidInputError):
        names.step_folder(step)


@given(st.integers(0, 10**9 - 2), st.data())
def test_ranked_names_round_trip(rank: int, data: st.DataObject) -> None:
    world = data.draw(st.integers(rank + 1, 10**9 - 1))
    assert names.parse_ranked(names.image_name(rank, world), "safetensors") == (rank, world)


@pytest.mark.parametrize(
    "name",
    ["00003-of-00002.safetensors", "3-of-4.safetensors", "00003-of-00128.receipt", "000003-of-00128.safetensors",
     "00003-of-00128.safetensors.tmp", "../00003-of-00128.safetensors", "00003-of-00128.safetensors\n"],
)  # fmt: skip
def test_names_that_only_look_like_images_are_not(name: str) -> None:
    assert names.parse_ranked(name, "safetensors") is None


@pytest.mark.parametrize(
    "attempt", ["short", "UPPERCASE", "../../../etc", "a" * 65, "with/slash", "dots....", "lines\naaa"]
)
def test_attempts_that_could_be_paths_are_refused(attempt: str) -> None:
    assert not names.is_attempt(attempt)
    for make in (names.attempt_folder, names.aborted_key, names.claim_key, names.receipts_prefix):
        with pytest.raises(InvalidInputError):
            make(1, attempt)


def test_every_key_is_one_that_stores_take() -> None:
    attempt = names.new_attempt()
    assert names.is_attempt(attempt)
    assert attempt != names.new_attempt()
    keys = [names.manifest_key(1), names.forgotten_key(1), names.aborted_key(1, attempt), names.claim_key(1, attempt)]
    keys += [names.receipt_key(1, attempt, 0, 1), names.failure_key(1, attempt, 0, 1)]
    check_keys(keys)
    assert names.parse_claim(names.claim_key(1, attempt).removeprefix(names.claims_prefix(1))) == attempt
    assert names.parse_claim("manifest.json.txt") is None


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0), (0, 10**9)])
def test_ranks_out_of_the_world_are_refused(rank: int, world: int) -> None:
    with pytest.raises(InvalidInputError):
        names.image_name(rank, world)
