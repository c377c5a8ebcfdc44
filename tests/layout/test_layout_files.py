"""Goal: a layout file says all of a layout and nothing else, and a fault in it is an error that says the line.

Method: hypothesis draws layouts for the round trips through YAML, JSON and plain data; faults are written out in full.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt.errors import InvalidInputError
from ckpt.layout.document import from_document, to_document
from ckpt.layout.files import read_layout, write_layout
from ckpt.layout.layout import Layout
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern
from ckpt.layout.rules import Experts, Flat, Pad, Parts, Pipeline, Rule, ShardStep, Where

GOOD = """version: 1
mesh: {pp: 2, dp: 2, tp: 2}
pipeline: {axis: pp, layers: 6}
rules:
  - match: "layers.{layer}.{wq,wk}.weight"
    shard: [{tp: 0}, {dp: 0}]
    optimizer: {flat: {axis: dp, multiple: 64}, shard: {tp: 0}}
  - match: [embedding.weight, head.weight]
    shard: {tp: 0, dp: 1}
    pad: {axis: tp, multiple: 8}
    stage: first
"""
TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="{}"), min_size=1, max_size=8
)


@st.composite
def wheres(draw: st.DrawFn, mesh: Mesh, pipeline: Pipeline | None) -> Where:
    axes = draw(st.permutations(mesh.names))
    cut = axes[: draw(st.integers(0, len(axes)))]
    steps = tuple(ShardStep(axis=axis, dim=draw(st.integers(0, 3))) for axis in cut)
    firsts = list({step.dim: step.axis for step in reversed(steps)}.values())
    free = [axis for axis in mesh.names if axis not in cut]
    special = draw(st.sampled_from(["none", "parts", "num", "pad"] if firsts else ["none"]))
    parts = pad = None
    if special == "parts":
        parts = Parts(axis=firsts[0], sizes=tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))))
    elif special == "num":
        parts = Parts(axis=firsts[0], num=draw(st.integers(1, 4)))
    elif special == "pad":
        pad = Pad(axis=firsts[0], multiple=draw(st.integers(1, 9)), size=draw(st.none() | st.integers(1, 99)))
    flat = None
    in_flat = draw(st.booleans())
    if free and in_flat:
        names: list[str] = draw(st.lists(TEXT, unique=True, max_size=3))
        order = tuple(names)
        flat = Flat(axis=free[0], multiple=draw(st.integers(1, 9)), order=order, name=draw(TEXT))
    on: dict[str, tuple[int, ...]] = {}
    for axis in free[1:]:
        on[axis] = tuple(sorted(draw(st.sets(st.integers(0, mesh.size(axis) - 1), min_size=1))))
    stages: list[object] = [None, "all"]
    if pipeline is not None:
        stages += ["first", "last", draw(st.integers(0, mesh.size(pipeline.axis) - 1))]
    return Where(
        shard=steps,
        parts=parts,
        pad=pad,
        experts=Experts(axis=mesh.names[0], num=draw(st.integers(1, 9))) if draw(st.booleans()) else None,
        stage=draw(st.sampled_from(stages)),
        on=tuple(sorted(on.items())),
        flat=flat,
        shape=draw(st.none() | st.lists(st.integers(0, 9), max_size=4).map(tuple)),
    )


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    names = draw(st.lists(st.sampled_from(["pp", "dp", "tp", "on", "y", "null"]), unique=True, min_size=1, max_size=4))
    mesh = Mesh(axes=tuple((name, draw(st.integers(1, 4))) for name in names))
    axis = names[0]
    pipeline = draw(
        st.none()
        | st.builds(Pipeline, axis=st.just(axis), layers=st.integers(1, 9))
        | st.builds(
            Pipeline,
            axis=st.just(axis),
            split=st.tuples(*[st.integers(1, 4)] * mesh.size(axis)),
        )
    )
    rules = []
    for _ in range(draw(st.integers(0, 3))):
        optimizer = draw(st.just("same") | st.just("none") | wheres(mesh, pipeline))
        patterns = [NamePattern("{layer}.{expert}." + text) for text in draw(st.lists(TEXT, min_size=1, max_size=2))]
        where = draw(wheres(mesh, pipeline))
        priority = draw(st.integers(-2, 2))
        rules.append(Rule(match=tuple(patterns), where=where, optimizer=optimizer, priority=priority))  # type: ignore[arg-type]
    return Layout(mesh=mesh, rules=tuple(rules), pipeline=pipeline)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts())
def test_every_layout_survives_yaml_json_and_plain_data(layout: Layout) -> None:
    document = to_document(layout)
    assert from_document(document) == layout
    assert from_document(json.loads(json.dumps(document, sort_keys=True))) == layout
    assert read_layout(write_layout(layout)) == layout
    assert read_layout(json.dumps(document, ensure_ascii=False, indent="\t")) == layout


def test_the_short_forms_mean_what_the_long_ones_do() -> None:
    layout = read_layout(GOOD)
    first, second = layout.rules
    assert layout.mesh.axes == (("pp", 2), ("dp", 2), ("tp", 2))
    assert first.where.shard == (ShardStep(axis="tp", dim=0), ShardStep(axis="dp", dim=0))
    assert first.optimizer == Where(shard=(ShardStep(axis="tp", dim=0),), flat=Flat(axis="dp", multiple=64))
    assert second.where.shard == (ShardStep(axis="tp", dim=0), ShardStep(axis="dp", dim=1))
    assert [pattern.text for pattern in second.match] == ["embedding.weight", "head.weight"]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("version: 1", "version: 2", 1, "version 2 are not known, expected 1"),
        ("version: 1", "version: one", 1, "must be a whole number, found 'one'"),
        ("rules:", "ruels:", 4, "unknown key `ruels` in a layout\nhint: did you mean `rules`?"),
        ("tp: 2}", "tp: 0}", 2, "axis `tp` must have a size of at least 1"),
        ("tp: 2}", "tp: 2, tp: 2}", 2, "key `tp` twice"),
        ("layers: 6", "layer: 6", 3, "did you mean `layers`?"),
        ("axis: pp, layers: 6", "layers: 6", 3, "`pipeline` has no `axis`"),
        ("layers: 6", "split: [1, 2, 3]", 3, "split into 3 stages, but axis `pp` has 2"),
        (
            "    shard: [{tp: 0}, {dp: 0}]",
            "    shrad: [{tp: 0}]",
            6,
            "unknown key `shrad` in a rule\nhint: did you mean",
        ),
        ("[{tp: 0}, {dp: 0}]", "{tp: 0, dp: 0}", 6, "write `shard` as a list"),
        ("[{tp: 0}, {dp: 0}]", "[{tp: 0}, {tp: 1}]", 5, "axis `tp` cuts the same tensor twice"),
        ("[{tp: 0}, {dp: 0}]", "[{tp: 0}, {cp: 0}]", 5, "names axis `cp`, but the mesh has pp, dp, tp"),
        ("[{tp: 0}, {dp: 0}]", "[{tp: -1}]", 5, "counted from 0"),
        ("[{tp: 0}, {dp: 0}]", "[tp, dp]", 6, "each entry of `shard` must be one `name: value`"),
        ("{flat: {axis: dp, multiple: 64}, shard: {tp: 0}}", "same-ish", 7, "must be `same`, `none` or a mapping"),
        ("multiple: 64", "multiples: 64", 7, "did you mean `multiple`?"),
        ("multiple: 64", "multiple: 0", 7, "multiple must be at least 1"),
        ("pad: {axis: tp, multiple: 8}", "pad: {axis: pp}", 8, "`pad` is for axis `pp`, which is not in `shard`"),
        ("stage: first", "stage: frist", 11, "must be `first`, `last`, `all` or a number, found 'frist'"),
        ("stage: first", "stage: 2", 8, "is on stage 2, but the pipeline has 0 to 1"),
        ("stage: first", "on: {pp: [2]}", 8, "is on pp [2], but the axis has 0 to 1"),
        ("stage: first", "parts: {axis: dp}", 11, "parts are given as `sizes` or as `num`"),
        ("stage: first", "experts: {axis: dp, num: 2}", 8, "has no `{expert}`, but its rule has `experts`"),
        ("[embedding.weight, head.weight]", '"a{b"', 8, "`{` without its partner"),
        ("[embedding.weight, head.weight]", "[[a]]", 8, "a name pattern must be text, found a list"),
        ("[embedding.weight, head.weight]", "[]", 8, "at least one name pattern"),
        ("stage: first", "stage: [first", 12, "not YAML"),
    ],
)
def test_a_fault_is_named_with_its_line(old: str, new: str, line: int, message: str) -> None:
    assert GOOD.count(old) >= 1
    with pytest.raises(InvalidInputError) as caught:
        read_layout(GOOD.replace(old, new, 1), source="my.yaml")
    assert str(caught.value).startswith(f"my.yaml line {line}: ")
    assert message in str(caught.value)
    assert caught.value.kind == "bad-layout"


def test_faults_of_plain_data_are_named_with_their_path() -> None:
    document = to_document(read_layout(GOOD))
    document["rules"][0]["shard"][1] = {"dp": "zero"}
    with pytest.raises(InvalidInputError, match=r"layout rules\[0\]\.shard\[1\]\.dp: dim of axis `dp` must be a whole"):
        from_document(document)
    wrong: object
    for wrong in ([], "x", {1: 2}, {"version": True}, {"version": 1, "mesh": {}, "rules": [1.5]}):
        with pytest.raises(InvalidInputError):
            from_document(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "[" * 500,
        "a: &a [*a]",
        "\x00",
        "--- 1\n--- 2\n",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: !!python/object/apply:os.system [ls]",
        "? [a]\n: b",
        "&a {version: 1, mesh: {<<: *a}, rules: []}",
    ],
)
def test_hostile_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        read_layout(text)


def test_aliases_that_unfold_without_end_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(InvalidInputError, match="too large"):
        read_layout("\n".join(lines))
