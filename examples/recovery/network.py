"""Addresses for nodes: network namespaces behind a bridge, or loopback addresses where those cannot be made.

In: numbers of nodes. Out: addresses, prefixes of commands, links that can be cut. Needs root and iproute2 for namespaces; makes
only names that begin with `ckpt-` and this process's id, and removes them. Never touches another interface.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Protocol

_COMMAND_S = 20.0
_TRIAL = 253  # number of a node that is made to see whether that works


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a node is on the network."""

    address: str
    prefix: tuple[str, ...]  # of the commands that run there
    environment: dict[str, str]


class Network(Protocol):
    """Makes places for nodes."""

    host: str  # the address at which this process is reached

    def add(self, number: int) -> Place:
        """A place, from 1 on."""

    def cut(self, number: int) -> None:
        """Nothing gets through any more."""

    def remove(self, number: int) -> None:
        """What was made for it."""

    def close(self) -> None:
        """All of it. May be called twice."""


class Loopback:
    """Addresses 127.0.0.x of one interface. Its links cannot be cut: who is killed is told to its peers by the kernel."""

    host = "127.0.0.1"

    def add(self, number: int) -> Place:
        address = f"127.0.0.{10 + number}"
        return Place(address=address, prefix=(), environment={"GLOO_SOCKET_IFNAME": "lo", "NODE_ADDRESS": address})

    def cut(self, number: int) -> None:
        pass

    def remove(self, number: int) -> None:
        pass

    def close(self) -> None:
        pass


class Namespaces:
    """A bridge and one network namespace per node. OSError when the system does not let us make them."""

    def __init__(self) -> None:
        self._id = os.getpid()
        self._subnet = f"10.{200 + self._id % 50}.{self._id // 50 % 250}"
        self._bridge = f"ck{self._id}b"
        self._made: set[int] = set()
        self.host = f"{self._subnet}.254"
        try:
            # A fixed address: a bridge takes the lowest of its ports' else, so that with every node that comes or goes all others
            # may send to an address that is gone, until the entry in their tables has aged (45 s and more were seen).
            _ip("link", "add", self._bridge, "address", _bridge_address(self._id), "type", "bridge")
            _ip("addr", "add", f"{self.host}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            self.add(_TRIAL)
            self._check(_TRIAL)
            self.remove(_TRIAL)
        except BaseException:
            self.close()
            raise

    def _name(self, number: int) -> str:
        return f"ckpt-{self._id}-{number}"

    def _links(self, number: int) -> tuple[str, str]:
        """Names have 15 characters at most."""
        return f"ck{self._id}h{number}", f"ck{self._id}n{number}"

    def add(self, number: int) -> Place:
        name, (outer, inner) = self._name(number), self._links(number)
        address = f"{self._subnet}.{number}"
        self._made.add(number)
        _ip("netns", "add", name)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        _ip("link", "set", outer, "master", self._bridge, "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", inner)
        _ip("-n", name, "link", "set", inner, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return Place(address=address, prefix=("ip", "netns", "exec", name), environment={"GLOO_SOCKET_IFNAME": inner})

    def _check(self, number: int) -> None:
        """That the two sides reach each other: a firewall may forbid it."""
        address = f"{self._subnet}.{number}"
        script = (
            f"import socket; s = socket.create_server(({address!r}, 0)); print(s.getsockname()[1], flush=True);"
            " s.settimeout(5); s.accept()"
        )
        prefix = ["ip", "netns", "exec", self._name(number)]
        server = subprocess.Popen([*prefix, sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            socket.create_connection((address, port), timeout=3.0).close()
        finally:
            server.kill()
            server.communicate()

    def cut(self, number: int) -> None:
        _ip("link", "set", self._links(number)[0], "down")

    def remove(self, number: int) -> None:
        """At once: with the namespace alone, the link would go some time later."""
        if number in self._made:
            self._made.discard(number)
            _ip("link", "del", self._links(number)[0])
            _ip("netns", "del", self._name(number))

    def close(self) -> None:
        for number in list(self._made):
            try:
                self.remove(number)
            except OSError:
                pass  # it was not made
        try:
            _ip("link", "del", self._bridge)
        except OSError:
            pass  # nor was the bridge


def _bridge_address(number: int) -> str:
    """A hardware address of local administration."""
    return ":".join(["02", "c7", *(f"{number >> shift & 0xFF:02x}" for shift in (24, 16, 8, 0))])


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def make_network(*, loopback: bool = False) -> tuple[Network, str]:
    """The best that can be had, and in words what and why."""
    if loopback:
        return Loopback(), "loopback addresses, as asked for"
    if os.geteuid() != 0:
        return Loopback(), "loopback addresses: network namespaces need root"
    if shutil.which("ip") is None:
        return Loopback(), "loopback addresses: network namespaces need iproute2"
    try:
        return Namespaces(), "network namespaces with a bridge"
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Loopback(), f"loopback addresses: no network namespaces here ({error})"
