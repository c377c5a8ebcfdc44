"""Goal: what the documentation shows works as shown. Method: run the code blocks of every page, in order, in one fresh folder.

`python` blocks share a namespace per page, lines of `sh` blocks are `ckpt` commands,  `yaml` blocks parse. Blocks marked
`console` or `text` are not run: they need root, a network or a whole installation; their `make` targets must exist.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
RUN = {"python", "sh"}
KNOWN = RUN | {"yaml", "json", "console", "text", "toml", "c", "mermaid"}
BLOCK = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: pathlib.Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def name_of(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page: pathlib.Path) -> None:
    unknown = [language for language, _ in blocks(page) if language not in KNOWN]

    assert unknown == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", [p for p in PAGES if any(b[0] in RUN for b in blocks(p))], ids=name_of)
def test_code_of_the_page_runs(page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    steps = []
    for language, code in blocks(page):
        if language == "python":
            steps.append(code)
        elif language == "sh":
            steps += [f"_run_command({line!r})" for line in code.splitlines() if line.strip()]
    script = tmp_path / "page.py"
    script.write_text("\n".join([PRELUDE, *steps]), encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=work,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


# In the process of the page: a new process for every line would spend most of its time on importing torch.
PRELUDE = """
def _run_command(line):
    import shlex
    from ckpt.cli import run
    words = shlex.split(line)
    assert words[0] == "ckpt", line
    try:
        code = run(words[1:])
    except SystemExit as stop:
        code = stop.code
    assert not code, f"{line}: exit code {code}"
"""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_yaml_blocks_parse(page: pathlib.Path) -> None:
    for language, code in blocks(page):
        if language == "yaml":
            assert yaml.safe_load(code) is not None


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))

    assert named and {n for n in named if not re.search(rf"^{n}:", makefile, re.MULTILINE)} == set()


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{name_of(page)}: {target}")

    assert broken == []
