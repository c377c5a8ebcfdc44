"""Every byte of every image is in one block, and any m lost members come back, image and parity, byte for byte.

Method: hypothesis draws of sizes; all groups of up to 8 members with all patterns of losses, coded and rebuilt by the plans over
real bytes; a small layout written down.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckpt.agent.stripes import Block, Plan, Step, Stripes, encode_plan, rebuild_plan
from ckpt.errors import InvalidInputError
from ckpt.format.checksum import piece_bytes_of
from ckpt.kernels import choice, code_blocks, code_for

Bytes = NDArray[np.uint8]


@st.composite
def geometries(draw: st.DrawFn) -> Stripes:
    sizes = draw(
        st.lists(st.one_of(st.just(0), st.integers(0, 100_000), st.integers(0, 2**50)), min_size=2, max_size=20)
    )
    return Stripes(image_nbytes=tuple(sizes), num_parity=draw(st.integers(1, len(sizes) - 1)))


@given(geometries())
def test_every_byte_of_every_image_is_data_of_one_block(stripes: Stripes) -> None:
    n, m = stripes.num_members, stripes.num_parity
    align = piece_bytes_of(max(stripes.image_nbytes))
    assert stripes.block_bytes % align == 0
    assert 0 <= stripes.block_bytes - max(stripes.image_nbytes) / (n - m) < align
    for member, size in enumerate(stripes.image_nbytes):
        blocks = stripes.image_blocks(member)
        edges = [block.start for block in blocks] + [size]
        assert len(blocks) == n - m and edges[0] == 0
        assert [block.stop for block in blocks] == edges[1:]
        assert all(block.nbytes <= stripes.block_bytes for block in blocks)
        assert len({block.stripe for block in blocks}) == n - m
        held = stripes.parity_blocks(member)
        assert [block.start for block in held] == [row * stripes.block_bytes for row in range(m)]
        assert all(block.nbytes <= stripes.block_bytes and block.parity for block in held)
        assert stripes.parity_nbytes == m * stripes.block_bytes


@given(geometries())
def test_every_stripe_has_one_block_of_each_member_and_rotates(stripes: Stripes) -> None:
    n, m = stripes.num_members, stripes.num_parity
    for stripe in range(n):
        blocks = stripes.blocks(stripe)
        assert [block.piece for block in blocks] == list(range(n))
        assert sorted(block.member for block in blocks) == list(range(n))
        assert [block.member for block in blocks[n - m :]] == [(stripe + row) % n for row in range(m)]
        data = [block.member for block in blocks[: n - m]]
        assert data == sorted(data) and not any(block.parity for block in blocks[: n - m])
        longest = max(block.nbytes for block in blocks[: n - m])
        assert {block.nbytes for block in blocks[n - m :]} == {longest}


def test_layout_of_four_members_with_two_parities() -> None:
    stripes = Stripes(image_nbytes=(8192, 5000, 0, 8000), num_parity=2)
    assert (stripes.block_bytes, stripes.parity_nbytes) == (4096, 8192)
    assert [[(b.member, b.parity, b.start, b.stop) for b in stripes.blocks(s)] for s in range(4)] == [
        [(2, False, 0, 0), (3, False, 0, 4096), (0, True, 0, 4096), (1, True, 4096, 8192)],
        [(0, False, 0, 4096), (3, False, 4096, 8000), (1, True, 0, 4096), (2, True, 4096, 8192)],
        [(0, False, 4096, 8192), (1, False, 0, 4096), (2, True, 0, 4096), (3, True, 4096, 8192)],
        [(1, False, 4096, 5000), (2, False, 0, 0), (3, True, 0, 904), (0, True, 4096, 5000)],
    ]
    assert str(rebuild_plan(stripes, 1, lost=[1, 2])).splitlines() == [
        "member 1 makes 13192 bytes from 26192",
        "  stripe 0: parity of member 1 [4096, 8192) from image of member 3 [0, 4096), parity of member 0 [0, 4096)",
        "  stripe 1: parity of member 1 [0, 4096) from image of member 0 [0, 4096), image of member 3 [4096, 8000)",
        "  stripe 2: image of member 1 [0, 4096) from image of member 0 [4096, 8192), parity of member 3 [4096, 8192)",
        "  stripe 3: image of member 1 [4096, 5000) from parity of member 3 [0, 904), parity of member 0 [4096, 5000)",
    ]


class Group:
    """The memory of all members."""

    def __init__(self, stripes: Stripes, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.stripes = stripes
        self.code = code_for(stripes.num_data, stripes.num_parity)
        self.images = [random.integers(0, 256, size, np.uint8) for size in stripes.image_nbytes]
        self.parity = [np.zeros(stripes.parity_nbytes, np.uint8) for _ in self.images]

    def bytes_of(self, block: Block) -> Bytes:
        memory = self.parity if block.parity else self.images
        return memory[block.member][block.start : block.stop]

    def run(self, plan: Plan, image: Bytes, parity: Bytes, chunk_bytes: int) -> None:
        for step in plan.steps:
            rows = self.code.rows(have=step.have, wanted=[step.target.piece])
            for chunk in step.chunks(chunk_bytes):
                target = (parity if chunk.target.parity else image)[chunk.target.start : chunk.target.stop]
                sources = [self.bytes_of(source)[: target.size] for source in chunk.sources]
                code_blocks(sources, [target], rows)

    def encode(self, chunk_bytes: int) -> None:
        for member in range(self.stripes.num_members):
            self.run(encode_plan(self.stripes, member), self.images[member], self.parity[member], chunk_bytes)


def sizes_of(n: int, seed: int) -> tuple[int, ...]:
    """Unequal ones, one of them zero, one that fills its blocks."""
    sizes = np.random.default_rng(seed).integers(0, 9000, n).tolist()
    sizes[seed % n], sizes[(seed + 1) % n] = 0, 9000
    return tuple(sizes)


@pytest.mark.parametrize(("n", "m"), [(n, m) for n in range(2, 9) for m in range(1, n)])
def test_any_m_lost_members_come_back(n: int, m: int) -> None:
    stripes = Stripes(image_nbytes=sizes_of(n, seed=10 * n + m), num_parity=m)
    group = Group(stripes, seed=n)
    group.encode(chunk_bytes=3000)
    patterns = [lost for count in range(1, m + 1) for lost in combinations(range(n), count)]
    for lost in patterns:
        for member in lost:
            plan = rebuild_plan(stripes, member, lost=lost)
            assert not set(plan.read_nbytes) & set(lost)
            image = np.full(stripes.image_nbytes[member], 7, np.uint8)
            parity = np.zeros(stripes.parity_nbytes, np.uint8)
            group.run(plan, image, parity, chunk_bytes=5000)
            assert image.tobytes() == group.images[member].tobytes(), (lost, member)
            assert parity.tobytes() == group.parity[member].tobytes(), (lost, member)


@pytest.mark.parametrize("coder", [choice.REFERENCE, *choice.coders_available()])
def test_parity_is_the_same_from_every_coder_and_in_any_chunks(coder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stripes, found = Stripes(image_nbytes=(20_000, 0, 7, 12_289, 20_001), num_parity=2), []
    for chunk_bytes in (1000, 4096, 1 << 20):
        monkeypatch.setenv(choice.CODER_VARIABLE, coder)
        group = Group(stripes, seed=1)
        group.encode(chunk_bytes)
        monkeypatch.setenv(choice.CODER_VARIABLE, choice.REFERENCE)
        plain = Group(stripes, seed=1)
        plain.encode(1 << 30)
        found.append([a.tobytes() for a in group.parity] == [b.tobytes() for b in plain.parity])
    assert found == [True] * 3


@given(geometries(), st.data())
def test_plans_read_k_blocks_per_stripe_and_nothing_after_the_end_of_an_image(
    stripes: Stripes, data: st.DataObject
) -> None:
    m, k = stripes.num_parity, stripes.num_data
    everyone = range(stripes.num_members)
    lost = data.draw(st.lists(st.sampled_from(list(everyone)), min_size=1, max_size=m, unique=True))
    for plan in (rebuild_plan(stripes, lost[0], lost=lost), encode_plan(stripes, lost[0])):
        for step in plan.steps:
            assert len(set(step.have)) == k and step.target.piece not in step.have
            assert all(read.nbytes for read in step.reads)
            for block in (step.target, *step.reads):
                size = stripes.parity_nbytes if block.parity else stripes.image_nbytes[block.member]
                assert 0 <= block.start < block.stop <= size
    plan = rebuild_plan(stripes, lost[0], lost=lost)
    parity = sum(block.nbytes for block in stripes.parity_blocks(lost[0]))
    assert plan.written_nbytes == stripes.image_nbytes[lost[0]] + parity


def test_survivors_share_the_reads_of_a_rebuild() -> None:
    stripes = Stripes(image_nbytes=(1 << 30,) * 10, num_parity=3)
    read = rebuild_plan(stripes, 4, lost=[4]).read_nbytes
    assert sorted(read) == [member for member in range(10) if member != 4]
    assert max(read.values()) <= 1.2 * sum(read.values()) / 9
    assert sum(read.values()) <= 7 * (stripes.image_nbytes[4] + stripes.parity_nbytes)


@given(st.integers(1, 200_000), st.integers(1, 50_000), st.integers(0, 200_000))
def test_chunks_cover_a_step_once_and_keep_the_order_of_sources(size: int, chunk_bytes: int, short: int) -> None:
    target = Block(stripe=0, piece=2, member=2, parity=True, start=4096, stop=4096 + size)
    whole = Block(stripe=0, piece=0, member=0, parity=False, start=100, stop=100 + size)
    ends = Block(stripe=0, piece=1, member=1, parity=False, start=50, stop=50 + min(short, size))
    chunks = list(Step(target=target, sources=(whole, ends)).chunks(chunk_bytes))
    for place, block in [(lambda c: c.target, target), (lambda c: c.sources[0], whole), (lambda c: c.sources[1], ends)]:
        edges = [place(chunk).start for chunk in chunks] + [block.stop]
        assert edges[0] == block.start and [place(chunk).stop for chunk in chunks] == edges[1:]
    for chunk in chunks:
        assert chunk.target.nbytes == chunk.sources[0].nbytes <= chunk_bytes
        assert chunk.sources[1].nbytes <= chunk.target.nbytes
        assert chunk.have == (0, 1)


def test_nothing_to_protect_needs_no_steps() -> None:
    stripes = Stripes(image_nbytes=(0, 0, 0), num_parity=1)
    assert (stripes.block_bytes, stripes.parity_nbytes) == (0, 0)
    assert encode_plan(stripes, 0).steps == rebuild_plan(stripes, 0, lost=[0]).steps == ()


def test_impossible_geometry_and_plans_are_refused() -> None:
    for sizes, parity in (((1, 1), 2), ((1, 1), 0), ((), 1), ((1,) * 70, 2), ((1,) * 80, 40), ((1, -1), 1)):
        with pytest.raises(InvalidInputError):
            Stripes(image_nbytes=sizes, num_parity=parity)
    stripes = Stripes(image_nbytes=(5, 5, 5, 5), num_parity=2)
    with pytest.raises(InvalidInputError, match=r"members \[0, 1, 3\] are lost, and 2 of 4 may be") as caught:
        rebuild_plan(stripes, 0, lost=[0, 1, 3])
    assert caught.value.kind == "too-many-lost"
    with pytest.raises(InvalidInputError, match="member 0 is not lost"):
        rebuild_plan(stripes, 0, lost=[1])
    for member in (-1, 4):
        with pytest.raises(InvalidInputError, match="members are 0 to 3"):
            rebuild_plan(stripes, member, lost=[member])
        with pytest.raises(InvalidInputError, match="members are 0 to 3"):
            encode_plan(stripes, member)
    with pytest.raises(InvalidInputError, match="`chunk_bytes` must be at least 1"):
        list(encode_plan(stripes, 0).steps[0].chunks(0))
