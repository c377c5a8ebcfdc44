"""A process that makes one save: `python -m tests.commit.saver save URL STEP ATTEMPT`. Exit code: that of the error."""

from __future__ import annotations

import sys

from ckpt.errors import CheckpointError
from ckpt.store.open import open_store
from tests.commit.conftest import OPTIONS, save


def main(arguments: list[str]) -> int:
    """Save, and say how it went."""
    _, url, step, attempt = arguments
    try:
        save(open_store(url, options=OPTIONS), int(step), attempt)
    except CheckpointError as error:
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
