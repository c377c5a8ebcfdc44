"""Stretches of time side by side, so that none hides another.

In: events of one rank. Out: the lane of each. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.events import Event

_SLACK_S = 1e-6  # times since the epoch are doubles, 2.4e-7 apart


def lanes(events: Sequence[Event], *, nested: bool) -> list[int]:
    """For each event the number of its lane, from 0, as few lanes as it takes.

    Args:
        nested: whether an event may lie in a lane within a longer one, as in a flame graph.
    """
    order = sorted(range(len(events)), key=lambda i: (events[i].start_s, -events[i].seconds))
    out = [0] * len(events)
    open_until: list[list[float]] = []  # per lane, the ends of the events that are open there, outermost first
    for i in order:
        start, stop = events[i].start_s, events[i].start_s + events[i].seconds
        for ends in open_until:
            while ends and ends[-1] <= start + _SLACK_S:
                ends.pop()
        fits = (lane for lane, ends in enumerate(open_until) if not ends or (nested and stop <= ends[-1] + _SLACK_S))
        out[i] = next(fits, len(open_until))
        if out[i] == len(open_until):
            open_until.append([])
        open_until[out[i]].append(stop)
    return out
