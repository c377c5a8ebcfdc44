"""The one exchange before the first save of a structure: ranks compare what they are about to do.

In: this rank's step, target and records, or the error that stopped it. Out: the records of all ranks and a session id that
all share; or one error on every rank that says which ranks differ. Called by all ranks together.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt.engine.world import World
from ckpt.errors import RankFailedError, first_line
from ckpt.plan.records import RECORD, name_hash, record_spec

_HEADER = np.dtype([("step", "<i8"), ("target", "<u8"), ("session", "<u8"), ("error_bytes", "<i8")])


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What all ranks know after the exchange."""

    session: str  # 16 hex digits
    records: list[NDArray[np.void]]  # per rank


def agree(
    world: World, *, step: int, target: str, records: NDArray[np.void] | None, error: BaseException | None = None
) -> Agreement:
    """Exchange records; every rank gets the same answer or the same error.

    Args:
        target: what ranks must agree on besides the step, as text (the URL); it travels as a hash.
        error: why this rank cannot take part; then every rank raises RankFailedError, this one from `error`.
    """
    text = np.frombuffer(_describe(error).encode(), np.uint8)
    header = np.zeros(1, _HEADER)
    target_hash = int.from_bytes(hashlib.blake2b(target.encode(), digest_size=8).digest(), "little")
    header[0] = (step, target_hash, secrets.randbits(64), len(text))
    body = np.empty(0, RECORD) if records is None else records
    answers = world.all_gather(np.concatenate([header.view(np.uint8), text, body.view(np.uint8)]))
    headers = [np.frombuffer(a[: _HEADER.itemsize].tobytes(), _HEADER)[0] for a in answers]
    texts = [
        bytes(a[_HEADER.itemsize :][: int(h["error_bytes"])]).decode() for a, h in zip(answers, headers, strict=True)
    ]
    _raise_failures(texts, error)
    _raise_differences("step", [int(h["step"]) for h in headers])
    _raise_differences("checkpoint URL (hash)", [f"{int(h['target']):016x}" for h in headers])
    rest = [np.frombuffer(a[_HEADER.itemsize :].tobytes(), RECORD) for a in answers]
    return Agreement(session=f"{int(headers[0]['session']):016x}", records=rest)


def _describe(error: BaseException | None) -> str:
    return "" if error is None else first_line(error)


def _raise_failures(texts: Sequence[str], error: BaseException | None) -> None:
    failed = {rank: text for rank, text in enumerate(texts) if text}
    if error is not None:
        raise error
    if failed:
        raise RankFailedError("; ".join(f"rank {rank} failed: {text}" for rank, text in failed.items()))


def _raise_differences(what: str, values: Sequence[object]) -> None:
    if len(set(values)) > 1:
        groups: dict[object, list[int]] = {}
        for rank, value in enumerate(values):
            groups.setdefault(value, []).append(rank)
        text = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in groups.items())
        raise RankFailedError(f"ranks disagree on the {what}: {text}", kind="rank-disagrees")


def find_disagreements(records: Sequence[NDArray[np.void]], names: dict[int, str]) -> list[str]:
    """Names (of those known here) that ranks describe with different dtypes, shapes or roles, with the ranks.

    Args:
        names: name hash -> name, of this rank's tensors.
    """
    table = np.concatenate(records)
    ranks = np.repeat(np.arange(len(records)), [len(r) for r in records])
    pairs, index = np.unique(np.stack([table["name"], record_spec(table)], axis=1), axis=0, return_index=True)
    doubled = pairs[:, 0][np.flatnonzero(pairs[1:, 0] == pairs[:-1, 0]) + 1] if len(pairs) else np.empty(0, np.uint64)
    out = []
    for key in np.unique(doubled):
        at = ", ".join(str(int(ranks[index[i]])) for i in np.flatnonzero(pairs[:, 0] == key))
        out.append(f"`{names.get(int(key), f'tensor with hash {int(key):016x}')}` (first seen so on ranks {at})")
    return out


def names_by_hash(names: Sequence[str]) -> dict[int, str]:
    """name hash -> name."""
    return {name_hash(name): name for name in names}
