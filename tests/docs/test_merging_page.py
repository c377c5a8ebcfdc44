"""The page on merging has every method that ckpt brings. Method: compare its tables with the registry."""

from __future__ import annotations

import pathlib
import re

from ckpt.merge import registry

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "explanation" / "merging.md"


def test_the_tables_have_every_method_and_no_others() -> None:
    methods = PAGE.read_text(encoding="utf-8").partition("## Methods")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", methods, re.MULTILINE)
    ours = [name for name in registry.known() if registry.find(name).__module__.startswith("ckpt.merge.")]

    assert sorted(listed) == sorted(ours)
