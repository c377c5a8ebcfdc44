"""The native core keeps its contract under the address and undefined-behaviour sanitizers.

Method: build native/tests with CMake and run it in its own process. `make sanitize` does the same for each sanitizer, that
for threads included.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]


def find_cmake() -> str | None:
    """cmake from the environment of this Python first, where pip puts it, then from PATH."""
    return shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(find_cmake() is None, reason="cmake is not installed")
def test_core_is_clean_under_address_and_undefined_sanitizers(tmp_path: Path) -> None:
    cmake = str(find_cmake())
    options = [
        "-DCKPT_PYTHON=OFF",
        "-DCKPT_TESTS=ON",
        "-DCKPT_SANITIZE=address,undefined",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
    ]
    for command in ([cmake, "-S", str(TREE), "-B", str(tmp_path), *options], [cmake, "--build", str(tmp_path)]):
        built = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert built.returncode == 0, built.stdout + built.stderr
    for name, line in (("test_core", "all core tests passed\n"), ("test_erasure", "all erasure tests passed\n")):
        done = subprocess.run([str(tmp_path / name)], capture_output=True, text=True, timeout=150)
        assert (done.returncode, done.stdout) == (0, line), done.stdout + done.stderr
