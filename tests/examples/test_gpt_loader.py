"""Goal: the example's loader gives each sample of the run once, whatever number of data-parallel ranks reads which part.

Method: the oracle is one loader that nobody ever interrupts. Hypothesis draws how often the number of ranks changes, and
after how many steps; each change goes through `state_dict`, `reshard_state` and `load_state_dict`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.gpt.data import END_OF_FILE, Corpus, TextLoader, read_corpus

GLOBAL_BATCH = 8
CORPUS = Corpus(tokens=np.arange(401, dtype=np.int16), fingerprint=1)  # 50 sequences of 8 tokens: 6.25 steps per epoch


def loaders(dp_size: int, *, corpus: Corpus = CORPUS, seed: int = 3) -> list[TextLoader]:
    return [
        TextLoader(corpus, context_tokens=8, global_batch=GLOBAL_BATCH, seed=seed, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 9)), min_size=1, max_size=5))
def test_changed_degree_loses_and_repeats_no_sample(segments: list[tuple[int, int]]) -> None:
    (undisturbed,) = loaders(1)
    expected = [undisturbed.next_indices() for _ in range(sum(steps for _, steps in segments))]

    found, states = [], None
    for dp_size, steps in segments:
        ranks = loaders(dp_size)
        if states is not None:
            for rank, loader in enumerate(ranks):
                loader.load_state_dict(TextLoader.reshard_state(states, dp_rank=rank, dp_size=dp_size))
        found += [[index for loader in ranks for index in loader.next_indices()] for _ in range(steps)]
        states = [loader.state_dict() for loader in ranks]

    assert found == expected


def test_epoch_gives_every_sequence_once() -> None:
    (loader,) = loaders(1)
    seen = [index for _ in range(25) for index in loader.next_indices()]  # 200 sequences: 4 epochs
    assert [sorted(seen[i : i + 50]) for i in range(0, 200, 50)] == [list(range(50))] * 4
    assert seen[:50] != seen[50:100]


def test_targets_are_the_tokens_that_follow() -> None:
    inputs, targets = next(loaders(2)[1])
    assert inputs.shape == targets.shape == (4, 8)
    assert (targets == inputs + 1).all()


@pytest.mark.parametrize("change", [{"corpus": 2}, {"seed": 4}, {"dp_rank": 1}, {"dp_size": 4}])
def test_state_of_another_run_is_refused(change: dict[str, int]) -> None:
    loader = loaders(2)[0]
    with pytest.raises(ValueError, match=f"expected {next(iter(change))}"):
        loader.load_state_dict({**loader.state_dict(), **change})


def test_states_of_different_steps_are_refused() -> None:
    ahead, behind = loaders(2)
    next(ahead)
    with pytest.raises(ValueError, match="rank 1 of 2"):
        TextLoader.reshard_state([ahead.state_dict(), behind.state_dict()], dp_rank=0, dp_size=1)


def test_corpus_is_the_same_each_time_and_ends_its_files(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_bytes(b"bb")
    (tmp_path / "a.py").write_bytes(b"a")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_bytes(b"cc")
    corpus = read_corpus(tmp_path)
    assert corpus.tokens.tolist() == [97, END_OF_FILE, 98, 98, END_OF_FILE]
    assert read_corpus(tmp_path).fingerprint == corpus.fingerprint
    assert read_corpus(tmp_path, bytes_max=2).tokens.tolist() == [97, END_OF_FILE, 98, END_OF_FILE]


def test_this_machine_has_text_enough() -> None:
    assert len(read_corpus().tokens) > 1_000_000
