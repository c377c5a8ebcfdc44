"""The command line: one file per command, one printer for everything that it says.

In: arguments. Out: data on stdout, all else on stderr, and an exit code (docs/reference/command-line.md).
"""

from ckpt.cli.program import main, run

__all__ = ["main", "run"]
