"""The container files stay true: they parse, install with the script that `make` runs, and name only what exists.

Method: read them as text and YAML; no Docker engine is needed. The trial's command line goes to the real parser.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

TREE = Path(__file__).resolve().parents[2]
DOCKERFILE = (TREE / "docker/Dockerfile").read_text()


@pytest.fixture
def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((TREE / "docker/compose.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_dockerfile_installs_with_the_script_that_make_runs() -> None:
    commands = re.findall(r"^RUN (.*)$", DOCKERFILE, re.MULTILINE)
    makefile = (TREE / "Makefile").read_text()
    assert commands == ["CKPT_SETUP_APT=1 scripts/setup"]
    assert re.search(r"^setup:.*\n\t@scripts/setup$", makefile, re.MULTILINE)
    assert os.access(TREE / "scripts/setup", os.X_OK)


def test_image_leaves_the_host_s_own_builds_behind() -> None:
    ignored = (TREE / "docker/Dockerfile.dockerignore").read_text().splitlines()
    assert {".venv", "build", "**/*.so"} <= set(ignored)


def test_every_service_is_built_from_the_dockerfile(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        context = (TREE / "docker" / service["build"]["context"]).resolve()
        assert (context, context / service["build"]["dockerfile"]) == (TREE, TREE / "docker/Dockerfile")


def test_trainers_meet_at_one_of_them_and_use_the_s3_service(compose: dict[str, Any]) -> None:
    trainers = {name: service for name, service in compose["services"].items() if name.startswith("trainer")}
    for service in trainers.values():
        options = dict(word.split("=", 1) for word in service["command"] if word.startswith("--") and "=" in word)
        assert int(options["--nnodes"]) == len(trainers) == 2
        assert options["--rdzv-endpoint"].split(":")[0] in trainers
        assert service["environment"]["AWS_ENDPOINT_URL"] == "http://s3:9000"
        assert "s3" in service["depends_on"]


def test_server_takes_the_credentials_that_the_trainers_have(compose: dict[str, Any]) -> None:
    environment = compose["services"]["trainer-0"]["environment"]
    credentials = f"{environment['AWS_ACCESS_KEY_ID']},{environment['AWS_SECRET_ACCESS_KEY']}"
    server = compose["services"]["s3"]["command"][-1]
    assert f"--auth-key {credentials} " in server
    bucket = next(word for word in compose["services"]["trainer-0"]["command"] if "s3://" in word).split("/")[2]
    assert f"mkdir -p /data/{bucket} " in server


def test_module_that_the_trainers_run_takes_their_options(compose: dict[str, Any]) -> None:
    command = compose["services"]["trainer-0"]["command"]
    module = TREE / (command[command.index("-m") + 1].replace(".", "/") + ".py")
    options = [word.split("=")[0] for word in command[command.index("-m") + 2 :]]
    text = module.read_text()
    assert [option for option in options if f'"{option}"' not in text] == []
    default_layout = re.search(r"LAYOUT:-(\w+)", " ".join(command))
    assert default_layout and f'"{default_layout[1]}"' in (module.parent / "parallel.py").read_text()
