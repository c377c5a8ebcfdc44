"""Change fragments are named so that a release can sort them, and short enough to read.

Method: look at every file of changes/.
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "changes"
NAME = re.compile(r"\d+\.(added|changed|fixed|removed|format)(\.\d+)?\.md")
FRAGMENT_CHARS_MAX = 1000


def test_fragments_have_a_name_of_the_rule_and_a_readable_length() -> None:
    fragments = [path for path in FOLDER.iterdir() if path.name != "README.md"]
    wrong = [path.name for path in fragments if not NAME.fullmatch(path.name)]
    wrong += [path.name for path in fragments if not 0 < len(path.read_text().strip()) <= FRAGMENT_CHARS_MAX]
    assert wrong == []
