"""Real text that every machine has, and a loader whose order does not depend on the number of data-parallel ranks.

In: the sources and docs of the Python standard library, a seed, this rank's place. Out: batches of byte tokens, and a
state that can be cut anew for another number of ranks. Never draws from a global random stream.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

END_OF_FILE = 256  # the one token that is no byte
VOCABULARY_SIZE = 264  # 257, padded to a multiple of 8 so that it cuts evenly
CORPUS_BYTES_MAX = 16 * 1024 * 1024

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The text as one row of tokens."""

    tokens: NDArray[np.int16]
    fingerprint: int  # CRC-32 of the tokens: another Python has another standard library


def read_corpus(folder: Path | None = None, *, bytes_max: int = CORPUS_BYTES_MAX) -> Corpus:
    """Read the sources and docs (`pydoc_data`) of the standard library, in the order of their names."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in folder.rglob("*.py") if not _SKIPPED_FOLDERS & set(file.relative_to(folder).parts))
    parts: list[NDArray[np.int16]] = []
    num_bytes = 0
    for file in files:
        text = np.frombuffer(file.read_bytes()[: bytes_max - num_bytes], dtype=np.uint8)
        parts += [text.astype(np.int16), np.array([END_OF_FILE], dtype=np.int16)]
        num_bytes += len(text)
        if num_bytes >= bytes_max:
            break
    if not parts:
        raise FileNotFoundError(f"no Python sources under {folder}: is the standard library installed in full?")
    tokens = np.concatenate(parts)
    return Corpus(tokens=tokens, fingerprint=zlib.crc32(tokens.tobytes()))


class TextLoader:
    """Batches of (inputs, targets), both [sequences of this rank, context_tokens].

    Step k of the run takes the sequences [k * B, (k + 1) * B) of one shuffled order, B being the GLOBAL batch; data-
    parallel rank r of n takes the r-th n-th of them. So the order of the run is the same for any n that divides B.

    Each rank counts what it handed out itself since `start`. The sum over the ranks says where the run stands, and
    that is what a changed number of ranks goes on from.
    """

    def __init__(
        self, corpus: Corpus, *, context_tokens: int, global_batch: int, seed: int, dp_rank: int, dp_size: int
    ) -> None:
        if global_batch % dp_size:
            raise ValueError(f"a global batch of {global_batch} sequences cannot be split over {dp_size} ranks")
        self.corpus = corpus
        self.context_tokens = context_tokens
        self.global_batch = global_batch
        self.seed = seed
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.start = 0  # sequences the whole run had seen when this number of ranks took over
        self.handed_out = 0  # sequences this rank gave since then
        self.num_sequences = (len(corpus.tokens) - 1) // context_tokens
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def next_indices(self) -> list[int]:
        """Numbers of this rank's sequences of the next step; counts them as handed out."""
        share = self.global_batch // self.dp_size
        first = self.start + self.handed_out * self.dp_size + self.dp_rank * share
        self.handed_out += share
        return [self._sequence_at(first + i) for i in range(share)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Itself: the text begins anew when it ends."""
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank's sequences of the next step."""
        starts = [index * self.context_tokens for index in self.next_indices()]
        rows = np.stack([self.corpus.tokens[start : start + self.context_tokens + 1] for start in starts])
        tokens = torch.from_numpy(rows.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """What this data-parallel rank must keep."""
        return {
            "seed": self.seed,
            "corpus": self.corpus.fingerprint,
            "context_tokens": self.context_tokens,
            "dp_rank": self.dp_rank,
            "dp_size": self.dp_size,
            "start": self.start,
            "handed_out": self.handed_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which this rank of the same number of ranks saved, or `reshard_state` made for it."""
        mine = self.state_dict()
        for key in ("seed", "corpus", "context_tokens", "dp_rank", "dp_size"):
            if state[key] != mine[key]:
                raise ValueError(f"loader state: expected {key} {mine[key]}, found {state[key]}")
        self.start, self.handed_out = state["start"], state["handed_out"]

    @staticmethod
    def reshard_state(states: Sequence[dict[str, Any]], *, dp_rank: int, dp_size: int) -> dict[str, Any]:
        """From the states of all saved ranks, in their order, the state of rank `dp_rank` of `dp_size`.

        Raises ValueError when they are not the states of one run at one step.
        """
        shared = [{k: v for k, v in state.items() if k != "dp_rank"} for state in states]
        for rank, (state, rest) in enumerate(zip(states, shared, strict=True)):
            if state["dp_rank"] != rank or state["dp_size"] != len(states) or rest != shared[0]:
                raise ValueError(f"loader state of rank {rank} of {len(states)} does not fit rank 0's: {state}")
        start = states[0]["start"] + sum(state["handed_out"] for state in states)
        return {**states[0], "dp_rank": dp_rank, "dp_size": dp_size, "start": start, "handed_out": 0}

    def _sequence_at(self, position: int) -> int:
        """The sequence at a place in the endless, per epoch anew shuffled order."""
        epoch, place = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_sequences)
            self._epoch = epoch
        return int(self._order[place])
