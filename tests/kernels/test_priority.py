"""A nice value belongs to the thread that asked for it."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from ckpt.kernels import set_thread_nice

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the nice value belongs to the process")


def nice_of_this_thread() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def run_aside(task: object) -> list[object]:
    out: list[object] = []
    thread = threading.Thread(target=lambda: out.append(task()))  # type: ignore[operator]
    thread.start()
    thread.join()
    return out


@linux
def test_only_the_calling_thread_and_those_it_starts_give_way() -> None:
    before = nice_of_this_thread()

    def task() -> tuple[int, int, list[object]]:
        return set_thread_nice(before + 3), nice_of_this_thread(), run_aside(nice_of_this_thread)

    assert run_aside(task) == [(before + 3, before + 3, [before + 3])]
    assert nice_of_this_thread() == before


@linux
def test_a_refusal_returns_what_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "injected")

    monkeypatch.setattr(os, "setpriority", refuse)
    assert run_aside(lambda: set_thread_nice(10)) == [nice_of_this_thread()]
