"""`python -m ckpt.agent`: the process that spawn.py starts. People use `ckpt agent run`.

In: arguments. Out: an exit code; one line of JSON to the descriptor `--ready-fd` when it serves, or why it does not. With
`--detach` it leaves its parent first, while nothing else is imported: whoever started it waits for a process that ends at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping
from typing import TextIO


def main() -> int:
    """Parse, detach, run."""
    parser = argparse.ArgumentParser(prog="python -m ckpt.agent", allow_abbrev=False)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--options", default="{}", help="JSON: those that are not the default")
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--ready-fd", type=int, default=-1)
    parser.add_argument("--say", choices=("text", "json", "nothing"), default="text", help="for `ckpt agent run`")
    given = parser.parse_args()
    if given.detach:
        if os.fork():
            os._exit(0)
        os.setsid()  # the parent led a session; its child is in no group that anybody kills
    return _run(given)


def _run(given: argparse.Namespace) -> int:
    import json
    import uuid

    from ckpt.agent import process, wire
    from ckpt.agent.identity import Identity
    from ckpt.agent.member import Member
    from ckpt.config import Options
    from ckpt.errors import CheckpointError

    def tell(document: dict[str, object]) -> None:
        if given.ready_fd >= 0:
            with contextlib.suppress(BrokenPipeError):  # who started it is dead: the next trainer finds it
                os.write(given.ready_fd, json.dumps(document).encode() + b"\n")
            os.close(given.ready_fd)
            given.ready_fd = -1

    try:
        identity = Identity(run_id=uuid.UUID(hex=given.run_id), rank=given.rank, world=given.world)
        options = Options(**json.loads(given.options))
        _say(given, sys.stderr, f"agent {identity.label} of run {identity.run_id} starts, pid {os.getpid()}")
        reason = process.run(identity, options, plugins=[Member()], on_ready=lambda: tell({"pid": os.getpid()}))
        _say(given, sys.stderr, f"ended: {reason}")
        _say(given, sys.stdout, document={"action": "run", "reason": reason})
        return 0
    except CheckpointError as error:
        record = wire.described(error)
        tell(record)
        del record["class"]
        document = {"error": {**record, "exit_code": error.exit_code, "context": {}}}
        _say(given, sys.stderr, f"error: {error}", document=document)
        return error.exit_code


def _say(
    given: argparse.Namespace, stream: TextIO, text: str = "", *, document: Mapping[str, object] | None = None
) -> None:
    """A line for a person, or a document for a program, whichever was asked for."""
    import json

    if given.say == "text" and text:
        print(text, file=stream, flush=True)  # noqa: T201 - this is a program
    if given.say == "json" and document is not None:
        print(json.dumps(document, indent=2), file=stream, flush=True)  # noqa: T201 - this is a program


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is given back; threads that wait for a peer that is stopped would keep the process for minutes
