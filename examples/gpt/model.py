"""A GPT-style transformer, written plainly.

In: a `ModelConfig` and the part of the model that this process holds. Out: an `nn.Module` whose parameter names are
those of the whole model, whatever part it is. Never knows how it will be cut over ranks (see `parallel.py`).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.gpt.data import VOCABULARY_SIZE


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the model; the default has 2.8 million parameters."""

    vocabulary_size: int = VOCABULARY_SIZE  # 256 bytes and the end of a file, padded to a multiple of 8
    num_layers: int = 6
    num_heads: int = 6
    width: int = 192
    hidden_width: int = 512  # of the MLP
    context_tokens: int = 128  # longest sequence
    tied: bool = False  # output layer and embedding share one weight

    def __post_init__(self) -> None:
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(f"width {self.width} must give each of {self.num_heads} heads an even width")


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """Which layers this process holds. The whole model, unless it is a pipeline stage."""

    layer_start: int
    layer_stop: int  # exclusive
    first: bool = True  # holds the embedding
    last: bool = True  # holds the final norm and the output layer


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.width // config.num_heads
        self.wq = nn.Linear(config.width, config.width, bias=False)
        self.wk = nn.Linear(config.width, config.width, bias=False)
        self.wv = nn.Linear(config.width, config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        # -1, not num_heads: under tensor parallelism a rank sees only its share of the heads.
        q, k, v = (w(x).view(batch, tokens, -1, self.head_width).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = functional.scaled_dot_product_attention(_rotate(q, rotation), _rotate(k, rotation), v, is_causal=True)
        out: Tensor = self.wo(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w2 = nn.Linear(config.hidden_width, config.width, bias=False)
        self.w3 = nn.Linear(config.width, config.hidden_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """One layer: attention and MLP, each with a norm before and a residual around."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x


class GPT(nn.Module):
    """Tokens [batch, tokens] to logits [batch, tokens, vocabulary]; a stage takes and gives activations instead.

    Layers are keyed by their global number, so that `layers.5.attention.wq.weight` is called that on any stage.
    """

    def __init__(self, config: ModelConfig, part: ModelPart | None = None) -> None:
        super().__init__()
        part = part or ModelPart(layer_start=0, layer_stop=config.num_layers)
        if config.tied and not (part.first and part.last):
            raise ValueError("a tied model cannot be cut into stages: its first and last layer share a weight")
        self.config = config
        self.rotation: Tensor
        self.embedding = nn.Embedding(config.vocabulary_size, config.width) if part.first else None
        self.layers = nn.ModuleDict({str(i): Block(config) for i in range(part.layer_start, part.layer_stop)})
        self.norm = nn.RMSNorm(config.width, eps=1e-5) if part.last else None
        self.output = nn.Linear(config.width, config.vocabulary_size, bias=False) if part.last else None
        rotation = _rotation_table(config.context_tokens, config.width // config.num_heads)
        self.register_buffer("rotation", rotation, persistent=False)
        self.tie()

    def tie(self) -> None:
        """Make output layer and embedding share their weight, where the config says so."""
        if self.config.tied and self.output is not None and self.embedding is not None:
            self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        rotation = self.rotation[: x.shape[1]]
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers.values():
            x = layer(x, rotation)
        if self.norm is not None and self.output is not None:
            x = self.output(self.norm(x))
        return x


@torch.no_grad()
def initialise(model: GPT, *, seed: int) -> None:
    """Fill every weight from a stream of its own, seeded by its name: any part of the model starts the same."""
    depth_scale = 1 / math.sqrt(2 * model.config.num_layers)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
            continue
        generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
        into_residual = name.endswith(("wo.weight", "w2.weight"))
        weight.normal_(std=0.02 * (depth_scale if into_residual else 1.0), generator=generator)


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, summed over all tokens. A sum, so that parts of a batch add up whatever their sizes."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def _rotation_table(num_tokens: int, head_width: int) -> Tensor:
    """[tokens, 2, head_width / 2]: cosine and sine of each position's angles."""
    frequency = 10_000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angle = torch.outer(torch.arange(num_tokens, dtype=torch.float32), frequency)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    cosine, sine = (part.to(x.dtype) for part in rotation.unbind(dim=1))
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)
