"""Every limit and option, once.

In: nothing, or the environment (read at call time, in `from_environment` only). Out: frozen records. Never does I/O.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ckpt.errors import InvalidInputError

KIB = 1024
MIB = 1024 * KIB


_MAY_BE_ZERO = (  # no limit, no nicety, no wait, no reserve
    "write_bytes_per_s_max",
    "copy_nice",
    "flush_nice",
    "terminate_grace_s",
    "agent_nice",
    "agent_reserve_bytes",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be tuned; each field is also the environment variable `CKPT_<FIELD>` in capitals."""

    commit_timeout_s: float = 600.0  # the committer waits this long for all receipts
    outcome_grace_s: float = 30.0  # other ranks wait this much longer for the outcome
    exchange_timeout_s: float = 300.0  # one exchange between ranks before a save or load
    poll_start_s: float = 0.002  # first pause between looks at the store
    poll_max_s: float = 0.25  # longest pause between looks
    chunk_bytes: int = 16 * MIB  # one buffer of the write path, a multiple of 4 KiB
    copy_threads: int = 2  # of one rank, for copies and checksums
    copy_nice: int = 5  # priority of background copies, 0 (as training) to 19
    flush_nice: int = 10  # priority of background checksums and writes, 0 to 19
    images_max: int = 2  # of a rank's state in host memory at a time, for saves in the background: 1 or 2
    when_busy: str = "wait"  # a save is due and all images are on their way: wait, skip it, or fail
    check_fence: bool = (
        False  # find tensors that change while they are copied; costs another copy of the state per save
    )
    terminate_grace_s: float = 30.0  # a Checkpointer that gets SIGTERM has so long to finish its saves
    write_buffers: int = 3  # buffers of the write path per save
    write_in_flight: int = (
        1  # writes of one image to a local disk at once; more can help on arrays and parallel file systems
    )
    write_slice_bytes: int = 4 * MIB  # of one write when there are several, a multiple of 4 KiB
    write_bytes_per_s_max: int = 0  # a rank writes no faster in the long run; 0: no limit
    read_bytes_max: int = 16 * MIB  # one read
    read_gap_bytes_max: int = 16 * KIB  # two ranges nearer than this are read as one
    local_read_bytes_max: int = 4 * MIB  # one read of a local disk
    read_threads: int = 4  # reads of one load in flight
    read_buffer_bytes_max: int = 128 * MIB  # memory of one rank's load beside its target, for reads and exchange
    exchange: str = (
        "auto"  # whether ranks that load share their reads: auto (if it saves over 2 % of bytes), always, never
    )
    exchange_ranks_max: int = 64  # larger worlds read alone
    exchange_round_bytes: int = 128 * MIB  # per rank and round
    part_bytes: int = 16 * MIB  # one part of a multipart upload
    store_threads: int = 8  # requests in flight to an object store
    store_attempts: int = 5  # tries of one request to an object store
    connect_timeout_s: float = 10.0  # to an object store
    read_timeout_s: float = 60.0  # one answer of an object store
    claim_ttl_s: float = 900.0  # stores without conditional writes: a claim older than this is dead
    gc_grace_s: float = 3600.0  # unpublished attempts younger than this are kept by gc
    direct_io: bool = True  # read and write images around the page cache where the file system can
    events: bool = True  # log the phases of every save and load beside the run
    merge_image_bytes: int = 256 * MIB  # of one image of a merged checkpoint, about: one task of a worker
    # Erasure coding.
    code_tile_bytes: int = (
        512 * KIB
    )  # of all blocks together that are coded and summed in one go, in the second-level cache
    # The agent process and its memory.
    agent_memory_folder: str = "/dev/shm"  # a tmpfs, where agents keep snapshots
    agent_runtime_folder: str = (
        ""  # for sockets, locks and logs of agents; empty: $XDG_RUNTIME_DIR/ckpt or /tmp/ckpt-<uid>
    )
    agent_reserve_bytes: int = 1024 * MIB  # host memory that agents leave free
    agent_lease_s: float = 600.0  # an agent without a trainer stops after that; a dead one's memory is kept as long
    agent_heartbeat_s: float = 5.0  # an agent marks its memory as in use so often
    agent_start_timeout_s: float = 60.0  # until a started agent answers
    agent_begin_timeout_s: float = 1.0  # the training waits so long for its agent's memory, then goes on without
    agent_call_timeout_s: float = 30.0  # one request of a trainer to its agent
    agent_message_timeout_s: float = 10.0  # from the first byte of a message on the local socket to its last
    agent_message_bytes_max: int = MIB  # one message on the local socket
    agent_connections_max: int = 64  # at a time, to one agent
    agent_stop_grace_s: float = 30.0  # an agent that is told to stop has so long to finish what it does
    agent_nice: int = 10  # priority of an agent, 0 (as training) to 19
    agent_cpus: str = ""  # processors that an agent may use, such as 0-3,8; empty: those of whoever starts it
    # Transport between agents.
    peer_connect_s: float = 5.0  # an agent reaches another and both have proved themselves within this
    peer_progress_s: float = 30.0  # a transfer that brings no chunk for so long is given up
    peer_chunk_bytes: int = 4 * MIB  # one message of a transfer, at most 16 MiB
    peer_pull_bytes_max: int = 64 * MIB  # chunks that one call for many ranges has in flight
    peer_streams_each_max: int = 8  # transfers that an agent serves to one peer at a time
    peer_streams_max: int = 32  # to all peers together
    peer_session_s: float = 3600.0  # a session that was not used for so long is forgotten
    # The memory tier.
    protect_timeout_s: float = 60.0  # from the seal of a snapshot until all ranks have protected theirs
    protect_streams_max: int = 2  # transfers that an agent makes parity from at a time, whatever the size of its group
    pull_timeout_s: float = 60.0  # one range that a load asks of an agent
    inventory_timeout_s: float = 120.0  # an agent looks at every byte that it holds

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _MAY_BE_ZERO and value == 0:
                continue
            if not isinstance(value, bool | str) and value <= 0:
                raise InvalidInputError(f"option `{field.name}` must be positive, found {value}")
        if self.chunk_bytes % (4 * KIB):  # no element lies across two chunks, and each is written around the page cache
            raise InvalidInputError(f"option `chunk_bytes` must be a multiple of 4,096, found {self.chunk_bytes}")
        if self.write_slice_bytes % (4 * KIB) or self.write_slice_bytes > 1024 * MIB:
            raise InvalidInputError(
                f"option `write_slice_bytes` must be a multiple of 4,096 up to 1 GiB, found {self.write_slice_bytes}"
            )
        if self.exchange not in ("auto", "always", "never"):
            raise InvalidInputError(f"option `exchange` must be auto, always or never, found {self.exchange!r}")
        if self.when_busy not in ("wait", "skip", "fail"):
            raise InvalidInputError(f"option `when_busy` must be wait, skip or fail, found {self.when_busy!r}")
        if self.peer_chunk_bytes > PEER_CHUNK_BYTES_LIMIT:
            raise InvalidInputError(f"option `peer_chunk_bytes` must be at most 16 MiB, found {self.peer_chunk_bytes}")
        if self.images_max > 2:
            raise InvalidInputError(f"option `images_max` must be 1 or 2, found {self.images_max}")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Snapshots in the memory of agents (docs/how-to/memory.md).

    Args:
        every: a snapshot when the step is a multiple of this; `"auto"`: as often as `cost_max` allows, by what it costs here.
        cost_max: share of the training time that snapshots may take, for `every="auto"`.
        parity: members of a group that may be lost at once.
        group_size: members of a group, about: groups differ by one where the world does not divide.
        address: of this node's interface that agents listen on; the one that leads to MASTER_ADDR when None.
        topology: a YAML file that says which failure domain each host is in, `host: domain`; the variable
            `CKPT_TOPOLOGY_FILE` names one, too. `CKPT_FAILURE_DOMAIN` on a host wins over it.
    """

    every: int | Literal["auto"] = "auto"
    cost_max: float = 0.03
    parity: int = 1
    group_size: int = 8
    address: str | None = None
    topology: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.every != "auto" and (type(self.every) is not int or self.every < 1):
            raise InvalidInputError(f'`every` must be "auto" or a whole number from 1 on, found {self.every!r}')
        if not 0 < self.cost_max < 1:
            raise InvalidInputError(f"`cost_max` must be between 0 and 1, found {self.cost_max}")
        if not 1 <= self.parity < self.group_size:
            raise InvalidInputError(
                f"`parity` must be at least 1 and less than `group_size`, found {self.parity} and {self.group_size}"
            )


@dataclass(frozen=True, kw_only=True)
class OnlineAverage:
    """An average of a run's checkpoints that is kept up as they land (docs/how-to/merge.md).

    Args:
        into: the run that averages are written into, one per step; sums that go on lie in its folder `sums`.
        method: `uniform`: the mean of all checkpoints from `first_step` on; `ema`: their exponential average; `window`: the mean
            of the newest `last`, which retention then leaves in the run.
        half_life: of `ema`, training steps after which a checkpoint counts half. Or `decay`, per checkpoint.
        last: checkpoints of a `window`.
        first_step: checkpoints before it do not count.
        every: of the checkpoints that are saved, only steps divisible by this count.
        publish_every: write an average each time that so many more checkpoints are in it.
        keep_last: averages that are kept in `into`; all when None.
        dtype: of the averages; that of the checkpoints when None.
        rules: what becomes of tensors by name, as in a merge recipe.
        memory: bytes that a merge may take.
        backlog_max: checkpoints that retention leaves for an average that is behind; older ones are then missing in it.
    """

    into: str
    method: Literal["uniform", "ema", "window"] = "uniform"
    half_life: float | None = None
    decay: float | None = None
    last: int = 5
    first_step: int = 0
    every: int = 1
    publish_every: int = 1
    keep_last: int | None = None
    dtype: str | None = None
    rules: tuple[Mapping[str, object], ...] = ()
    memory: int | None = None
    backlog_max: int = 10

    def __post_init__(self) -> None:
        if self.method not in ("uniform", "ema", "window"):
            raise InvalidInputError(f"`method` must be uniform, ema or window, found {self.method!r}")
        if not self.into:
            raise InvalidInputError("`into` must name the run that averages are written into")
        if (self.method == "ema") != ((self.half_life is None) != (self.decay is None)):
            raise InvalidInputError("the method `ema`, and no other, takes either `half_life` or `decay`")
        if self.half_life is not None and not self.half_life > 0:
            raise InvalidInputError(f"`half_life` must be positive, found {self.half_life}")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise InvalidInputError(f"`decay` must be at least 0 and below 1, found {self.decay}")
        for name in ("last", "every", "publish_every", "backlog_max", "keep_last", "memory"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidInputError(f"`{name}` must be a whole number from 1 on, found {value!r}")
        if type(self.first_step) is not int or self.first_step < 0:
            raise InvalidInputError(f"`first_step` must be a whole number from 0 on, found {self.first_step!r}")


def from_environment(base: Options | None = None, **changes: object) -> Options:
    """Options from `base`, overridden by `CKPT_...` variables, overridden by `changes` that are not None."""
    base = base or Options()
    values: dict[str, object] = {}
    for field in dataclasses.fields(Options):
        text = os.environ.get(f"CKPT_{field.name.upper()}")
        if text is not None:
            values[field.name] = _parse(field.name, text, type(getattr(base, field.name)))
    values.update({name: value for name, value in changes.items() if value is not None})
    return dataclasses.replace(base, **values)  # type: ignore[arg-type]


def _parse(name: str, text: str, kind: type) -> object:
    try:
        if kind is bool:
            return {"0": False, "false": False, "1": True, "true": True}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise InvalidInputError(
            f"environment variable CKPT_{name.upper()} must be a {kind.__name__}, found {text!r}"
        ) from None


# Limits of the format (docs/reference/format.md); a file beyond them is refused, not read.
HEADER_BYTES_MAX = 100_000_000  # of an image; safetensors' own limit
MANIFEST_BYTES_MAX = 64 * MIB
WORLD_MAX = 10**9 - 1  # ranks of one job
BLOCK_BYTES_LIMIT = 16 * MIB  # of one checksum: a reader holds at least one block
INDEX_ROWS_MAX = 1 << 30  # of one file of the index
ROW_GROUP_ROWS_MAX = 1 << 16  # of one Parquet row group of the index
TENSOR_DIMS_MAX = 32
TENSOR_BYTES_MAX = 1 << 62  # of all tensors of a checkpoint together, so that no product of lengths overflows
TENSOR_NAME_BYTES_MAX = 1024  # UTF-8
OBJECT_BYTES_MAX = 256 * MIB
OBJECT_DEPTH_MAX = 100  # containers within containers in one typed tree
OBJECT_NODES_MAX = 16 * 1024 * 1024  # values in one typed tree
LEFT_SAMPLES_MAX = (
    1 << 27
)  # samples by which the data-parallel ranks of an elastic sampler may be apart, all ranks together

# Limits of the event log (docs/reference/events.md).
EVENT_LINE_BYTES_MAX = 16 * KIB  # one event; what is longer loses its details
EVENT_LOG_PART_BYTES = MIB  # one file; about 300 saves of one rank
EVENT_LOG_BYTES_MAX = 64 * MIB  # of one process; then its oldest file goes
EVENT_LOG_READ_BYTES_MAX = 256 * MIB  # parsed at once, newest files first

# Limits of the report of a run.
REPORT_RANKS_MAX = 512  # in one timeline; of more ranks, the slowest
REPORT_ROWS_MAX = 500  # in one table, the newest

# Limits of the transport between agents (docs/reference/agent-transport.md).
PEER_CHUNK_BYTES_LIMIT = 16 * MIB  # of one message of a transfer, whatever the other side asks for
PEER_MESSAGE_BYTES_MAX = MIB  # of one control message, as JSON
PEER_MESSAGE_OVERHEAD_BYTES = 64 * KIB  # of Flight and of ours around a chunk or message
PEER_HANDSHAKE_BYTES_MAX = 4 * KIB  # from somebody who has not proved anything yet
PEER_SESSIONS_MAX = 4096  # of one server; then the one not used for longest goes

# Limits of `ckpt simulate`.
SIMULATE_NODES_MAX = 1_000_000
SIMULATE_FAILURES_MAX = 20_000_000  # of all runs of one policy together; some minutes
SIMULATE_RUNS_MAX = 100_000
SIMULATE_GROUP_MAX = 255  # nodes of one group: points of GF(2^8)
SIMULATE_SIZES_MAX = 64  # clusters in one table
SIMULATE_FILE_BYTES_MAX = 64 * KIB  # a cluster file
# Limits of the agents.
TOPOLOGY_BYTES_MAX = 16 * MIB  # of a topology file: 100,000 hosts with long names
# Limits of agents (docs/reference/agent.md).
AGENT_BESIDE_BYTES = 160_000_000  # of an agent beside images and parity, while it protects (bench/agent_memory.py)
AGENT_ATTEMPT_BYTES_MAX = 64  # of an attempt id in the header of a segment
AGENT_MESSAGE_FDS_MAX = 16  # descriptors that one message passes
AGENT_RECORD_BYTES_MAX = 256 * KIB  # of the record at the end of a segment: the cards of a group
AGENT_SEGMENTS_MAX = 16  # of one agent; `AGENT_MESSAGE_FDS_MAX` of them fit into one answer
AGENT_LOG_PART_BYTES = MIB  # one file of an agent's log; there are two
AGENT_LOG_KEEP_S = 7 * 86400.0  # logs of agents that are gone are removed after that
AGENT_LOOK_S = (
    60.0  # what an agent found whole need not be looked at again before a job starts; its load looks once more
)
AGENT_HOLD_S_MAX = 3600.0  # somebody who reads what an agent holds may keep it from ending for so long at a time
AGENT_ADDRESSES_MAX = 4096  # that an agent is told when it joins; larger worlds: of its own group and one of each other
AGENT_POPULATE_BYTES = 64 * MIB  # of one step of a first touch, so that other threads get their turn

# Merging. The first two decide how tensors are cut and so how sums are made: another value gives other (equally good) bits.
MERGE_TILE_ELEMENTS = 1 << 20  # of one tile
MERGE_FRAGMENT_ELEMENTS = 1 << 26  # of one fragment of the result
MERGE_IMAGES_MAX = 4096  # of one result; they are larger than `merge_image_bytes` where there would be more
MERGE_SOURCES_MAX = 4096
MERGE_SLOT_BYTES_MAX = (
    64 * MIB
)  # of an optimizer slot of another shape than its parameter (a factor), which is read whole
MERGE_RECIPE_BYTES_MAX = 4 * MIB
MERGE_RECIPE_DEPTH_MAX = 16
MERGE_RECIPE_NODES_MAX = 200_000
MERGE_LISTED_MAX = 1000  # names in one error message
MERGE_WORKERS_MAX = 1024

# Deltas and adapters.
DELTA_CHUNK_ELEMENTS = 1 << 19  # of a tensor that are coded at a time
DELTA_SPOOL_READ_BYTES = 4 * MIB  # of what is coded, copied into an image at a time
ADAPTER_CONFIG_BYTES_MAX = 4 * MIB
ADAPTER_RANK_MAX = 65536  # of one module, in a result

# Export to plain safetensors files.
EXPORT_FILE_BYTES = 5_000_000_000  # of one file, about: what Hugging Face's tools write
EXPORT_PIECE_BYTES = 16 * MIB  # of a tensor that is read, cast and written at a time
EXPORT_SIDE_FILE_BYTES_MAX = 64 * MIB  # a config or tokenizer file that is copied along
