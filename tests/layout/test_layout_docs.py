"""Goal: the reference of layout files is true.

Method: read every example in it, and check its numbers and its lists of keys.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ckpt.layout.document import from_document, to_document
from ckpt.layout.files import read_layout
from ckpt.layout.layout import Layout
from ckpt.layout.presets import PRESETS
from ckpt.layout.rules import Flat, Rule, Where

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "layout-files.md").read_text()
EXAMPLES = re.findall(r"```(?:yaml|json)\n(.*?)```", PAGE, re.DOTALL)


def example(part: str) -> Layout:
    (text,) = [text for text in EXAMPLES if part in text]
    return read_layout(text)


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_is_a_layout(text: str) -> None:
    layout = read_layout(text)
    assert from_document(to_document(layout)) == layout


def test_the_first_example_places_what_the_text_says() -> None:
    layout = read_layout(EXAMPLES[0])
    assert layout.mesh.coordinate(3) == (0, 1, 1)
    name, shape = "model/layers.17.attention.wq.weight", (8, 8)
    held = {rank: layout.place(name, shape, rank) for rank in range(8)}
    rows = {rank: p.placed[0].box.offsets[0] for rank, p in held.items() if p is not None}
    assert rows == {4: 0, 5: 4, 6: 2, 7: 6}
    assert layout.place("optimizer/layers.17.attention.wq.weight/exp_avg", shape, 7) == held[7]


def test_the_padded_vocabulary_has_the_stated_rows() -> None:
    layout = example("pad:")
    last = layout.place("model/output.weight", (50257, 8), 3)
    assert last is not None and last.local_shape == (12672, 8)
    assert last.placed[0].box.lengths[0] == 50257 - 3 * 12672
    assert layout.infer_global_shape("model/output.weight", last.local_shape) == (50257, 8)


def test_the_optimizer_example_cuts_only_the_state() -> None:
    layout = example('match: "optimizer/**"')
    param = layout.place("model/w", (16,), 1)
    state = layout.place("optimizer/w/exp_avg", (16,), 1)
    assert param is not None and state is not None
    assert (param.local_shape, state.local_shape) == ((16,), (2,))


def test_the_tables_list_every_key_and_preset() -> None:
    rules = PAGE[PAGE.index("## Rules") : PAGE.index("### match")]
    keys = {field.name for record in (Rule, Where) for field in dataclasses.fields(record)} - {"where"}
    assert set(re.findall(r"^\| `(\w+)` \|", rules, re.MULTILINE)) == keys
    flat = PAGE[PAGE.index("### flat") : PAGE.index("### optimizer")]
    assert set(re.findall(r"^\| `(\w+)` \|", flat, re.MULTILINE)) == {field.name for field in dataclasses.fields(Flat)}
    degrees = PAGE[PAGE.index("## From degrees") : PAGE.index("## Errors")]
    assert tuple(re.findall(r"^\| `(\w+)` \|", degrees, re.MULTILINE)) == PRESETS
