"""Let background work give way to training.

In: a nice value. Out: what is in force for the calling thread. Never touches another thread, and never raises where the
system refuses.
"""

from __future__ import annotations

import os
import sys
import threading


def set_thread_nice(nice: int) -> int:
    """Give the calling thread the nice value `nice` (0 to 19; higher gives way); returns the one in force afterwards.

    On Linux a nice value belongs to a thread, and threads that it starts, those of native calls included, inherit it.
    It can be raised by anybody but lowered again only with a privilege, so call it on threads of your own. Elsewhere,
    where it belongs to the process, nothing is changed.
    """
    if sys.platform != "linux":
        return 0
    thread = threading.get_native_id()
    try:
        os.setpriority(os.PRIO_PROCESS, thread, nice)
    except OSError:
        pass  # what is in force says it
    return os.getpriority(os.PRIO_PROCESS, thread)
