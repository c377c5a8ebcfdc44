"""Runs made by `ckpt.save`, and the program as a function: exit code, stdout, stderr."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import ckpt
from ckpt.cli import run
from ckpt.format import manifest

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "reference" / "json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one call of the program did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)


Program = Callable[..., Outcome]


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = torch.nn.ModuleDict({"wq": torch.nn.Linear(width, width, bias=False)})
        self.norm = torch.nn.LayerNorm(width)


class Model(torch.nn.Module):
    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.layers = torch.nn.ModuleList([Block(width), Block(width)])


def save_run(url: Path, *, steps: tuple[int, ...] = (10, 20, 30), width: int = 8, vocabulary: int = 11) -> None:
    """A run with real tensors, optimizer state, RNG and a plain object; the tensors change from step to step."""
    torch.manual_seed(0)
    model = Model(width, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "rng": ckpt.RNG(), "progress": {"epoch": 1}}
    for step in steps:
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()
        ckpt.save(state, url, step=step, metrics={"loss": 1 / step}, metadata={"note": "a test"})


@pytest.fixture(scope="session")
def saved_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "gpt")
    return folder


@pytest.fixture
def gpt(saved_runs: Path, tmp_path: Path) -> Path:
    """A copy of a run with steps 10, 20, 30, which the test may change."""
    return Path(shutil.copytree(saved_runs / "gpt", tmp_path / "gpt"))


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    """Run the program; with `--json`, what it prints is checked against its schema, both ways."""

    def call(*arguments: object) -> Outcome:
        texts = [str(argument) for argument in arguments]
        capsys.readouterr()
        code = run(texts)
        captured = capsys.readouterr()
        outcome = Outcome(code=code, out=captured.out, err=captured.err)
        if "--json" in texts and outcome.out:
            check_schema(outcome.document, texts[0])
        if "--json" in texts and outcome.err:
            check_schema(json.loads(outcome.err), "error")
        return outcome

    return call


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Change fields of a manifest and make its digest right again."""
    document = {**json.loads(path.read_bytes()), **changes}
    document.pop("digest")
    document["digest"] = manifest.sha256(manifest.canonical(document))
    path.write_bytes(manifest.canonical(document))


def check_schema(document: Any, name: str) -> None:
    """The document is valid, and has no field that the schema does not know."""
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)
    unknown = undocumented(document, schema, name)
    assert not unknown, f"fields that docs/reference/json/{name}.json does not have: {unknown}"


def undocumented(document: Any, schema: dict[str, Any], place: str) -> list[str]:
    if isinstance(document, list) and "items" in schema:
        return [found for item in document for found in undocumented(item, schema["items"], f"{place}[]")]
    if not isinstance(document, dict) or "properties" not in schema:
        return []
    known = schema["properties"]
    out = [f"{place}.{key}" for key in document if key not in known]
    return out + [
        f for key in document if key in known for f in undocumented(document[key], known[key], f"{place}.{key}")
    ]
