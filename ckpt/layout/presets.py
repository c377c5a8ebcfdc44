"""Layouts from a few numbers: rules for well-known parameter names, or a saved layout's rules on another mesh.

In: the tensors of a run and the degrees of parallelism. Out: a `Layout` that fits these tensors. Pure. Never guesses a
placement for a name that it does not know: such names are an error that lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt.errors import InvalidInputError
from ckpt.layout.assign import NAMES_SHOWN_MAX
from ckpt.layout.layout import Layout
from ckpt.layout.mesh import Mesh
from ckpt.layout.pattern import NamePattern, TensorName
from ckpt.layout.rules import Experts, Parts, Pipeline, Rule, ShardStep, Stage, Where

Tensors = Sequence[tuple[str, Sequence[int]]]  # (name, global shape)
Cut = Literal["column", "row", "split", "whole"]

# Names that the degrees' axes have in saved layouts, the usual one first.
AXIS_NAMES = {
    "pp": ("pp", "pipe", "pipeline"),
    "dp": ("dp", "fsdp", "dp_shard", "data"),
    "ep": ("ep", "expert"),
    "tp": ("tp", "model", "tensor"),
}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One line of a preset.

    column: tp cuts the output dim; row: tp cuts the input dim; split: tp does not cut it; whole: dp does not either.
    """

    match: str
    cut: Cut
    stage: Stage | None = None
    output_dim: int = 0  # 1 where weights are stored as (input, output)
    num_parts: int = 0  # that many equal parts fused along the output dim
    experts: Literal["", "each", "stack"] = ""


_LAYER = "**layers.{layer}."
_ATTENTION = _LAYER + "{attention,attn,self_attn}."
_MLP = _LAYER + "{feed_forward,mlp}."
_MOE = _LAYER + "**experts."

_LLAMA = (
    _Entry(match="**{tok_embeddings,embed_tokens,embedding,embeddings}.weight", cut="column", stage="first"),
    _Entry(match=_ATTENTION + "{wq,wk,wv,q_proj,k_proj,v_proj}.{weight,bias}", cut="column"),
    _Entry(match=_ATTENTION + "{wo,o_proj}.weight", cut="row"),
    _Entry(match=_ATTENTION + "{wo,o_proj}.bias", cut="split"),
    _Entry(match=_MLP + "{w1,w3,gate_proj,up_proj}.{weight,bias}", cut="column"),
    _Entry(match=_MLP + "{w2,down_proj}.weight", cut="row"),
    _Entry(match=_MLP + "{w2,down_proj}.bias", cut="split"),
    _Entry(match=_MLP + "gate_up_proj.{weight,bias}", cut="column", num_parts=2),
    _Entry(match=_LAYER + "**{gate,router}.{weight,bias}", cut="split"),
    _Entry(match=_MOE + "{expert}.{w1,w3,gate_proj,up_proj}.weight", cut="column", experts="each"),
    _Entry(match=_MOE + "{expert}.{w2,down_proj}.weight", cut="row", experts="each"),
    _Entry(match=_MOE + "{w1,w3,gate_proj,up_proj}", cut="column", experts="stack"),
    _Entry(match=_MOE + "{w2,down_proj}", cut="row", experts="stack"),
    _Entry(match=_LAYER + "**norm*.{weight,bias}", cut="split"),
    _Entry(match="{norm,model.norm,transformer.norm}.{weight,bias}", cut="split", stage="last"),
    _Entry(match="**{lm_head,output}.weight", cut="column", stage="last"),
    _Entry(match="{**rotary_emb.inv_freq,rope.freqs,freqs_cis,rotation}", cut="whole"),
)


def _gpt2(output_dim: int) -> tuple[_Entry, ...]:
    layer = "**h.{layer}."
    return (
        _Entry(match="{transformer.,}wte.weight", cut="column", stage="first"),
        _Entry(match="{transformer.,}wpe.weight", cut="split", stage="first"),
        _Entry(match=layer + "attn.c_attn.weight", cut="column", output_dim=output_dim, num_parts=3),
        _Entry(match=layer + "attn.c_attn.bias", cut="column", num_parts=3),
        _Entry(match=layer + "mlp.c_fc.weight", cut="column", output_dim=output_dim),
        _Entry(match=layer + "mlp.c_fc.bias", cut="column"),
        _Entry(match=layer + "{attn,mlp}.c_proj.weight", cut="row", output_dim=output_dim),
        _Entry(match=layer + "{attn,mlp}.c_proj.bias", cut="split"),
        _Entry(match=layer + "attn.{bias,masked_bias}", cut="whole"),
        _Entry(match=layer + "ln_{1,2}.{weight,bias}", cut="split"),
        _Entry(match="{transformer.,}ln_f.{weight,bias}", cut="split", stage="last"),
        _Entry(match="lm_head.weight", cut="column", stage="last"),
    )


_FSDP = (_Entry(match="**", cut="split"),)
PRESETS = ("llama", "gpt2", "fsdp")


def from_degrees(
    tensors: Tensors,
    *,
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    ep: int | None = None,
    base: Layout | None = None,
    preset: str | None = None,
) -> Layout:
    """A layout of these tensors over `tp * pp * dp * ep` ranks.

    Args:
        tensors: all names and global shapes.
        tp, pp, dp, ep: ranks along each axis. None: as in `base`, or 1.
        base: a saved layout; its rules are taken when it has all the axes asked for and no preset is named.
        preset: one of `PRESETS`; None: the one that knows all names. `fsdp` (dp only) knows every name.

    With a preset, ranks are numbered with tp fastest, then ep, dp, pp. Raises InvalidInputError for names that the
    preset does not know, all of them in one message.
    """
    degrees = {"pp": pp, "dp": dp, "ep": ep, "tp": tp}
    for name, degree in degrees.items():
        if degree is not None and degree < 1:
            raise InvalidInputError(f"the degree of {name} must be at least 1, found {degree}")
    if base is not None and preset is None:
        resized = _resized(base, degrees)
        if resized is not None:
            resized.bind(tensors)
            return resized
    sizes = {name: degree or 1 for name, degree in degrees.items()}
    return preset_layout(preset or _preset_for(tensors, sizes), tensors, sizes)


def _resized(base: Layout, degrees: Mapping[str, int | None]) -> Layout | None:
    """The saved layout with the new degrees; None when it lacks an axis that is asked for."""
    sizes: dict[str, int] = {}
    for name, degree in degrees.items():
        if degree is None:
            continue
        axes = [axis for axis in AXIS_NAMES[name] if axis in base.mesh.names]
        if axes:
            sizes[axes[0]] = degree
        elif degree > 1:
            return None
    try:
        return base.resized(sizes)
    except InvalidInputError as error:
        hint = "name a preset (--preset), or give a layout file (--layout)"
        raise InvalidInputError(
            f"the saved layout does not go with these degrees: {error.message}", hints=(hint,)
        ) from None


def preset_layout(preset: str, tensors: Tensors, sizes: Mapping[str, int]) -> Layout:
    """The preset's rules for these tensors on a mesh with these sizes (`pp`, `dp`, `ep`, `tp`; 1 where left out)."""
    sizes = {name: sizes.get(name, 1) for name in ("pp", "dp", "ep", "tp")}
    if preset == "fsdp" and any(sizes[name] > 1 for name in ("pp", "ep", "tp")):
        raise InvalidInputError("preset `fsdp` cuts over dp alone", hints=("name another preset, or a layout file",))
    entries = _entries(preset, tensors)
    unknown = _unknown(entries, tensors)
    if unknown:
        listed = "".join(f"\n  `{name}`" for name in unknown[:NAMES_SHOWN_MAX])
        more = f"\n  and {len(unknown) - NAMES_SHOWN_MAX} more" if len(unknown) > NAMES_SHOWN_MAX else ""
        raise InvalidInputError(
            f"preset `{preset}` does not know {len(unknown)} of the tensors:{listed}{more}",
            kind="layout-mismatch",
            hints=("write a layout file with a rule for each of them, and give it with --layout",),
        )
    axes = tuple((name, size) for name, size in sizes.items() if name != "ep" or size > 1)
    paths = {TensorName.parse(name).path for name, _ in tensors}
    used = [entry for entry in entries if _captures(entry, paths) is not None]
    layout = Layout(
        mesh=Mesh(axes=axes),
        rules=tuple(_rule(entry, sizes, paths) for entry in used),
        pipeline=_pipeline(used, sizes, paths),
    )
    layout.bind(tensors)
    return layout


def _preset_for(tensors: Tensors, sizes: Mapping[str, int]) -> str:
    if all(sizes[name] == 1 for name in ("pp", "ep", "tp")):
        return "fsdp"
    return min(("llama", "gpt2"), key=lambda preset: len(_unknown(_entries(preset, tensors), tensors)))


def _entries(preset: str, tensors: Tensors) -> tuple[_Entry, ...]:
    if preset == "llama":
        return _LLAMA
    if preset == "fsdp":
        return _FSDP
    if preset == "gpt2":
        # Hugging Face stores (input, output), nanoGPT (output, input); the fused projection tells them apart.
        fused = [shape for name, shape in tensors if name.endswith("attn.c_attn.weight") and len(shape) == 2]
        return _gpt2(1 if fused and fused[0][1] == 3 * fused[0][0] else 0)
    raise InvalidInputError(f"there is no preset `{preset}`", hints=(f"presets: {', '.join(PRESETS)}",))


def _unknown(entries: Sequence[_Entry], tensors: Tensors) -> list[str]:
    patterns = [NamePattern(entry.match) for entry in entries]
    parsed = {name: TensorName.parse(name) for name, _ in tensors}
    return [name for name, parts in parsed.items() if not any(p.match(name, parts) is not None for p in patterns)]


def _captures(entry: _Entry, paths: set[str]) -> dict[str, int] | None:
    """The highest layer and expert among the tensors of an entry; None when there is no tensor."""
    pattern = NamePattern(entry.match)
    hits = [pattern.match(path, TensorName(key="", path=path, slot=None)) for path in paths]
    found = [hit for hit in hits if hit is not None]
    if not found:
        return None
    return {key: max(hit[key] for hit in found) for key in pattern.captures}


def _pipeline(entries: Sequence[_Entry], sizes: Mapping[str, int], paths: set[str]) -> Pipeline | None:
    if sizes["pp"] == 1:
        return None
    layers = [found["layer"] for entry in entries if (found := _captures(entry, paths)) and "layer" in found]
    if not layers:
        raise InvalidInputError("pipeline stages need layers, and no tensor's name has a layer number")
    return Pipeline(axis="pp", layers=max(layers) + 1)


def _rule(entry: _Entry, sizes: Mapping[str, int], paths: set[str]) -> Rule:
    stacked = int(entry.experts == "stack")  # a stack has the experts as its first dim
    tp_dim = stacked + (entry.output_dim if entry.cut == "column" else 1 - entry.output_dim)
    steps = [ShardStep(axis="ep", dim=0)] if stacked else []
    if entry.cut in ("column", "row"):
        steps.append(ShardStep(axis="tp", dim=tp_dim))
    if entry.cut != "whole":
        steps.append(ShardStep(axis="dp", dim=stacked))
    steps = [step for step in steps if sizes[step.axis] > 1]
    where = Where(shard=tuple(steps), stage=entry.stage if sizes["pp"] > 1 else None)
    if entry.num_parts and sizes["tp"] > 1:
        where = dataclasses.replace(where, parts=Parts(axis="tp", num=entry.num_parts))
    if entry.experts == "each" and sizes["ep"] > 1:
        num = (_captures(entry, paths) or {})["expert"] + 1
        where = dataclasses.replace(where, experts=Experts(axis="ep", num=num))
    return Rule(match=(NamePattern(entry.match),), where=where)
