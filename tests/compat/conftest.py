"""Lets these tests use the samples of tests/format."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "format"))
