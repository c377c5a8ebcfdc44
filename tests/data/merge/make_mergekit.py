"""Make `mergekit.npz` beside this file: small models, and what mergekit makes of them, for tests/merge/test_mergekit.py.

Run with a Python that has mergekit (`pip install mergekit`, in an environment of its own) and this repository on its path:

    PYTHONPATH=. mergekit-venv/bin/python tests/data/merge/make_mergekit.py

The file says the versions. Models are tiny Llamas in float32, so that mergekit reads them as it reads any. Its random masks come
from torch's generator in the order of its work: here `torch.bernoulli` is replaced, while it merges, by the masks that ckpt draws
for the same elements, so that everything else of DARE and DELLA can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import generalized_task_arithmetic
from mergekit.options import MergeOptions
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ckpt.kernels import merge_reference

HERE = pathlib.Path(__file__).resolve().parent
STEPS = (1, 2, 3)  # of the sources; the base is at step 0
SHAPES = {  # every number of elements is a multiple of 16, so that shares of them are whole numbers
    "model.embed_tokens.weight": (16, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (16, 16),
    "model.layers.0.self_attn.v_proj.weight": (16, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.mlp.gate_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (16, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.post_attention_layernorm.weight": (16,),
    "model.norm.weight": (16,),
    "lm_head.weight": (16, 16),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
# mergekit's method and parameters (of each source, of all), and the same in ckpt's words
CASES: list[dict[str, Any]] = [
    {
        "mergekit": "task_arithmetic",
        "each": {"weight": [0.5, 1.0, 0.25]},
        "all": {"lambda": 0.7},
        "ckpt": {"method": "task_arithmetic", "scale": 0.7},
    },
    {
        "mergekit": "task_arithmetic",
        "each": {"weight": [0.5, 1.0, 0.25]},
        "all": {"normalize": True},
        "ckpt": {"method": "pipeline", "stages": [{"combine": "mean"}]},
    },
    {
        "mergekit": "ties",
        "each": {"weight": [0.5, 1.0, 0.25], "density": [0.25, 0.25, 0.25]},
        "all": {"lambda": 0.7},
        "ckpt": {"method": "ties", "keep": 0.25, "scope": "tensor", "zero_sign": "positive", "scale": 0.7},
    },
    {
        "mergekit": "ties",
        "each": {"weight": [1.0, 1.0, 1.0], "density": [0.5, 0.5, 0.5]},
        "all": {"normalize": False},
        "ckpt": {"method": "ties", "keep": 0.5, "scope": "tensor", "zero_sign": "positive", "aggregate": "sum"},
    },
    {
        "mergekit": "breadcrumbs",
        "each": {"weight": [0.5, 1.0, 0.25], "density": [0.5, 0.5, 0.5], "gamma": [0.0625, 0.0625, 0.0625]},
        "all": {"lambda": 0.7},
        "ckpt": {"method": "breadcrumbs", "scope": "tensor", "keep": 0.5, "out": 0.0625, "scale": 0.7},
    },
    {
        "mergekit": "breadcrumbs_ties",
        "each": {"weight": [0.5, 1.0, 0.25], "density": [0.5, 0.5, 0.5], "gamma": [0.0625, 0.0625, 0.0625]},
        "all": {"normalize": True},
        "ckpt": {
            "method": "breadcrumbs",
            "scope": "tensor",
            "keep": 0.5,
            "out": 0.0625,
            "scale": 1.0,
            "consensus": "sign",
            "zero_sign": "positive",
        },
    },
    {
        "mergekit": "dare_linear",
        "each": {"weight": [0.5, 1.0, 0.25], "density": [0.4, 0.4, 0.4]},
        "all": {},
        "ckpt": {"method": "dare", "keep": 0.4, "rescale": "l1"},
    },
    {
        "mergekit": "dare_ties",
        "each": {"weight": [0.5, 1.0, 0.25], "density": [0.4, 0.4, 0.4]},
        "all": {},
        "ckpt": {"method": "dare_ties", "keep": 0.4, "rescale": "l1", "zero_sign": "positive", "aggregate": "sum"},
    },
    {
        "mergekit": "della",
        "each": {"weight": [0.5, 1.0, 0.25], "density": [0.5, 0.5, 0.5], "epsilon": [0.2, 0.2, 0.2]},
        "all": {},
        "ckpt": {"method": "della", "keep": 0.5, "spread": 0.2, "rescale": "l1", "zero_sign": "positive"},
    },
    {
        "mergekit": "ram",
        "each": {},
        "all": {"epsilon": 0.05},
        "ckpt": {"method": "ram", "least": 0.05},
    },
]


def models() -> list[dict[str, NDArray[np.float32]]]:
    """The base and three fine-tunes of it."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    tuned = [{n: (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in base.items()} for _ in STEPS]
    return [base, *tuned]


def key_of(name: str, step: int) -> int:
    """Of the random numbers of ckpt: seed 0, this source, this tensor (docs/explanation/task-vectors.md)."""
    text = f"0\0{step}:0\0model/{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@contextmanager
def masks_of_ckpt(found: list[dict[str, NDArray[np.float32]]]) -> Iterator[None]:
    """While this is open, mergekit keeps the elements that ckpt keeps."""
    base = found[0]
    owner = {
        (one[name] - base[name]).tobytes(): (name, step)
        for step, one in zip(STEPS, found[1:], strict=True)
        for name in base
    }
    current: list[tuple[str, int]] = []
    sparsify = generalized_task_arithmetic.sparsify

    def watched(delta: torch.Tensor, **more: Any) -> torch.Tensor:
        current[:] = [owner[delta.numpy().tobytes()]]
        return sparsify(delta, **more)

    def bernoulli(chances: torch.Tensor) -> torch.Tensor:
        name, step = current[0]
        numbers = np.empty(chances.numel())
        merge_reference.uniform(key_of(name, step), 0, numbers)
        kept = numbers.reshape(tuple(chances.shape)) < chances.double().numpy()
        return torch.from_numpy(kept).to(chances.dtype)

    with (
        mock.patch.object(generalized_task_arithmetic, "sparsify", watched),
        mock.patch.object(torch, "bernoulli", bernoulli),
    ):
        yield


def merged(case: dict[str, Any], folder: pathlib.Path, into: pathlib.Path) -> dict[str, NDArray[np.float32]]:
    """What mergekit makes."""
    each = case["each"]
    config = {
        "merge_method": case["mergekit"],
        "base_model": str(folder / "0"),
        "models": [{"model": str(folder / "0")}]
        + [
            {"model": str(folder / str(step)), "parameters": {key: values[i] for key, values in each.items()}}
            for i, step in enumerate(STEPS)
        ],
        "parameters": case["all"],
        "dtype": "float32",
    }
    run_merge(MergeConfiguration.model_validate(config), str(into), MergeOptions(quiet=True, copy_tokenizer=False))
    out: dict[str, NDArray[np.float32]] = {}
    for file in sorted(into.glob("*.safetensors")):
        out |= load_file(file)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=pathlib.Path, default=HERE / "mergekit.npz")
    output = parser.parse_args().output
    found = models()
    arrays = {f"{number}/{name}": array for number, one in enumerate(found) for name, array in one.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for number, one in enumerate(found):
            (folder / str(number)).mkdir()
            (folder / str(number) / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
            save_file(one, folder / str(number) / "model.safetensors", metadata={"format": "pt"})
        for number, case in enumerate(CASES):
            with masks_of_ckpt(found):
                result = merged(case, folder, folder / f"out{number}")
            assert sorted(result) == sorted(SHAPES), sorted(result)
            arrays |= {f"case {number}/{name}": array for name, array in result.items()}
    packages = ("mergekit", "torch", "transformers", "numpy", "safetensors")
    about = {
        "versions": {"python": sys.version.split()[0], **{one: importlib.metadata.version(one) for one in packages}},
        "cases": CASES,
    }
    np.savez_compressed(output, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
    print(f"{output}: {len(CASES)} cases, {output.stat().st_size} bytes, {about['versions']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
