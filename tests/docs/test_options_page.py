"""Goal: the options page is the options record. Method: compare names, defaults and order."""

from __future__ import annotations

import dataclasses
import pathlib
import re

from ckpt.config import Options

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "reference" / "options.md"


def test_the_page_lists_every_option_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)

    assert [(name, default) for name, default, _ in rows] == [
        (field.name, str(field.default)) for field in dataclasses.fields(Options)
    ]
