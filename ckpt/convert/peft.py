"""The config of a LoRA adapter as PEFT writes it, and the names of its tensors.

In: the JSON of `adapter_config.json`, names of tensors. Out: `AdapterConfig`, checked: rank, alpha and scaling of every module;
the module and the side (A or B) that a tensor is of. Pure. Adapters whose change of the weights is not `scaling * B @ A` are
refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ckpt.config import ADAPTER_CONFIG_BYTES_MAX
from ckpt.convert.export import Tensor
from ckpt.engine.reader import StoredCheckpoint
from ckpt.errors import InvalidInputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_STEM = "adapter_model"
METADATA = "adapter_config"  # where a checkpoint's manifest keeps the config
PREFIX = "base_model.model."  # what PEFT puts before the name of a module of the model
KIND = "bad-adapter"
Side = Literal["A", "B"]

# `<module>.lora_A.weight`, `<module>.lora_A.<adapter>.weight`, `<module>.lora_embedding_A`, `<module>.lora_embedding_A.<adapter>`
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<table>embedding_)?(?P<side>[AB])(?:\.(?P<adapter>[^.]+))??(?P<weight>\.weight)?"
)
# Flags whose adapters are no plain product, and what each is.
_OTHER_SUMS = {
    "use_dora": "DoRA scales every row of the weights",
    "use_qalora": "QA-LoRA pools its inputs",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "layer_replication": "layers are replicated",
    "trainable_token_indices": "rows of an embedding are trained beside",
    "target_parameters": "parameters without a module are targeted",
    "lora_bias": "a bias goes with B",
    "megatron_config": "its modules are those of Megatron",
}


@dataclass(frozen=True, kw_only=True)
class FactorName:
    """Which factor a tensor is."""

    module: str  # without PEFT's prefix
    side: Side
    is_table: bool  # of an embedding: its change is the transpose of B @ A
    adapter: str  # "" where the name has none, as in PEFT's files


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an `adapter_config.json` says of the arithmetic. `document` is all of it."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    is_transposed: bool = False  # `fan_in_fan_out`: weights lie as [in, out]
    document: Mapping[str, Any] = field(default_factory=dict)

    def scaling(self, module: str, rank: int) -> float:
        """What B @ A of a module is multiplied with.

        Args:
            rank: as its factors have it.
        """
        alpha = float(_of_module(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank_of(self, module: str) -> int:
        """The rank that the config gives to a module."""
        return int(_of_module(self.rank_pattern, module, self.rank))


def _of_module(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """As PEFT looks patterns up: regular expressions for the end of a module's name, from a dot on; `^` binds to its start."""
    for pattern, value in patterns.items():
        whole = pattern[1:] if pattern.startswith("^") else rf"(?:.*\.)?(?:{pattern})"
        if re.fullmatch(whole, module):
            return value
    return otherwise


def parse_factor(name: str) -> FactorName | None:
    """Which factor a tensor of this name (without a state key) is; None: it is none."""
    match = _FACTOR.fullmatch(name)
    if match is None or (match["weight"] is None) != (match["table"] is not None):
        return None
    return FactorName(
        module=match["module"].removeprefix(PREFIX),
        side="A" if match["side"] == "A" else "B",
        is_table=match["table"] is not None,
        adapter=match["adapter"] or "",
    )


def factor_name(module: str, side: Side, *, is_table: bool) -> str:
    """The name that PEFT's files have for a factor."""
    return f"{PREFIX}{module}.lora_{'embedding_' if is_table else ''}{side}{'' if is_table else '.weight'}"


def read_config(data: bytes, *, name: str) -> AdapterConfig:
    """Parse and check. InvalidInputError (`bad-adapter`) that names the file, the field, what is expected and what was found."""
    if len(data) > ADAPTER_CONFIG_BYTES_MAX:
        raise InvalidInputError(f"{name}: {len(data)} bytes are too many for the config of an adapter", kind=KIND)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{name} is not JSON: {error}", kind=KIND) from None
    return config_of(document, name=name)


def config_of(document: Any, *, name: str) -> AdapterConfig:
    """The config out of its JSON values."""
    if not isinstance(document, dict):
        raise InvalidInputError(f"{name}: the config of an adapter is a mapping, found {document!r:.80}", kind=KIND)
    kind = document.get("peft_type")
    if kind not in (None, "LORA"):
        raise InvalidInputError(
            f"{name}: `peft_type` is {kind!r}; only LoRA adapters are sums of products B @ A, and can be merged",
            kind=KIND,
        )
    for flag, why in _OTHER_SUMS.items():
        if document.get(flag):
            raise InvalidInputError(
                f"{name}: `{flag}` is set: {why}, so its change of the weights is not scaling * B @ A",
                kind=KIND,
                hints=("fold such an adapter into its base with the tool that made it, and merge the models",),
            )
    return AdapterConfig(
        rank=_whole(document, "r", name),
        alpha=_number(document.get("lora_alpha"), "lora_alpha", name),
        rank_pattern={k: _whole({k: v}, k, name) for k, v in _patterns(document, "rank_pattern", name)},
        alpha_pattern={k: _number(v, k, name) for k, v in _patterns(document, "alpha_pattern", name)},
        use_rslora=_flag(document, "use_rslora", name),
        is_transposed=_flag(document, "fan_in_fan_out", name),
        document=document,
    )


def _patterns(document: Mapping[str, Any], key: str, name: str) -> list[tuple[str, Any]]:
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise InvalidInputError(f"{name}: `{key}` must be a mapping, found {value!r:.80}", kind=KIND)
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InvalidInputError(
                f"{name}: `{pattern}` of `{key}` is no regular expression: {error}", kind=KIND
            ) from None
    return list(value.items())


def _whole(document: Mapping[str, Any], key: str, name: str) -> int:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(f"{name}: `{key}` must be a whole number from 1 on, found {value!r:.80}", kind=KIND)
    return value


def _number(value: Any, key: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidInputError(f"{name}: `{key}` must be a number, found {value!r:.80}", kind=KIND)
    return float(value)


def _flag(document: Mapping[str, Any], key: str, name: str) -> bool:
    value = document.get(key, False)
    if not isinstance(value, bool):
        raise InvalidInputError(f"{name}: `{key}` must be true or false, found {value!r:.80}", kind=KIND)
    return value


def choose_factors(tensors: Sequence[Tensor], adapter: str | None = None) -> list[Tensor]:
    """Of the tensors of a model those of one adapter, by their names in PEFT's files.

    InvalidInputError (`bad-adapter`) when there is none of this name, or, with None, not exactly one.
    """
    found = [(parse_factor(tensor.name), tensor) for tensor in tensors]
    factors = [(factor, tensor) for factor, tensor in found if factor is not None]
    names = sorted({factor.adapter for factor, _ in factors})
    if (adapter is None and len(names) != 1) or (adapter is not None and adapter not in names):
        shown = ", ".join(name or "one without a name" for name in names) or "none"
        raise InvalidInputError(
            "one adapter is to be exported" + (f": `{adapter}`" if adapter is not None else ""),
            kind=KIND,
            hints=(f"adapters there: {shown}; name one with `--adapter`",),
        )
    chosen = names[0] if adapter is None else adapter
    return [
        dataclasses.replace(tensor, name=factor_name(factor.module, factor.side, is_table=factor.is_table))
        for factor, tensor in factors
        if factor.adapter == chosen
    ]


def stored_config(stored: StoredCheckpoint) -> dict[str, Any]:
    """The config that a checkpoint's manifest keeps, checked. InvalidInputError (`no-config`) when it keeps none."""
    document = stored.manifest.metadata.get(METADATA)
    if document is None:
        raise InvalidInputError(
            f"step {stored.step} does not say the config of an adapter: its metadata has no `{METADATA}`",
            kind="no-config",
            hints=(
                f"`ckpt lora --adapter-config FILE` names its `{CONFIG_FILE}`",
                f'save with metadata={{"{METADATA}": {{"r": 8, "lora_alpha": 16, ...}}}}',
            ),
        )
    return dict(config_of(document, name=f"metadata `{METADATA}` of step {stored.step}").document)


def write_config(document: Mapping[str, Any]) -> bytes:
    """The file."""
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
