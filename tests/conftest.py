"""What every test runs under: hypothesis profiles, and a check that no test leaves a thread behind.

Profiles (HYPOTHESIS_PROFILE): `default` for the desk, `ci` (chosen when CI is set) draws the same examples each time
and has no deadline, `nightly` draws many more.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Shared machines stall for seconds; a deadline per example would fail tests that are right.
_BASE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", parent=_BASE, max_examples=50)
settings.register_profile("ci", parent=_BASE, max_examples=50, derandomize=True, database=None, print_blob=True)
settings.register_profile("nightly", parent=_BASE, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))

_LEAK_GRACE_S = 2.0  # a thread that is on its way out may take this long


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    """Fail the test that started a non-daemon thread and left it running: it would keep a training job from exiting."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + _LEAK_GRACE_S
    while (leaked := _new_threads(before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if leaked:
        pytest.fail(f"the test left threads running: {sorted(thread.name for thread in leaked)}")


def _new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [
        thread for thread in threading.enumerate() if thread not in before and not thread.daemon and thread.is_alive()
    ]
