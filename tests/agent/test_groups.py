"""Every rank is in one group, ranks of one host are in different ones, and domains are spread as evenly as can be.

Method: hypothesis draws of hosts, domains and numbers against those three sentences; cases whose groups are written down;
topology files that say nothing usable.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.agent.groups import Grouping, Member, place
from ckpt.agent.topology import domain_of, read_topology
from ckpt.config import TOPOLOGY_BYTES_MAX
from ckpt.errors import InvalidInputError


def members(ranks_of: dict[str, list[int]]) -> list[Member]:
    """`{"rack0": [2, 2]}`: two hosts with two ranks each in that domain. Ranks run on from host to host."""
    found: list[Member] = []
    for domain, hosts in ranks_of.items():
        for i, count in enumerate(hosts):
            ranks = range(len(found), len(found) + count)
            found += [Member(rank=rank, host=f"{domain}-host{i}", domain=domain) for rank in ranks]
    return found


def kinds(grouping: Grouping) -> list[str]:
    return sorted({concern.kind for concern in grouping.concerns})


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=6),
    st.integers(2, 9),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_groups_keep_their_promises(
    domains: list[list[int]], group_size: int, parity: int, shuffled: random.Random
) -> None:
    job = members({f"rack{i}": hosts for i, hosts in enumerate(domains)})
    host_of, domain_of_rank = {m.rank: m.host for m in job}, {m.rank: m.domain for m in job}
    hosts = Counter(host_of.values())
    most = max(hosts.values())
    possible = parity < group_size and parity < len(job) and (len(hosts) == 1 or len(job) // most > parity)
    try:
        grouping = place(job, group_size=group_size, parity=parity)
    except InvalidInputError:
        assert not possible
        return
    assert possible
    sizes = [len(group.ranks) for group in grouping.groups]
    assert sorted(rank for group in grouping.groups for rank in group.ranks) == list(range(len(job)))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1 and sizes[-1] > parity
    for group in grouping.groups:
        assert len(hosts) == 1 or len({host_of[rank] for rank in group.ranks}) == len(group.ranks)
        for domain, count in Counter(domain_of_rank[rank] for rank in group.ranks).items():
            in_domain = sum(member.domain == domain for member in job)
            assert count <= math.ceil(in_domain / len(sizes))  # no other dealing could have less in its fullest group
            told = any(c.kind == "domain-too-large" and c.group == group.number for c in grouping.concerns)
            assert told or count <= parity or len(hosts) == 1
    shuffled.shuffle(job)
    assert place(job, group_size=group_size, parity=parity) == grouping  # every rank computes the same


@pytest.mark.parametrize(
    ("world", "group_size", "sizes"),
    [
        (8, 8, [8]), (16, 8, [8, 8]), (17, 8, [9, 8]), (18, 8, [9, 9]), (20, 8, [10, 10]), (21, 8, [7, 7, 7]),
        (12, 8, [12]), (13, 8, [7, 6]), (11, 8, [11]), (5, 8, [5]), (3, 8, [3]), (7, 3, [4, 3]), (4, 3, [4]),
        (1020, 10, [10] * 102), (60, 10, [10] * 6),
    ],
)  # fmt: skip
def test_a_world_that_is_not_divided_makes_even_groups_of_the_nearest_size(
    world: int, group_size: int, sizes: list[int]
) -> None:
    grouping = place(members({f"h{i}": [1] for i in range(world)}), group_size=group_size, parity=2)
    assert [len(group.ranks) for group in grouping.groups] == sizes
    expected = ["smaller-groups"] * (sizes[-1] < group_size) + ["larger-groups"] * (sizes[0] > group_size)
    assert kinds(grouping) == sorted(expected)


def test_four_hosts_of_two_ranks_in_two_racks() -> None:
    grouping = place(members({"rack0": [2, 2], "rack1": [2, 2]}), group_size=4, parity=2)
    assert [group.ranks for group in grouping.groups] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert grouping.concerns == ()
    assert [grouping.group_of(rank).number for rank in range(8)] == [0, 1] * 4
    with pytest.raises(InvalidInputError, match="rank 8 is in no group"):
        grouping.group_of(8)


def test_a_domain_with_more_members_than_parity_is_told() -> None:
    grouping = place(members({"rack0": [2, 2], "rack1": [2, 2]}), group_size=4, parity=1)
    assert kinds(grouping) == ["domain-too-large"]
    assert "2 of its 4 ranks in failure domain rack0, of which only 1 may be lost" in grouping.concerns[0].message


def test_one_host_makes_groups_and_says_so_loudly() -> None:
    grouping = place(members({"box": [8]}), group_size=4, parity=1)
    assert [group.ranks for group in grouping.groups] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert [concern.kind for concern in grouping.concerns] == ["one-host"]
    assert "box-host0" in grouping.concerns[0].message


def test_full_hosts_make_smaller_groups_and_the_cost_is_told() -> None:
    grouping = place(members({f"rack{i}": [8] for i in range(4)}), group_size=8, parity=1)
    assert [len(group.ranks) for group in grouping.groups] == [4] * 8
    assert [concern.kind for concern in grouping.concerns] == ["smaller-groups"]
    assert "33% of a snapshot's memory instead of 14%" in grouping.concerns[0].message


@pytest.mark.parametrize(
    ("job", "group_size", "parity", "expected"),
    [
        ({}, 4, 2, "no members"),
        ({"a": [1] * 8}, 4, 4, "`parity` must be less than `group_size`, found 4 and 4"),
        ({"a": [1] * 8}, 4, 0, "`parity` must be at least 1"),
        ({"a": [1, 1]}, 4, 2, "less than the 2 ranks of the job"),
        ({"a": [8], "b": [8]}, 8, 2, "the 8 ranks of host b-host0 must be in as many groups"),
        ({"a": [4], "b": [1]}, 4, 1, "5 ranks on 2 hosts make groups of 1 then"),
        ({"a": [1] * 99}, 99, 2, "at most 32 parity and 64 other"),
        ({"a": [1] * 99}, 99, 40, "at most 32 parity"),
        ({"a": [1] * 69}, 66, 34, "at most 32 parity"),
    ],
)
def test_numbers_that_make_no_groups_are_refused(
    job: dict[str, list[int]], group_size: int, parity: int, expected: str
) -> None:
    with pytest.raises(InvalidInputError, match=expected):
        place(members(job), group_size=group_size, parity=parity)


def test_members_that_contradict_each_other_are_refused() -> None:
    here = Member(rank=0, host="a", domain="x")
    with pytest.raises(InvalidInputError, match="rank 0 is there 2 times"):
        place([here, Member(rank=0, host="b", domain="x")], group_size=2, parity=1)
    with pytest.raises(InvalidInputError, match="host a is in two failure domains, x and y"):
        place([here, Member(rank=1, host="a", domain="y")], group_size=2, parity=1)
    with pytest.raises(InvalidInputError, match="`rank` must not be negative"):
        Member(rank=-1, host="a", domain="x")


def test_groups_never_outgrow_a_code() -> None:
    grouping = place(members({f"h{i}": [1] for i in range(99)}), group_size=66, parity=2)
    assert [len(group.ranks) for group in grouping.groups] == [50, 49]


def test_domain_is_the_given_one_then_the_files_then_the_host(tmp_path: Path) -> None:
    file = tmp_path / "topology.yaml"
    file.write_text("# racks\nnode1: rack-7\n'node2': 07\nnode3: rack-7\n")
    topology = read_topology(file)
    assert topology == {"node1": "rack-7", "node2": "07", "node3": "rack-7"}
    assert [domain_of(host, topology=topology) for host in ("node1", "node2", "node9")] == ["rack-7", "07", "node9"]
    assert (domain_of("node1", given="power-a", topology=topology), domain_of("node1")) == ("power-a", "node1")
    assert domain_of("node1", given="", topology=topology) == "rack-7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "must map hosts to failure domains"),
        (b"- node1\n", "must map hosts"),
        (b"node1: [a, b]\n", "line 1 must be `host: domain`"),
        (b"node1: a\nnode2:\n", "line 2 must be `host: domain`"),
        (b"node1: a\nnode1: b\n", "line 2 names host node1 again"),
        (b"node1: {\n", "is not YAML"),
        (b"node1: \xff\xfe\n", "is not YAML"),
        (b"[" * 100_000, "is not YAML"),
        (b"#" * (TOPOLOGY_BYTES_MAX + 1), "has over"),
        (b"node1: !!python/object:os.system rack\nnode2: {a: b}\n", "line 2 must be"),
    ],
)
def test_topology_file_that_says_nothing_usable_is_refused(text: bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "topology.yaml"
    file.write_bytes(text)
    with pytest.raises(InvalidInputError, match=expected) as caught:
        read_topology(file)
    assert caught.value.kind == "bad-topology" and str(file) in caught.value.message


def test_topology_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read: No such file"):
        read_topology(tmp_path / "none.yaml")
