"""The reference page and the schemas say what the program has. Method: compare the page with click's own tables, both ways."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import jsonschema
import pytest

from ckpt.cli.exit_codes import MEANINGS
from ckpt.cli.program import ckpt as program_group

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
PAGE = (REFERENCE / "command-line.md").read_text()
COMMANDS = program_group.commands


def section_of(name: str) -> str:
    found = re.search(rf"^### `ckpt {name}[ `].*?(?=^### |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/reference/command-line.md has no section for `ckpt {name}`"
    return found[0]


def test_the_page_has_the_exit_codes_of_the_program() -> None:
    listed = {int(code): text for code, text in re.findall(r"^\| ([0-9]+) \| (.+) \|$", PAGE, flags=re.MULTILINE)}
    assert listed == MEANINGS


def test_the_page_has_the_commands_of_the_program() -> None:
    assert re.findall(r"^### `ckpt ([a-z]+)", PAGE, flags=re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_has_the_options_of_every_command_and_no_others(name: str) -> None:
    common = PAGE[PAGE.index("## Options of every command") : PAGE.index("## Commands")]
    listed = set(
        re.findall(r"`(-{1,2}[a-z][a-z-]*)`", "\n".join(re.findall(r"^\| `-.*$", common + section_of(name), re.M)))
    )
    options = [parameter for parameter in COMMANDS[name].params if isinstance(parameter, click.Option)]
    assert listed == {flag for option in options for flag in option.opts}
    assert all((option.help or "") in PAGE for option in options)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_the_exit_codes(name: str) -> None:
    text = " ".join(COMMANDS[name].get_help(click.Context(COMMANDS[name], info_name=name)).split())
    assert "Exit status: 0 done" in text and "130 interrupted" in text


def test_every_command_has_a_valid_schema_and_no_schema_is_without_one() -> None:
    files = {path.stem: json.loads(path.read_text()) for path in (REFERENCE / "json").glob("*.json")}
    assert files.keys() == {*COMMANDS, "error"}
    for schema in files.values():
        jsonschema.Draft202012Validator.check_schema(schema)
