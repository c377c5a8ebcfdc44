"""The votes of the ranks: each leaves one receipt (or the reason why not), the committer collects them.

In: a store, opaque receipts. Out: the receipts by rank, or the error that says which ranks failed or are missing. Never
interprets a receipt, never waits past its deadline, never talks to a process group.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ckpt import failpoints
from ckpt.commit import names
from ckpt.commit.waiting import SYSTEM_CLOCK, Clock, looks
from ckpt.config import Options
from ckpt.errors import CheckpointError, RankFailedError
from ckpt.store.base import Store

_LISTED_RANKS_MAX = 16  # ranks named in one message


def leave_receipt(store: Store, step: int, attempt: str, rank: int, world: int, payload: bytes) -> None:
    """Step 2 of a save: say that this rank's image is durable. Each rank, once, after its image is."""
    failpoints.hit("commit.before-receipt")
    store.put(names.receipt_key(step, attempt, rank, world), payload)
    failpoints.hit("commit.after-receipt")


def leave_failure(store: Store, step: int, attempt: str, rank: int, world: int, error: BaseException) -> None:
    """Instead of a receipt: say why this rank has none, so that the others need not wait for it."""
    kind = error.kind if isinstance(error, CheckpointError) else type(error).__name__
    message = error.message if isinstance(error, CheckpointError) else str(error)
    record = {"rank": rank, "kind": kind, "message": message}
    store.put(names.failure_key(step, attempt, rank, world), json.dumps(record).encode())


def collect_receipts(
    store: Store,
    step: int,
    attempt: str,
    world: int,
    *,
    timeout_s: float,
    options: Options,
    ranks: Sequence[int] | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> dict[int, bytes]:
    """Step 3 of a save: all receipts of one attempt, by rank. The committer only.

    Args:
        ranks: those that leave a receipt; all of `world` when None.

    Raises:
        RankFailedError: `rank-failed` as soon as a rank left a failure; `rank-missing` after `timeout_s`.
    """
    wanted = set(range(world) if ranks is None else ranks)
    found: dict[int, bytes] = {}
    for _ in looks(timeout_s, options=options, clock=clock):
        _collect_new(store, step, attempt, world, wanted, found, options)
        if len(found) == len(wanted):
            failpoints.hit("commit.receipts-complete")
            return dict(sorted(found.items()))
    missing = sorted(wanted - set(found))
    raise RankFailedError(
        f"no receipt for step {step} from {_rank_list(missing)} of {len(wanted)} after {timeout_s:.1f} s",
        kind="rank-missing",
        hints=("see whether these ranks are alive, or whether their writes are slower than `commit_timeout_s`",),
    )


def _collect_new(
    store: Store, step: int, attempt: str, world: int, wanted: set[int], found: dict[int, bytes], options: Options
) -> None:
    """Add to `found` the receipts that have appeared; raise when a failure has."""
    fresh: dict[int, str] = {}
    failed: dict[int, str] = {}
    prefix = names.receipts_prefix(step, attempt)
    for entry in store.list(prefix):
        name = entry.key.removeprefix(prefix)
        for suffix, target in (("receipt", fresh), ("failed.json", failed)):
            parsed = names.parse_ranked(name, suffix)
            if parsed is not None and parsed[1] == world and parsed[0] in wanted:
                target[parsed[0]] = entry.key
    if failed:
        raise _failure_of(store, step, failed)
    keys = {rank: key for rank, key in fresh.items() if rank not in found}
    if len(keys) <= 1:
        found.update({rank: store.read(key) for rank, key in keys.items()})
        return
    with ThreadPoolExecutor(min(options.store_threads, len(keys)), thread_name_prefix="ckpt-receipts") as pool:
        found.update(zip(keys, pool.map(store.read, keys.values()), strict=True))


def _failure_of(store: Store, step: int, failed: dict[int, str]) -> RankFailedError:
    reasons = []
    for rank, key in sorted(failed.items())[:_LISTED_RANKS_MAX]:
        record = read_record(store.read(key))
        reasons.append(f"rank {rank}: {record.get('message', 'no reason given')} ({record.get('kind', 'unknown')})")
    return RankFailedError(f"step {step} failed on {_rank_list(sorted(failed))}: " + "; ".join(reasons))


def read_record(data: bytes) -> dict[str, object]:
    """A small JSON record; an empty one when it is none, because a reason that cannot be read is still a failure."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _rank_list(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:_LISTED_RANKS_MAX])
    more = f" and {len(ranks) - _LISTED_RANKS_MAX} more" if len(ranks) > _LISTED_RANKS_MAX else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
