"""Cut the images of a group into blocks, and say which blocks make which parity and which give a lost one back.

In: the sizes of the images and the number of parities. Out: blocks, and plans of steps that can be printed. Pure: no I/O, no
clock, no randomness; every member computes the same. Never plans to move or store a byte after the end of an image.

A group of n members has n stripes of n blocks, one of each member: in stripe s member (s + j) mod n holds parity j of m, the
other k = n - m one block of their image each. So every member gives k blocks and holds m, wherever it stands.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ckpt.errors import InvalidInputError
from ckpt.format.checksum import piece_bytes_of
from ckpt.kernels.erasure import SOURCES_MAX, TARGETS_MAX


@dataclass(frozen=True, kw_only=True)
class Block:
    """One member's part of one stripe, or a range of it. What is missing to the range's length counts as zero."""

    stripe: int
    piece: int  # of the code: 0 to k - 1 are data, in the order of members; k to n - 1 parity
    member: int
    parity: bool  # the bytes are of the member's parity, else of its image
    start: int  # bytes of the image or parity
    stop: int  # exclusive; equal to `start` when there is nothing

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Block:
        """Bytes [start, stop) counted from the block's beginning, as far as they are there."""
        first, last = (min(self.start + at, self.stop) for at in (start, stop))
        return dataclasses.replace(self, start=first, stop=last)

    def __str__(self) -> str:
        what = "parity" if self.parity else "image"
        return f"{what} of member {self.member} [{self.start}, {self.stop})"


@dataclass(frozen=True, kw_only=True)
class Step:
    """Make `target` of `sources`: the coefficients are `Code.rows(have=step.have, wanted=[step.target.piece])`."""

    target: Block
    sources: tuple[Block, ...]  # k of them, of other members; empty ones count as zeros, and need no read

    @property
    def have(self) -> tuple[int, ...]:
        """Pieces of the code, in the order of `sources`."""
        return tuple(source.piece for source in self.sources)

    @property
    def reads(self) -> tuple[Block, ...]:
        """The sources that have bytes."""
        return tuple(source for source in self.sources if source.nbytes)

    def chunks(self, chunk_bytes: int) -> Iterator[Step]:
        """The same in steps of at most `chunk_bytes` of the target; `sources` keep their number and order."""
        if chunk_bytes < 1:
            raise InvalidInputError(f"`chunk_bytes` must be at least 1, found {chunk_bytes}")
        for start in range(0, self.target.nbytes, chunk_bytes):
            stop = min(start + chunk_bytes, self.target.nbytes)
            sources = tuple(source.part(start, stop) for source in self.sources)
            yield Step(target=self.target.part(start, stop), sources=sources)

    def __str__(self) -> str:
        reads = ", ".join(str(read) for read in self.reads) or "nothing"
        return f"stripe {self.target.stripe}: {self.target} from {reads}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one member has to do, one step per block. `print(plan)` shows it."""

    member: int
    steps: tuple[Step, ...]  # by stripe; only those whose target has bytes

    @property
    def written_nbytes(self) -> int:
        return sum(step.target.nbytes for step in self.steps)

    @property
    def read_nbytes(self) -> dict[int, int]:
        """Bytes to read from each member, by its number."""
        found: Counter[int] = Counter()
        for step in self.steps:
            for read in step.reads:
                found[read.member] += read.nbytes
        return dict(sorted(found.items()))

    def __str__(self) -> str:
        head = f"member {self.member} makes {self.written_nbytes} bytes from {sum(self.read_nbytes.values())}"
        return "\n".join([head, *(f"  {step}" for step in self.steps)])


@dataclass(frozen=True, kw_only=True)
class Stripes:
    """The geometry of one group and one snapshot."""

    image_nbytes: tuple[int, ...]  # per member
    num_parity: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_parity < len(self.image_nbytes):
            raise InvalidInputError(
                f"`num_parity` must be at least 1 and less than the {len(self.image_nbytes)} members, found {self.num_parity}"
            )
        if self.num_parity > TARGETS_MAX or self.num_data > SOURCES_MAX:
            raise InvalidInputError(
                f"a group has at most {SOURCES_MAX} data and {TARGETS_MAX} parity blocks per stripe, found {self.num_data}"
                f" and {self.num_parity}"
            )
        if min(self.image_nbytes) < 0:
            raise InvalidInputError(f"`image_nbytes` must not be negative, found {min(self.image_nbytes)}")

    @property
    def num_members(self) -> int:
        return len(self.image_nbytes)

    @property
    def num_data(self) -> int:
        return self.num_members - self.num_parity

    @property
    def block_bytes(self) -> int:
        """Of every block: the largest image over k, rounded up to a piece (pieces.py)."""
        largest = max(self.image_nbytes)
        align = piece_bytes_of(largest)
        return -(-largest // (self.num_data * align)) * align

    @property
    def parity_nbytes(self) -> int:
        """What each member keeps room for. Parity j of its m lies at byte j * block_bytes."""
        return self.num_parity * self.block_bytes

    def block(self, stripe: int, member: int) -> Block:
        """The one block that `member` has in `stripe`."""
        row = (member - stripe) % self.num_members
        if row < self.num_parity:
            start = row * self.block_bytes
            length = max(self._data_block(stripe, other).nbytes for other in self._data_members(stripe))
            piece = self.num_data + row
            return Block(stripe=stripe, piece=piece, member=member, parity=True, start=start, stop=start + length)
        return self._data_block(stripe, member)

    def blocks(self, stripe: int) -> tuple[Block, ...]:
        """All blocks of a stripe, in the order of pieces."""
        held = [self.block(stripe, member) for member in range(self.num_members)]
        return tuple(sorted(held, key=lambda block: block.piece))

    def image_blocks(self, member: int) -> tuple[Block, ...]:
        """The k blocks that the image of `member` is cut into, by place in the image."""
        blocks = (self.block(stripe, member) for stripe in range(self.num_members))
        return tuple(block for block in blocks if not block.parity)

    def parity_blocks(self, member: int) -> tuple[Block, ...]:
        """The m blocks of parity that `member` holds, by place in its parity."""
        stripes = ((member - row) % self.num_members for row in range(self.num_parity))
        return tuple(self.block(stripe, member) for stripe in stripes)

    def _data_members(self, stripe: int) -> list[int]:
        members = range(self.num_members)
        return [member for member in members if (member - stripe) % self.num_members >= self.num_parity]

    def _data_block(self, stripe: int, member: int) -> Block:
        """Block b of an image goes to the b-th stripe in which its member holds no parity."""
        parity_stripes = ((member - row) % self.num_members for row in range(self.num_parity))
        number = stripe - sum(other < stripe for other in parity_stripes)
        start = min(number * self.block_bytes, self.image_nbytes[member])
        return Block(
            stripe=stripe,
            piece=self._data_members(stripe).index(member),
            member=member,
            parity=False,
            start=start,
            stop=min(start + self.block_bytes, self.image_nbytes[member]),
        )


def encode_plan(stripes: Stripes, member: int) -> Plan:
    """How `member` makes the parity that it holds out of the images of the others."""
    _check_members(stripes, [member])
    steps = []
    for target in sorted(stripes.parity_blocks(member), key=lambda block: block.stripe):
        sources = stripes.blocks(target.stripe)[: stripes.num_data]
        steps.append(Step(target=target, sources=sources))
    return Plan(member=member, steps=tuple(step for step in steps if step.target.nbytes))


def rebuild_plan(stripes: Stripes, member: int, *, lost: Collection[int]) -> Plan:
    """How the image and the parity of a lost member come back from those that are not in `lost`.

    Of more than k blocks of a stripe those that have no bytes are taken first; the others change from stripe to stripe, so
    that all survivors read about the same.

    Raises:
        InvalidInputError: more are lost than there is parity (`too-many-lost`), or `member` is not among them.
    """
    _check_members(stripes, [member, *lost])
    if member not in lost:
        raise InvalidInputError(f"member {member} is not lost, found {sorted(lost)}")
    if len(set(lost)) > stripes.num_parity:
        raise InvalidInputError(
            f"members {sorted(set(lost))} are lost, and {stripes.num_parity} of {stripes.num_members} may be",
            kind="too-many-lost",
        )
    steps = []
    for stripe in range(stripes.num_members):
        blocks = stripes.blocks(stripe)
        there = [block for block in blocks if block.member not in lost]
        there.sort(key=lambda block: (block.nbytes > 0, (block.member - stripe) % stripes.num_members))
        sources = sorted(there[: stripes.num_data], key=lambda block: block.piece)
        target = next(block for block in blocks if block.member == member)
        steps.append(Step(target=target, sources=tuple(sources)))
    return Plan(member=member, steps=tuple(step for step in steps if step.target.nbytes))


def _check_members(stripes: Stripes, members: Sequence[int]) -> None:
    for member in members:
        if not 0 <= member < stripes.num_members:
            raise InvalidInputError(f"members are 0 to {stripes.num_members - 1}, found {member}")
