"""A recipe is checked whole, with the line of what is wrong, and says all that the options say.

Method: texts; the parsed record, or the error.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import ckpt
from ckpt.errors import InvalidInputError
from ckpt.merge.nodes import read_yaml
from ckpt.merge.recipe import Recipe, StepRange, recipe_of
from tests.merge.samples import images, save_run


def parse(text: str) -> Recipe:
    return recipe_of(read_yaml(text, source="recipe.yaml"))


WHOLE = """\
recipe: 1
name: a test
sources:
  - runs/gpt@800..1000
  - {run: s3://bucket/run, steps: {from: 10}, every: 2, last: 3, weight: 0.5}
  - {folder: hf/llama, key: net, step: 5, rename: [{match: 'net/(.*)', to: 'model/\\1'}]}
base: runs/base@0
combine: {method: mwa, by: loss, penalty: 7e-1}
rules:
  - {match: "*.router.bias", policy: newest}
  - {match: [embed.**], combine: {method: uniform}}
state: {optimizer: newest, rng: drop, masters: fp32}
numerics: {dtype: bfloat16, nan: propagate}
random: {seed: 17}
limits: {memory: 8GiB, workers: 2}
output: {url: merged/gpt, step: 7}
intersect: true
"""


def test_a_whole_recipe() -> None:
    recipe = parse(WHOLE)
    assert recipe.sources[0].steps == StepRange(first=800, last=1000)
    assert (recipe.sources[1].steps, recipe.sources[1].weight) == (StepRange(first=10, last=None), 0.5)
    assert recipe.sources[2].rename == (("net/(.*)", "model/\\1"),)
    assert recipe.base is not None and recipe.base.steps == 0
    assert (recipe.combine.method, recipe.combine.parameters["penalty"].number("")) == ("mwa", 0.7)
    assert [rule.policy for rule in recipe.rules] == ["newest", "combine"]
    assert (recipe.state.optimizer, recipe.state.rng, recipe.state.masters) == ("newest", "drop", "fp32")
    assert (recipe.dtype, recipe.nan, recipe.seed, recipe.intersect) == ("bfloat16", "propagate", 17, True)
    assert (recipe.memory_bytes, recipe.workers, recipe.output, recipe.step) == (8 << 30, 2, "merged/gpt", 7)


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        ("recipe: 1\nsources: [a]\nmetod: uniform\n", 3, "unknown key `metod`", "`method`"),
        ("recipe: 1\nsources:\n  - {run: a, stesp: 3}\nmethod: uniform\n", 3, "unknown key `stesp`", "`steps`"),
        ("recipe: 2\nsources: [a]\nmethod: uniform\n", 1, "version 2", None),
        ("recipe: 1\nsources: []\nmethod: uniform\n", 2, "empty", None),
        ("recipe: 1\nsources: [a]\n", 1, "either `method`", None),
        ("recipe: 1\nsources: [a]\nmethod: x\ncombine: {method: y}\n", 1, "either `method`", None),
        ("recipe: 1\nsources: ['a@9..3']\nmethod: x\n", 2, "ends before it begins", "3..9"),
        ("recipe: 1\nsources: ['a@x']\nmethod: x\n", 2, "`x` is no step", None),
        ("recipe: 1\nsources: [a]\nmethod: x\nlimits:\n  memory: lots\n", 5, "a size is written like", None),
        ("recipe: 1\nsources: [a]\nmethod: x\nrules:\n- match: w\n", 5, "either `policy` or `combine`", None),
        (
            "recipe: 1\nsources: [a]\nmethod: x\nstate:\n  optimiser: drop\n",
            5,
            "unknown key `optimiser`",
            "`optimizer`",
        ),
        ("recipe: 1\nsources: [a\n", 3, "not YAML", None),
        ("recipe: 1\nrecipe: 1\n", 2, "key `recipe` twice", None),
        ("recipe: 1\nsources:\n- {run: a, folder: b}\nmethod: x\n", 3, "either `run` or `folder`", None),
        ("recipe: 1\nsources:\n- {folder: b, last: 3}\nmethod: x\n", 3, "`last` is for a run", None),
        (
            "recipe: 1\nsources:\n- {run: b, rename: [{match: '(', to: x}]}\nmethod: x\n",
            3,
            "no regular expression",
            None,
        ),
        ("- a\n", 1, "must be a mapping", None),
        ("", None, "empty", None),
    ],
)
def test_the_line_of_what_is_wrong(text: str, line: int | None, message: str, hint: str | None) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse(text)
    assert caught.value.kind == "bad-recipe"
    assert message in caught.value.message
    assert line is None or caught.value.message.startswith(f"recipe.yaml line {line}:"), caught.value.message
    assert hint is None or any(hint in one for one in caught.value.hints)


def test_an_unknown_method_or_parameter_has_its_line(tmp_path: Path) -> None:
    save_run(tmp_path / "run", 2)
    file = tmp_path / "recipe.yaml"
    for text, line in (
        (f"recipe: 1\nsources: ['{tmp_path}/run@10..20']\nmethod: emma\n", 3),
        (f"recipe: 1\nsources: ['{tmp_path}/run@10..20']\ncombine:\n  method: ema\n  dekay: 1\n", 5),
    ):
        file.write_text(text)
        with pytest.raises(InvalidInputError, match=f"recipe.yaml line {line}: "):
            ckpt.merge(file, tmp_path / "out")


def test_a_recipe_does_what_the_options_do(tmp_path: Path) -> None:
    save_run(tmp_path / "run", 4)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"recipe: 1\nsources: [{{run: '{tmp_path}/run', steps: 10..40, last: 3}}]\n"
        "combine: {method: mwa, by: loss, penalty: 0.5}\nnumerics: {dtype: bfloat16}\n"
    )
    ckpt.merge(file, tmp_path / "a")
    ckpt.merge(
        {"run": f"{tmp_path}/run@10..40", "last": 3},
        tmp_path / "b",
        method="mwa",
        by="loss",
        penalty=0.5,
        dtype="bfloat16",
    )
    assert images(tmp_path / "a") == images(tmp_path / "b")


def test_hostile_yaml_is_bounded() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join('*' + chr(97 + i) for _ in range(9))}]\n" for i in range(9)
    )
    for text in (bomb, "[" * 5000, "!!python/object/apply:os.system ['true']", "x" * (5 << 20)):
        with pytest.raises(InvalidInputError):
            parse(text)
