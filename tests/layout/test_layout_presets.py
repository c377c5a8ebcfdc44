"""Goal: `--tp 4 --pp 2 --dp 1` is enough to lay out well-known models, and a saved layout moves to other sizes.

Method: parameter names and shapes of real models (small), bound to the layouts that presets make; every element must
be held by some rank, fused and row-parallel weights cut as their modules need it.
"""

from __future__ import annotations

import math

import pytest

from ckpt.errors import InvalidInputError
from ckpt.layout.bound import BoundLayout
from ckpt.layout.document import from_document
from ckpt.layout.files import read_layout, write_layout
from ckpt.layout.presets import from_degrees
from tests.layout.cutting import held

Tensors = list[tuple[str, tuple[int, ...]]]


def with_optimizer(params: Tensors) -> Tensors:
    out = [(f"model/{name}", shape) for name, shape in params]
    for name, shape in params:
        out += [(f"optimizer/{name}/exp_avg", shape), (f"optimizer/{name}/step", ())]
    return out


def meta_llama(num_layers: int = 3) -> Tensors:
    """The example's and torchtitan's names."""
    out: Tensors = [("embedding.weight", (50, 8)), ("norm.weight", (8,)), ("output.weight", (50, 8))]
    for i in range(num_layers):
        out += [(f"layers.{i}.attention.{leaf}.weight", (8, 8)) for leaf in ("wq", "wk", "wv", "wo")]
        out += [(f"layers.{i}.feed_forward.{leaf}.weight", (24, 8)) for leaf in ("w1", "w3")]
        out += [(f"layers.{i}.feed_forward.w2.weight", (8, 24))]
        out += [(f"layers.{i}.{leaf}.weight", (8,)) for leaf in ("attention_norm", "feed_forward_norm")]
    return out


def hugging_face_llama(num_layers: int = 2) -> Tensors:
    out: Tensors = [("model.embed_tokens.weight", (50, 8)), ("model.norm.weight", (8,)), ("lm_head.weight", (50, 8))]
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        out += [(f"{layer}.self_attn.{leaf}_proj.weight", (8, 8)) for leaf in "qkvo"]
        out += [(f"{layer}.self_attn.{leaf}_proj.bias", (8,)) for leaf in "qkv"]
        out += [(f"{layer}.mlp.{leaf}_proj.weight", (24, 8)) for leaf in ("gate", "up")]
        out += [(f"{layer}.mlp.down_proj.weight", (8, 24)), (f"{layer}.self_attn.q_norm.weight", (4,))]
        out += [(f"{layer}.{leaf}.weight", (8,)) for leaf in ("input_layernorm", "post_attention_layernorm")]
    return out


def mixtral() -> Tensors:
    out = [item for item in hugging_face_llama() if ".mlp." not in item[0]]
    for i in range(2):
        moe = f"model.layers.{i}.block_sparse_moe"
        out.append((f"{moe}.gate.weight", (4, 8)))
        for expert in range(4):
            out += [(f"{moe}.experts.{expert}.{leaf}.weight", (24, 8)) for leaf in ("w1", "w3")]
            out.append((f"{moe}.experts.{expert}.w2.weight", (8, 24)))
    return out


def gpt2(*, transposed: bool) -> Tensors:
    def weight(rows: int, columns: int) -> tuple[int, int]:
        return (columns, rows) if transposed else (rows, columns)

    out: Tensors = [
        ("transformer.wte.weight", (50, 8)),
        ("transformer.wpe.weight", (16, 8)),
        ("lm_head.weight", (50, 8)),
    ]
    for i in range(2):
        layer = f"transformer.h.{i}"
        out += [(f"{layer}.attn.c_attn.weight", weight(24, 8)), (f"{layer}.attn.c_attn.bias", (24,))]
        out += [(f"{layer}.attn.c_proj.weight", weight(8, 8)), (f"{layer}.attn.c_proj.bias", (8,))]
        out += [(f"{layer}.mlp.c_fc.weight", weight(32, 8)), (f"{layer}.mlp.c_fc.bias", (32,))]
        out += [(f"{layer}.mlp.c_proj.weight", weight(8, 32)), (f"{layer}.mlp.c_proj.bias", (8,))]
        out += [(f"{layer}.ln_{j}.{leaf}", (8,)) for j in (1, 2) for leaf in ("weight", "bias")]
    return [*out, ("transformer.ln_f.weight", (8,)), ("transformer.ln_f.bias", (8,))]


def assert_complete(bound: BoundLayout) -> None:
    """Every element of every tensor is held by some rank."""
    for name, shape in bound.tensors:
        elements: set[int] = set()
        for rank in range(bound.mesh.world_size):
            placement = bound.place(name, rank)
            elements.update(held(placement, shape) if placement is not None else ())
        assert elements == set(range(math.prod(shape))), name


@pytest.mark.parametrize(
    "params",
    [meta_llama(), hugging_face_llama(), mixtral(), gpt2(transposed=True), gpt2(transposed=False)],
    ids=["meta", "hf", "mixtral", "gpt2-hf", "gpt2-nano"],
)
def test_degrees_alone_lay_out_known_models(params: Tensors) -> None:
    tensors = with_optimizer(params)
    for degrees in (
        {"tp": 4, "pp": 2, "dp": 1},
        {"tp": 2, "pp": 1, "dp": 2},
        {"dp": 3},
        {"tp": 2, "ep": 2, "dp": 2},
        {},
    ):
        layout = from_degrees(tensors, **degrees)  # type: ignore[arg-type]
        assert layout.mesh.world_size == math.prod(degrees.values())
        assert_complete(layout.bind(tensors))
        assert read_layout(write_layout(layout)) == layout


def test_column_row_and_vocabulary_weights_are_cut_as_their_modules_need() -> None:
    tensors = with_optimizer(meta_llama())
    bound = from_degrees(tensors, tp=2, pp=3, dp=2).bind(tensors)

    def local(name: str, **at: int) -> tuple[int, ...] | None:
        placement = bound.place(name, bound.mesh.rank(at))
        return None if placement is None else placement.local_shape

    assert local("model/layers.1.attention.wq.weight", pp=1) == (2, 8)
    assert local("model/layers.1.attention.wo.weight", pp=1) == (4, 4)
    assert local("model/layers.1.attention.wo.weight", pp=0) is None
    assert local("model/embedding.weight", pp=0) == (13, 8)
    assert local("model/output.weight", pp=2, tp=1, dp=1) == (12, 8)
    assert local("model/output.weight", pp=0) is None
    assert local("model/norm.weight", pp=2, tp=1) == (4,)
    assert local("optimizer/layers.1.attention.wq.weight/exp_avg", pp=1) == (2, 8)
    assert local("optimizer/layers.1.attention.wq.weight/step", pp=1) == ()


def test_a_fused_projection_is_cut_part_by_part_on_its_output_dim() -> None:
    for transposed, shape in ((True, (8, 24)), (False, (24, 8))):
        tensors = with_optimizer(gpt2(transposed=transposed))
        placement = from_degrees(tensors, tp=2).place("model/transformer.h.0.attn.c_attn.weight", shape, 1)
        assert placement is not None
        dim = 1 if transposed else 0
        assert [(p.box.offsets[dim], p.box.lengths[dim]) for p in placement.placed] == [(4, 4), (12, 4), (20, 4)]


def test_experts_are_dealt_out_over_ep() -> None:
    tensors = with_optimizer(mixtral())
    layout = from_degrees(tensors, ep=2, tp=2)
    name = "model/model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    holders = {e: [r for r in range(4) if layout.place(name.format(e), (8, 24), r)] for e in range(4)}
    assert holders == {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}


def test_stacked_experts_are_cut_over_ep_then_inside() -> None:
    params: Tensors = [(f"layers.0.moe.experts.{leaf}", (4, 24, 8)) for leaf in ("w1", "w3")]
    params += [("layers.0.moe.experts.w2", (4, 8, 24)), ("layers.0.moe.router.gate.weight", (4, 8))]
    layout = from_degrees([(f"model/{name}", shape) for name, shape in params], ep=2, tp=2, dp=2)
    shapes = {name: layout.place(f"model/{name}", shape, 0).local_shape for name, shape in params}  # type: ignore[union-attr]
    assert list(shapes.values()) == [(2, 6, 8), (2, 6, 8), (2, 4, 12), (2, 8)]


def test_names_that_no_preset_knows_are_all_listed() -> None:
    tensors = [*with_optimizer(meta_llama()), ("model/strange.weight", (4,)), ("model/odd", (4,))]
    with pytest.raises(
        InvalidInputError, match=r"does not know 2 of the tensors:\n  `model/strange.weight`\n  `model/odd`"
    ):
        from_degrees(tensors, tp=2)
    assert_complete(from_degrees(tensors, dp=2).bind(tensors))
    with pytest.raises(InvalidInputError, match="no preset `bert`"):
        from_degrees(tensors, preset="bert")
    with pytest.raises(InvalidInputError, match="cuts over dp alone"):
        from_degrees(tensors, tp=2, preset="fsdp")
    with pytest.raises(InvalidInputError, match="degree of tp must be at least 1"):
        from_degrees(tensors, tp=0)


def base(split: str = "split: [1, 2]", extra: str = "") -> str:
    return f"""
version: 1
mesh: {{pp: 2, fsdp: 2, tp: 2}}
pipeline: {{axis: pp, {split}}}
rules:
  - match: "layers.{{layer}}.w"
    shard: [{{tp: 1}}, {{fsdp: 0}}]
  - match: "embedding"
    {extra or "stage: first"}
"""


TENSORS: Tensors = [("model/embedding", (6,)), *((f"model/layers.{i}.w", (6, 6)) for i in range(3))]


def test_a_saved_layout_moves_to_other_sizes_with_its_own_rules() -> None:
    moved = from_degrees(TENSORS, tp=3, pp=3, dp=1, base=read_layout(base()))
    assert moved.mesh.axes == (("pp", 3), ("fsdp", 1), ("tp", 3))
    assert moved.rules == read_layout(base()).rules
    assert moved.pipeline is not None and moved.pipeline.sizes(3) == (1, 1, 1)
    assert_complete(moved.bind(TENSORS))
    kept = from_degrees(TENSORS, tp=1, base=read_layout(base()))
    assert kept.mesh.axes == (("pp", 2), ("fsdp", 2), ("tp", 1)) and kept.pipeline is not None
    assert kept.pipeline.split == (1, 2)


def test_a_saved_layout_that_cannot_move_says_so() -> None:
    with pytest.raises(InvalidInputError, match=r"does not go with these degrees(.|\n)*layout file"):
        from_degrees(TENSORS, pp=1, base=read_layout(base(extra="on: {pp: [1]}")))
    with pytest.raises(InvalidInputError, match="no rule matches `model/other`"):
        from_degrees([*TENSORS, ("model/other", (2,))], pp=1, base=read_layout(base()))


def test_a_saved_layout_without_the_axes_asked_for_gives_way_to_a_preset() -> None:
    tensors = with_optimizer(meta_llama())
    single = from_document({"version": 1, "mesh": [], "rules": [{"match": "**"}]})
    layout = from_degrees(tensors, tp=2, base=single)
    assert layout.mesh.axes == (("pp", 1), ("dp", 1), ("tp", 2))
    assert from_degrees(tensors, base=single) == single
