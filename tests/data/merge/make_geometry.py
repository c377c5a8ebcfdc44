"""Make geometry.npz: three small models, a base, and what mergekit 0.1.4 makes of them in fp32.

Run once, in an environment of its own that has mergekit: `python make_geometry.py`. The tests need the file only.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

SHAPES = {"w": (24, 16), "norm": (16,), "conv": (4, 3, 3, 3)}
TWO: dict[str, dict[str, Any]] = {
    "slerp": {"parameters": {"t": 0.3}, "base_model": "one"},
    "nuslerp": {"weights": (1.0, 3.0)},
}
THREE: dict[str, dict[str, Any]] = {
    "karcher": {},
    "multislerp": {"weights": (0.5, 1.0, 2.0)},
    "model_stock": {"base_model": "base"},
    "sce": {"base_model": "base", "parameters": {"select_topk": 0.4}},
    "sce_all": {"base_model": "base", "parameters": {"select_topk": 1.0}},
}


def main() -> None:
    rng = np.random.default_rng(7)
    base = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    common = {
        n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()
    }  # so that changes are at acute angles
    models = {"base": base}
    for name in ("one", "two", "three"):
        models[name] = {
            n: (base[n] + 0.3 * common[n] + 0.2 * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()
        }
    arrays = {f"{model}/{n}": array for model, tensors in models.items() for n, array in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        for model, tensors in models.items():
            save_file(tensors, Path(folder) / f"{model}.safetensors")
        for num, cases in ((2, TWO), (3, THREE)):
            for case, config in cases.items():
                found = merged(Path(folder), case, ("one", "two", "three")[:num], config)
                arrays |= {f"{case}/{n}": array for n, array in found.items()}
    np.savez_compressed(Path(__file__).parent / "geometry.npz", **arrays)


def merged(folder: Path, case: str, names: tuple[str, ...], config: dict[str, Any]) -> dict[str, Any]:
    weights = config.get("weights", (None,) * len(names))
    recipe = {
        "merge_method": case.removesuffix("_all"),
        "models": [
            {"model": str(folder / f"{name}.safetensors")} | ({} if w is None else {"parameters": {"weight": w}})
            for name, w in zip(names, weights, strict=True)
        ],
        "dtype": "float32",
        "parameters": config.get("parameters", {}),
    }
    if "base_model" in config:
        recipe["base_model"] = str(folder / f"{config['base_model']}.safetensors")
    path = folder / f"{case}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    program = Path(sys.executable).parent / "mergekit-pytorch"
    subprocess.run([program, path, folder / case], check=True)
    return dict(load_file(folder / case / "model.safetensors"))


if __name__ == "__main__":
    main()
