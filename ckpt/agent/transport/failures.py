"""Which `PeerError` an error of Flight stands for.

In: what pyarrow raised, and whether bytes had arrived. Out: a `PeerError` with a stable kind. Pure.
"""

from __future__ import annotations

import json

import pyarrow.flight as flight

from ckpt.errors import PeerError

_TOLD_BYTES_MAX = 8192
_MESSAGE_CHARS_MAX = 300


def peer_error(error: Exception, address: str, *, started: bool) -> PeerError:
    """What happened, by what the peer said where it said something. `started`: bytes of a transfer had arrived."""
    told = _told(error)
    if told is not None:
        # What is asked for again begins at the first byte, where some bytes may have been taken already.
        is_late = started and told[0] == "peer-no-session"
        return PeerError(f"{address}: {told[1]}", kind="peer-truncated" if is_late else told[0])
    kind = "peer-damaged"
    if isinstance(error, flight.FlightTimedOutError):
        kind = "peer-late"
    elif isinstance(error, flight.FlightUnavailableError | flight.FlightCancelledError):
        kind = "peer-truncated" if started else "peer-unreachable"
    first_line = str(error).partition("\n")[0][:_MESSAGE_CHARS_MAX]
    return PeerError(f"{address}: {first_line or type(error).__name__}", kind=kind)


def _told(error: Exception) -> tuple[str, str] | None:
    """(kind, message) of an agent's own error."""
    extra = getattr(error, "extra_info", None) or b""
    if not isinstance(extra, bytes) or not 0 < len(extra) <= _TOLD_BYTES_MAX:
        return None
    try:
        body = json.loads(extra)
        kind, message = body["kind"], body["message"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(kind, str) or not kind.replace("-", "").isalnum() or not isinstance(message, str):
        return None
    return kind[:64], message[:1000]
