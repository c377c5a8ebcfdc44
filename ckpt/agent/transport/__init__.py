"""Bytes and small messages between agents: Arrow Flight over TCP, by pulling, for those who know the run's secret.

In: what an agent holds (`Holder`), credentials, keys and ranges. Out: bytes in the caller's memory, checked by length and
checksum, or a `PeerError`. Never pushes, never pickles, never waits longer than it was told. See
docs/reference/agent-transport.md.
"""

from ckpt.agent.transport.client import Peer, Range
from ckpt.agent.transport.credentials import Credentials, Tls
from ckpt.agent.transport.server import Holder, Server
from ckpt.agent.transport.wire import Key

__all__ = ["Credentials", "Holder", "Key", "Peer", "Range", "Server", "Tls"]
