"""Put the members of a job into groups that protect each other.

In: who runs where, in any order. Out: groups, and what about them is worse than asked for. Pure: no I/O, no clock, no randomness;
every rank gets the same from the same members. Never puts two ranks of one host into one group while there is another host.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ckpt.errors import InvalidInputError
from ckpt.kernels.erasure import SOURCES_MAX, TARGETS_MAX


@dataclass(frozen=True, kw_only=True)
class Member:
    """One rank."""

    rank: int
    host: str
    domain: str  # what fails together: a rack, a switch, a power line; the host itself when nothing is known

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise InvalidInputError(f"`rank` must not be negative, found {self.rank}")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that hold parity for each other; any `num_parity` of them may be lost."""

    number: int
    ranks: tuple[int, ...]  # ascending; the place in it is the member's number in ckpt.agent.stripes
    num_parity: int


@dataclass(frozen=True, kw_only=True)
class Concern:
    """Something that the user should know. Not an error: the groups work, but survive less than their numbers say."""

    kind: str  # one-host, domain-too-large, smaller-groups, larger-groups; append-only
    message: str
    group: int | None = None


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """All groups of a job, each rank in one of them."""

    groups: tuple[Group, ...]
    concerns: tuple[Concern, ...]

    def group_of(self, rank: int) -> Group:
        """The group that `rank` is in."""
        for group in self.groups:
            if rank in group.ranks:
                return group
        raise InvalidInputError(f"rank {rank} is in no group")


def place(members: Iterable[Member], *, group_size: int, parity: int) -> Grouping:
    """Groups of about `group_size`, `parity` of which may be lost in each.

    The number of groups is world / group_size rounded to the nearest, of two that are equally near the smaller. It is raised
    so that each rank of the fullest host has a group of its own, and lowered so that every group has more members than parity.
    Sizes differ by at most one, the larger groups first. Members are dealt out in the order of domain, host and rank: this puts
    the ranks of a host into different groups, and spreads a domain as evenly as can be.

    Raises:
        InvalidInputError: no groups of these numbers exist.
    """
    ordered = _ordered(members)
    _check(ordered, group_size, parity)
    hosts = Counter(member.host for member in ordered)
    number = _number_of_groups(len(ordered), hosts, group_size, parity)
    dealt = [ordered[i::number] for i in range(number)]
    groups = tuple(
        Group(number=i, ranks=tuple(sorted(member.rank for member in group)), num_parity=parity)
        for i, group in enumerate(dealt)
    )
    return Grouping(groups=groups, concerns=(*_of_sizes(groups, hosts, group_size), *_of_domains(dealt, hosts, parity)))


def _ordered(members: Iterable[Member]) -> list[Member]:
    ordered = sorted(members, key=lambda member: (member.domain, member.host, member.rank))
    ranks = Counter(member.rank for member in ordered)
    twice = sorted(rank for rank, count in ranks.items() if count > 1)
    if twice:
        raise InvalidInputError(f"rank {twice[0]} is there {ranks[twice[0]]} times")
    domains: dict[str, str] = {}
    for member in ordered:
        if domains.setdefault(member.host, member.domain) != member.domain:
            raise InvalidInputError(
                f"host {member.host} is in two failure domains, {domains[member.host]} and {member.domain}",
                hints=("CKPT_FAILURE_DOMAIN must be the same for all ranks of a host",),
            )
    return ordered


def _check(ordered: list[Member], group_size: int, parity: int) -> None:
    if not ordered:
        raise InvalidInputError("there are no members to put into groups")
    if parity < 1:
        raise InvalidInputError(f"`parity` must be at least 1, found {parity}")
    if parity >= group_size:
        raise InvalidInputError(f"`parity` must be less than `group_size`, found {parity} and {group_size}")
    if parity > TARGETS_MAX or group_size - parity > SOURCES_MAX:
        raise InvalidInputError(
            f"a group has at most {TARGETS_MAX} parity and {SOURCES_MAX} other members, found `parity` {parity} and"
            f" `group_size` {group_size}"
        )
    if parity >= len(ordered):
        raise InvalidInputError(f"`parity` must be less than the {len(ordered)} ranks of the job, found {parity}")


def _number_of_groups(world: int, hosts: Counter[str], group_size: int, parity: int) -> int:
    number = max(1, -((group_size - 2 * world) // (2 * group_size)))  # world / group_size - 1/2, rounded up
    number = max(number, math.ceil(world / (SOURCES_MAX + parity)))
    number = min(number, world // (parity + 1))  # at least one, as the world is larger than the parity
    if len(hosts) > 1:
        host, fullest = max(hosts.items(), key=lambda item: (item[1], item[0]))
        number = max(number, fullest)
        if world // number <= parity:
            raise InvalidInputError(
                f"`parity` {parity} needs groups of {parity + 1} or more: the {fullest} ranks of host {host} must be in as many"
                f" groups, and {world} ranks on {len(hosts)} hosts make groups of {world // number} then",
                hints=("use more hosts with equally many ranks each, or a smaller `parity`",),
            )
    if math.ceil(world / number) - parity > SOURCES_MAX:
        raise InvalidInputError(
            f"{world} ranks with `parity` {parity} make groups of over {SOURCES_MAX + parity} members"
        )
    return number


def _of_sizes(groups: tuple[Group, ...], hosts: Counter[str], group_size: int) -> list[Concern]:
    """The first group is the largest, the last the smallest."""
    found = []
    if len(groups[-1].ranks) < group_size:
        smallest, parity = len(groups[-1].ranks), groups[-1].num_parity
        found.append(
            Concern(
                kind="smaller-groups",
                message=f"groups of {smallest} rather than {group_size} ranks ({sum(hosts.values())} ranks on {len(hosts)}"
                f" hosts): parity takes {parity / (smallest - parity):.0%} of a snapshot's memory instead of"
                f" {parity / (group_size - parity):.0%}",
            )
        )
    if len(groups[0].ranks) > group_size:
        found.append(
            Concern(
                kind="larger-groups",
                message=f"groups of {len(groups[0].ranks)} rather than {group_size} ranks, of which {groups[0].num_parity} may"
                " be lost",
            )
        )
    return found


def _of_domains(dealt: list[list[Member]], hosts: Counter[str], parity: int) -> list[Concern]:
    if len(hosts) == 1:
        message = (
            f"all ranks are on one host, {next(iter(hosts))}: snapshots in memory survive trainers, but not the host"
        )
        return [Concern(kind="one-host", message=message)]
    found = []
    for number, group in enumerate(dealt):
        for domain, count in sorted(Counter(member.domain for member in group).items()):
            if count > parity:
                message = (
                    f"group {number} has {count} of its {len(group)} ranks in failure domain {domain}, of which only"
                    f" {parity} may be lost"
                )
                found.append(Concern(kind="domain-too-large", message=message, group=number))
    return found
