"""Libraries that only some users have.

In: the name of a module and of the extra of ckpt that brings it. Out: the module, or an error with the command to install it.
"""

from __future__ import annotations

import importlib
from typing import Any

from ckpt.errors import InvalidInputError


def needed(module: str, *, extra: str, what: str) -> Any:
    """The module. InvalidInputError (`missing-package`) where it, or a part of it, is not installed.

    Args:
        what: what needs it, to begin the message with.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InvalidInputError(
            f"{what} needs a package that is not installed: {error.name or module}",
            kind="missing-package",
            hints=(f"pip install 'ckpt[{extra}]'",),
        ) from error
