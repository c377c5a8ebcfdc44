"""A snapshot in the memory of agents, as a store: the same keys, the same bytes, the same checks as on disk. Read-only.

In: a recoverable candidate, and ways to its agents. Out: a `Store` that any load, reshard or copy reads from. Its index is made
again from the receipts that lie behind the images. Blobs of lost members are decoded as they are read, so that a job of fewer
ranks needs no room for them. Damage that shows only now is found by the reader, as on any store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ckpt.agent import blob
from ckpt.agent.decode import Blobs
from ckpt.agent.inventory import Candidate, Card
from ckpt.agent.local import Mapped
from ckpt.agent.transport.client import Peer
from ckpt.agent.transport.wire import Key
from ckpt.commit import names
from ckpt.commit.assemble import Assembler
from ckpt.commit.complete import PROGRAM
from ckpt.config import Options
from ckpt.engine.keeper import OwnImage
from ckpt.engine.world import World, gather_or_raise
from ckpt.errors import CheckpointError, DamagedError, NotFoundError, StoreError
from ckpt.format import manifest, receipt
from ckpt.store.base import Entries, Entry, Names, Writer, check_keys


class SnapshotStore:
    """One snapshot. Any thread may read; `close` may be called twice."""

    conditional_create = False

    def __init__(
        self,
        candidate: Candidate,
        files: Mapping[str, bytes | memoryview],
        blobs: Blobs | None,
        local: Mapping[int, Mapped],
    ) -> None:
        """
        Args:
            blobs: None where nothing beside `local` is read.
            files: of the checkpoint beside what agents hold: index and manifest, by key; an image that stands here counts.
            local: rank -> its blob, where it is mapped into this process.
        """
        self.candidate, self._files, self._blobs, self._local = candidate, dict(files), blobs, dict(local)
        cards = (card for group in candidate.groups for card in group.cards)
        self._cards: dict[str, Card] = {_image_key(candidate, card.rank): card for card in cards}
        self.local_files = bool(local)
        self.local_nbytes = self.pulled_nbytes = 0  # read so far, for the report

    @classmethod
    def open_together(
        cls,
        candidate: Candidate,
        *,
        run_id: str,
        peer: Callable[[str], Peer],
        local: Mapping[str, Mapped],
        world: World,
        options: Options,
    ) -> SnapshotStore:
        """The store on every rank; rank 0 reads the receipts and passes the index on. All ranks call.

        Args:
            local: address of an agent -> its segment of this snapshot, mapped into this process.
        """
        blobs = make_blobs(candidate, run_id=run_id, peer=peer, options=options)
        error: CheckpointError | None = None
        files: dict[str, bytes] = {}
        try:
            if world.rank == 0:
                files = index_files(candidate, blobs)
        except CheckpointError as problem:
            error = problem
        packed = gather_or_raise(world, _packed(files), error, "nothing was changed")[0]
        ranks = {blobs.holder(card.rank): card.rank for group in candidate.groups for card in group.cards}
        mine = {ranks[address]: segment for address, segment in local.items() if address in ranks}
        return cls(candidate, _unpacked(packed), blobs, mine)

    @property
    def decoded_nbytes(self) -> int:
        """Decoded so far."""
        return self._blobs.decoded_nbytes if self._blobs is not None else 0

    @property
    def url(self) -> str:
        """For messages."""
        return f"memory of {self.candidate.world} ranks"

    def open_local(self, key: str, *, direct: bool = False) -> int | None:
        """None: `local_memory` has what is here."""
        return None

    def local_memory(self, key: str) -> NDArray[np.uint8] | None:
        """The image in the memory of this rank's own agent, mapped into this process."""
        card = self._cards.get(key)
        if card is None or card.rank not in self._local:
            return None
        return np.frombuffer(self._local[card.rank].memory, np.uint8, card.image_bytes)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        buffer = bytearray((self.size(key) if stop is None else stop) - start)
        self.read_into(key, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        if start + len(buffer) > self.size(key):
            raise DamagedError(f"`{key}` ends before byte {start + len(buffer)}", kind="truncated")
        if key in self._files:
            buffer[:] = self._files[key][start : start + len(buffer)]
            return
        card = self._cards[key]
        if card.rank in self._local:
            memory = np.frombuffer(self._local[card.rank].memory, np.uint8)
            np.copyto(np.frombuffer(buffer, np.uint8), memory[start : start + len(buffer)])
            self.local_nbytes += len(buffer)
            return
        if self._blobs is None:
            raise NotFoundError(f"`{key}` is not in the memory of this rank's own agent", kind="no-object")
        self._blobs.read_into(card.rank, start, buffer)
        self.pulled_nbytes += len(buffer)

    def size(self, key: str) -> int:
        check_keys([key])
        if key in self._files:
            return len(self._files[key])
        if key not in self._cards:
            raise NotFoundError(f"no `{key}` in the {self.url}", kind="no-object")
        return self._cards[key].image_bytes

    def exists(self, key: str) -> bool:
        check_keys([key])
        return key in self._files or key in self._cards

    def list(self, prefix: str) -> Entries:
        keys = sorted(key for key in {**self._files, **self._cards} if key.startswith(prefix))
        return [Entry(key=key, nbytes=self.size(key), modified_s=0.0) for key in keys]

    def list_folders(self, prefix: str) -> Names:
        rest = (entry.key.removeprefix(prefix) for entry in self.list(prefix))
        return sorted({name.split("/", 1)[0] for name in rest if "/" in name})

    def open_writer(self, key: str, *, nbytes: int | None = None) -> Writer:
        raise self._refused(key)

    def put(self, key: str, data: bytes) -> None:
        raise self._refused(key)

    def create(self, key: str, data: bytes) -> None:
        raise self._refused(key)

    def delete(self, keys: Sequence[str]) -> None:
        raise self._refused(", ".join(keys))

    def sweep(self, prefix: str, *, older_than_s: float) -> int:
        return 0

    def close(self) -> None:
        if self._blobs is not None:
            self._blobs.close()

    def _refused(self, key: str) -> StoreError:
        return StoreError(f"a snapshot in memory cannot be written to: `{key}`", kind="denied")


def own_image(candidate: Candidate, rank: int, mapped: Mapped) -> OwnImage:
    """The image of `rank` in its own agent's memory, mapped into this process, with its receipt."""
    card = next(c for group in candidate.groups for c in group.cards if c.rank == rank)
    rest = bytes(mapped.memory[card.image_bytes : card.blob_bytes])
    made, _ = blob.unpack_rest(rest, what=_what(candidate, rank))
    return OwnImage(
        store=SnapshotStore(candidate, {}, None, {rank: mapped}),
        key=_image_key(candidate, rank),
        attempt=candidate.attempt,
        receipt=made,
    )


def _image_key(candidate: Candidate, rank: int) -> str:
    folder = names.attempt_folder(candidate.step, candidate.attempt)
    return f"{folder}/{names.image_name(rank, candidate.world)}"


def _what(candidate: Candidate, rank: int) -> str:
    return f"rank {rank}, step {candidate.step}"


def make_blobs(candidate: Candidate, *, run_id: str, peer: Callable[[str], Peer], options: Options) -> Blobs:
    """All blobs of a candidate, pulled from its agents."""

    def pull(address: str, key: Key, start: int, stop: int, into: memoryview) -> None:
        peer(address).pull(key, start, stop, into=into, deadline_s=options.pull_timeout_s)

    return Blobs(candidate, run_id=run_id, pull=pull, options=options)


def index_files(candidate: Candidate, blobs: Blobs) -> dict[str, bytes]:
    """Index and manifest, by key, out of the receipts of all ranks."""
    cards = {card.rank: card for group in candidate.groups for card in group.cards}
    found, request = [], None
    for rank in range(candidate.world):
        card = cards[rank]
        rest = bytearray(card.blob_bytes - card.image_bytes)
        blobs.read_into(rank, card.image_bytes, memoryview(rest))
        payload, asked = blob.unpack_rest(bytes(rest), what=_what(candidate, rank))
        found.append(receipt.unpack(payload, name=f"rank {rank}"))
        request = request or asked
    assert request is not None
    assembled = Assembler(PROGRAM).assemble(
        found, metadata=request.metadata, metrics=request.metrics, layout=request.layout
    )
    folder = names.attempt_folder(candidate.step, candidate.attempt)
    files = {f"{folder}/{name}": data for name, data in assembled.files.items()}
    files[names.manifest_key(candidate.step)] = manifest.pack(assembled.manifest)
    return files


def _packed(files: Mapping[str, bytes]) -> bytes:
    out = bytearray()
    for key, data in files.items():
        name = key.encode()
        out += len(name).to_bytes(4, "little") + name + len(data).to_bytes(8, "little") + data
    return bytes(out)


def _unpacked(data: bytes) -> dict[str, bytes]:
    out, at = {}, 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        key = data[at + 4 : at + 4 + size].decode()
        at += 4 + size
        nbytes = int.from_bytes(data[at : at + 8], "little")
        out[key] = data[at + 8 : at + 8 + nbytes]
        at += 8 + nbytes
    return out
