"""Goal: rules mean what the reference says, and whatever does not fit is one error that names all of it.

Method: small layouts written out, one promise each.
"""

from __future__ import annotations

import numpy as np
import pytest

from ckpt.errors import InvalidInputError
from ckpt.layout.files import read_layout
from ckpt.layout.layout import Layout
from ckpt.layout.pattern import NamePattern, TensorName


def layout(*rules: str, mesh: str = "{pp: 2, dp: 2, tp: 2}", pipeline: str = "") -> Layout:
    lines = ["version: 1", f"mesh: {mesh}", *([f"pipeline: {pipeline}"] if pipeline else [])]
    return read_layout("\n".join([*lines, "rules:" if rules else "rules: []", *(f"- {{{rule}}}" for rule in rules)]))


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("layers.*.wq.weight", "model/layers.3.wq.weight", {}),
        ("layers.*.weight", "model/layers.3.wq.weight", None),
        ("**.weight", "model/layers.3.wq.weight", {}),
        ("**", "model/a.b.c", {}),
        ("layers.{layer}.{wq,wk}.weight", "model/layers.12.wk.weight", {"layer": 12}),
        ("layers.{layer}.{wq,wk}.weight", "model/layers.12.wv.weight", None),
        ("layers.{layer}.w", "model/layers.03.w", None),
        ("layers.{layer}.experts.{expert}.*", "model/layers.1.experts.2.w1", {"layer": 1, "expert": 2}),
        ("{ln_*,**norm}.weight", "model/a.b.norm.weight", {}),
        ("{transformer.,}wte", "model/wte", {}),
        ("wte", "optimizer/wte/exp_avg", {}),
        ("model/wte", "optimizer/wte/exp_avg", None),
        ("optimizer/**/exp_avg", "optimizer/wte/exp_avg", {}),
        ("w", "w", {}),
        ("w(x)[0]+", "model/w(x)[0]+", {}),
    ],
)
def test_patterns_match_as_documented(pattern: str, name: str, found: dict[str, int] | None) -> None:
    assert NamePattern(pattern).match(name, TensorName.parse(name)) == found


@pytest.mark.parametrize("pattern", ["", "a{b", "a}b", "{}", "{a b}", "{layer}.{layer}"])
def test_patterns_that_cannot_be_are_refused(pattern: str) -> None:
    with pytest.raises(InvalidInputError):
        NamePattern(pattern)


def test_all_faults_of_names_are_in_one_error() -> None:
    made = layout('match: "layers.*.wq"', 'match: "**.wq"', 'match: "head"', 'match: "layers.*.wk"')
    with pytest.raises(InvalidInputError) as caught:
        made.check(["model/layers.0.wq", "model/layers.0.wk", "model/embedding", "model/layers.0.w9"])
    text = str(caught.value)
    assert caught.value.kind == "layout-mismatch"
    for part in (
        "no rule matches `model/embedding`",
        "no rule matches `model/layers.0.w9`",
        "`model/layers.0.wq` is matched by 2 rules of equal precedence: `layers.*.wq`, `**.wq`",
        "pattern `head` matches no tensor",
    ):
        assert part in text
    assert "layers.*.wk" not in text


def test_a_long_list_of_faults_is_cut_and_counted() -> None:
    with pytest.raises(InvalidInputError, match="50 tensors without a rule(.|\n)*and 30 more"):
        layout().check([f"model/w{i}" for i in range(50)])


def test_binding_lists_faults_of_shapes_with_those_of_names() -> None:
    made = layout(
        'match: "layers.{layer}.w", shard: [{tp: 1}]',
        'match: "qkv", shard: [{tp: 0}], parts: {axis: tp, sizes: [4, 2, 2]}',
        'match: "experts.{expert}", experts: {axis: dp, num: 2}',
        mesh="{pp: 2, dp: 2, tp: 2}",
        pipeline="{axis: pp, layers: 2}",
    )
    with pytest.raises(InvalidInputError) as caught:
        made.bind(
            [
                ("model/layers.0.w", (4,)),
                ("model/layers.2.w", (4, 4)),
                ("model/qkv", (10, 3)),
                ("model/experts.5", (2,)),
                ("model/other", (2,)),
            ]
        )
    text = str(caught.value)
    for part in (
        "no rule matches `model/other`",
        "`model/layers.0.w` cuts dim 1 over axis `tp`, but its shape is [4]",
        "`model/layers.2.w` is layer 2, but the pipeline has layers 0 to 1",
        "dim 0 of `model/qkv` has 10 elements, but the parts [4, 2, 2] have 8 together",
        "`model/experts.5` is expert 5, but its rule has experts 0 to 1",
    ):
        assert part in text


def test_precedence_is_priority_then_exactness() -> None:
    made = layout(
        'match: "**"',
        'match: "layers.*.w", shard: [{tp: 0}]',
        'match: "optimizer/layers.*.w/*", shard: [{dp: 0}]',
        'match: "layers.1.w", shard: [{pp: 0}]',
        'match: "layers.{layer}.*", shard: [{pp: 1}], priority: -1',
    )
    chosen = {name: made.assign(name).rule for name in ("model/x", "model/layers.0.w", "model/layers.1.w")}
    assert chosen == {"model/x": 0, "model/layers.0.w": 1, "model/layers.1.w": 3}
    assert made.assign("optimizer/layers.0.w/exp_avg").rule == 2
    assert made.assign("optimizer/layers.1.w/exp_avg").rule == 2
    assert made.assign("model/layers.0.q").rule == 0


def test_optimizer_state_follows_its_parameter() -> None:
    made = layout('match: "layers.{layer}.w", shard: [{tp: 0}, {dp: 0}]', pipeline="{axis: pp, layers: 4}")
    tensors = [
        ("model/layers.3.w", (8, 2)),
        ("optimizer/layers.3.w/exp_avg", (8, 2)),
        ("optimizer/layers.3.w/step", ()),
    ]
    bound = made.bind(tensors)
    for rank in range(8):
        of_param, of_state, of_step = (bound.place(name, rank) for name, _ in tensors)
        assert of_param == of_state
        assert (of_step is None) == (of_param is None) == (rank < 4)
        if of_step is not None:
            assert of_step.local_shape == () and len(of_step.placed) == 1


def test_optimizer_state_of_another_shape_needs_a_rule_of_its_own() -> None:
    made = layout('match: "w", shard: [{tp: 0}]')
    tensors = [("model/w", (8, 2)), ("optimizer/w/row", (8,)), ("optimizer/w/count", (1,))]
    with pytest.raises(InvalidInputError, match=r"`optimizer/w/row` has shape \[8\], its parameter \[8, 2\]"):
        made.bind(tensors)
    bound = made.bind([tensors[0], tensors[2]])
    assert all(
        placement is not None and placement.local_shape == (1,)
        for placement in (bound.place("optimizer/w/count", r) for r in range(8))
    )
    own = layout('match: "w", shard: [{tp: 0}]', 'match: "optimizer/w/row", shard: [{dp: 0}]').bind(tensors)
    assert own.place("optimizer/w/row", 0).local_shape == (4,)  # type: ignore[union-attr]


def test_optimizer_state_can_be_flat_over_dp_while_parameters_are_not() -> None:
    made = layout('match: "{a,b}", shard: [{tp: 0}], optimizer: {flat: {axis: dp, multiple: 4}}', mesh="{dp: 2, tp: 2}")
    tensors = [("model/a", (4, 3)), ("model/b", (6,)), ("optimizer/a/m", (4, 3)), ("optimizer/b/m", (6,))]
    bound = made.bind([*tensors, ("optimizer/a/step", ()), ("optimizer/a/v", (4, 3)), ("optimizer/b/v", (6,))])
    # Local sizes under tp 2 are 6 and 3; 9 elements padded to a multiple of 4 x 2 are 16, so 8 on each dp rank.
    for name in ("m", "v"):
        first, second = (bound.place(f"optimizer/b/{name}", rank) for rank in (1, 3))
        assert first is not None and second is not None
        assert first.flat == second.flat == f"flat/{name}" and first.local_shape == second.local_shape == (8,)
        assert [(p.box.offsets, p.box.lengths, p.local_offsets) for p in first.placed] == [((3,), (2,), (6,))]
        assert [(p.box.offsets, p.box.lengths, p.local_offsets) for p in second.placed] == [((5,), (1,), (0,))]
    assert bound.place("model/a", 1).local_shape == (2, 3)  # type: ignore[union-attr]
    with pytest.raises(InvalidInputError, match=r"depends on the other tensors"):
        made.place("optimizer/a/m", (4, 3), 0)


def test_optimizer_none_leaves_the_state_to_other_rules() -> None:
    made = layout('match: "w", optimizer: none', 'match: "optimizer/**", shard: [{dp: 0}]')
    assert made.assign("optimizer/w/exp_avg").rule == 1
    with pytest.raises(InvalidInputError, match="no rule matches `optimizer/w/exp_avg`"):
        layout('match: "w", optimizer: none').check(["model/w", "optimizer/w/exp_avg"])


def test_rules_of_one_flat_buffer_must_agree() -> None:
    made = layout('match: "a", flat: {axis: dp}', 'match: "b", flat: {axis: dp, multiple: 2}')
    with pytest.raises(InvalidInputError, match="rules of flat buffer `flat` differ"):
        made.bind([("model/a", (3,)), ("model/b", (3,))])
    made = layout('match: "{a,b}", flat: {axis: dp, order: [b]}')
    with pytest.raises(InvalidInputError, match="`model/a` is in flat buffer `flat`, but not in its `order`"):
        made.bind([("model/a", (3,)), ("model/b", (3,))])


def test_first_last_and_listed_stages_hold_the_tensor() -> None:
    made = layout(
        'match: "embedding", stage: first',
        'match: "head", stage: last',
        'match: "shared", on: {pp: [0, 2]}',
        'match: "middle", stage: 1',
        'match: "norm"',
        mesh="{pp: 3}",
        pipeline="{axis: pp, split: [1, 2, 1]}",
    )
    names = ("embedding", "head", "shared", "middle", "norm")
    holders = {name: [r for r in range(3) if made.place(f"model/{name}", (2,), r) is not None] for name in names}
    assert holders == {"embedding": [0], "head": [2], "shared": [0, 2], "middle": [1], "norm": [0, 1, 2]}


@pytest.mark.parametrize(
    ("rule", "local", "shape"),
    [
        ("shard: [{tp: 0}, {dp: 0}]", (2, 3), (8, 3)),
        ("shard: [{tp: 1}, {dp: 0}]", (2, 3), (4, 6)),
        ("", (5,), (5,)),
        ("shard: [{tp: 0}]", (), ()),
        ("shard: [{tp: 0}], parts: {axis: tp, sizes: [5, 1, 1]}", (5, 2), (7, 2)),
        ("shard: [{tp: 0}], parts: {axis: tp, num: 3}", (6, 2), (12, 2)),
        ("shard: [{tp: 0}], pad: {axis: tp, multiple: 8, size: 50}", (32, 2), (50, 2)),
        ("shard: [{tp: 0}], shape: [7, 2]", (3, 2), (7, 2)),
    ],
)
def test_global_shapes_follow_from_local_ones(rule: str, local: tuple[int, ...], shape: tuple[int, ...]) -> None:
    made = layout(f'match: "w"{", " if rule else ""}{rule}')
    assert made.infer_global_shape("model/w", local) == shape


@pytest.mark.parametrize(
    ("rule", "local"),
    [
        ("shard: [{tp: 0}], pad: {axis: tp, multiple: 8}", (32, 2)),
        ("flat: {axis: dp}", (32,)),
        ("shard: [{tp: 0}]", (0, 2)),
    ],
)
def test_an_ambiguous_global_shape_asks_for_the_rule_to_say_it(rule: str, local: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="give `shape") as caught:
        layout(f'match: "w", {rule}').infer_global_shape("model/w", local)
    assert caught.value.kind == "ambiguous-shape"


def test_a_stated_shape_that_is_not_the_tensors_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match=r"says shape \[7, 2\], but it is \[8, 2\]"):
        layout('match: "w", shape: [7, 2]').place("model/w", (8, 2), 0)


def test_a_thousand_exact_names_are_looked_up_not_searched() -> None:
    """Saved layouts may have one rule per tensor: the work must not grow with rules x tensors."""
    calls = 0
    original = NamePattern.match

    def counted(self: NamePattern, name: str, parsed: TensorName) -> dict[str, int] | None:
        nonlocal calls
        calls += 1
        return original(self, name, parsed)

    made = layout(*(f'match: "layers.{i}.w"' for i in range(1000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NamePattern, "match", counted)
        made.check([f"model/layers.{i}.w" for i in range(1000)])
    assert calls <= 2000


def test_a_thousand_ranks_and_two_thousand_tensors_bind_as_columns() -> None:
    made = layout(
        'match: "layers.{layer}.c*", shard: [{tp: 0}, {dp: 0}]',
        'match: "layers.{layer}.r*", shard: [{tp: 1}, {dp: 0}]',
        mesh="{dp: 128, tp: 8}",
    )
    tensors = [
        (f"model/layers.{i}.{leaf}", (1024, 1024)) for i in range(200) for leaf in ("c0", "c1", "c2", "r0", "r1")
    ]
    tensors += [(f"optimizer/{name[6:]}/exp_avg", shape) for name, shape in tensors]
    table = made.bind(tensors).all_ranks()
    assert len(table) == 1024 * 2000
    assert int(table.boxes.volumes().sum()) == 2000 * 1024 * 1024
    assert np.array_equal(np.bincount(table.rank), np.full(1024, 2000))
