"""An evaluator as a command: `evaluate.py TARGET URL STEP [SECONDS]` scores how near a checkpoint is to arrays in a file.

It reads the images as plain safetensors files, without ckpt and torch, so that it starts in no time.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def main(target: str, url: str, step: str, pause_s: str = "0") -> None:
    tensors = {}
    for image in (Path(url) / f"step-{int(step):012d}").rglob("*.safetensors"):
        tensors.update(load_file(image))
    with np.load(target) as wanted:
        each = [np.mean((tensors[f"model/{name}"].astype(np.float64) - wanted[name]) ** 2) for name in sorted(wanted)]
    time.sleep(float(pause_s))
    print("scored", url)
    print(json.dumps({"score": -float(np.mean(each))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
