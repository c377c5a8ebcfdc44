"""What `URL@...` names. Method: cases at the edges, and every address that can be written reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.cli.address import Address, StepRange, parse
from ckpt.errors import InvalidInputError, NotFoundError

URLS = ["runs/gpt", "s3://bucket/run", "/data/user@host/run", "s3://bucket/we@3/run", "./a b", "run@5/", "s3://bucket"]
STEPS = st.integers(0, 10**12 - 1)
RANGES = st.one_of(
    st.tuples(STEPS, STEPS).map(lambda pair: StepRange(first=min(pair), last=max(pair))),
    STEPS.map(lambda step: StepRange(first=step)),
    STEPS.map(lambda step: StepRange(last=step)),
)


@given(url=st.sampled_from([url for url in URLS if not url.endswith("/")]), steps=STEPS | RANGES | st.just("latest"))
def test_every_address_reads_back(url: str, steps: int | str | StepRange) -> None:
    assert parse(f"{url}@{steps}") == Address(url=url, steps=steps)


@pytest.mark.parametrize("url", URLS)
def test_an_at_sign_before_the_last_component_is_no_step(url: str) -> None:
    assert parse(url) == Address(url=url)


def test_who_is_meant_before_a_host_is_left_to_the_store() -> None:
    assert parse("s3://key:secret@bucket") == Address(url="s3://key:secret@bucket")


@pytest.mark.parametrize(
    "text", ["run@", "run@lastest", "run@-1", "run@1.5", "run@..", "run@20..10", "run@1234567890123", "@5", ""]
)
def test_a_misspelt_step_is_an_error_and_never_a_folder_name(text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse(text)
    assert caught.value.kind == "bad-address" and caught.value.hints


@pytest.mark.parametrize(
    ("text", "expected"),
    [("r", [1, 5, 9]), ("r@5", [5]), ("r@latest", [9]), ("r@2..", [5, 9]), ("r@..5", [1, 5]), ("r@2..8", [5])],
)
def test_an_address_picks_complete_steps(text: str, expected: list[int]) -> None:
    assert parse(text).among([9, 1, 5]) == expected


@pytest.mark.parametrize("text", ["r@4", "r@6..8"])
def test_steps_that_are_not_there_are_named_with_those_that_are(text: str) -> None:
    with pytest.raises(NotFoundError, match="complete steps: 1, 5, 9"):
        parse(text).among([1, 5, 9])


def test_one_checkpoint_is_not_a_range() -> None:
    with pytest.raises(InvalidInputError):
        parse("r@1..2").one()
