"""Snapshots to merge: Llama-shaped models near each other, as folders of safetensors files and as checkpoints of one run.

In: sizes and a folder. Out: files. The same numbers every time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import ckpt

STEP = 10  # the snapshots are of steps 10, 20, ...


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of one model, in fp32."""

    layers: int
    width: int
    inner: int
    vocabulary: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.width),
            "model.norm.weight": (self.width,),
            "lm_head.weight": (self.vocabulary, self.width),
        }
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes |= {f"{at}.self_attn.{part}_proj.weight": (self.width, self.width) for part in "qkvo"}
            shapes |= {f"{at}.mlp.{part}_proj.weight": (self.inner, self.width) for part in ("gate", "up")}
            shapes[f"{at}.mlp.down_proj.weight"] = (self.width, self.inner)
            shapes |= {f"{at}.{norm}_layernorm.weight": (self.width,) for norm in ("input", "post_attention")}
        return shapes

    @property
    def nbytes(self) -> int:
        return 4 * sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.width // 64),
            "num_key_value_heads": max(1, self.width // 64),
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
        }


LARGE = Size(layers=16, width=1024, inner=2816, vocabulary=32000)  # 1.08 GB
TINY = Size(layers=1, width=64, inner=128, vocabulary=320)


def make(folder: Path, size: Size, num: int) -> None:
    """`base`, `model-0` ... and the run `run`, which holds what the models hold."""
    base = dict(_base(size))
    _write(folder / "base", size, base)
    for i in range(num):
        tensors = dict(_near(base, i))
        _write(folder / f"model-{i}", size, tensors)
        ckpt.save({"model": tensors}, folder / "run", step=STEP * (i + 1))


def folders(folder: Path, num: int) -> list[Path]:
    """The models as folders."""
    return [folder / f"model-{i}" for i in range(num)]


def _base(size: Size) -> Iterator[tuple[str, torch.Tensor]]:
    for number, (name, shape) in enumerate(size.shapes.items()):
        yield name, torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.02


def _near(base: dict[str, torch.Tensor], number: int) -> Iterator[tuple[str, torch.Tensor]]:
    for i, (name, tensor) in enumerate(base.items()):
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1000 * (number + 1) + i))
        yield name, tensor + 0.001 * noise


def _write(folder: Path, size: Size, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(size.config))
