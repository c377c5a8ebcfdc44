"""Goal: `ckpt simulate` says what it found, as a table and as a document, and what it cannot do. Method: call the program."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Program

QUICK = ("--runs", 4, "--duration", "10 d", "--node-mtbf", "60 d")


def test_table_has_a_row_without_and_one_with_memory_for_each_size(program: Program) -> None:
    done = program("simulate", *QUICK, "--ranks", 64, "--ranks", 256, "--group-size", 4, "--parity", 2)

    assert done.code == 0
    rows = [line for line in done.out.splitlines() if line.strip().startswith(("64 ", "256 "))]
    assert ["store only" in row for row in rows] == [True, False, True, False]
    assert all("any 2 of 4" in row for row in rows[1::2])
    assert "seeds 0 to 3" in done.out and "95 % confidence" in done.out
    assert "256 ranks, with memory" in done.err


def test_document_says_the_same_for_the_same_seed_only(program: Program) -> None:
    asked = ("simulate", *QUICK, "--nodes", 64, "--group-size", 8, "--parity", 2, "--memory-every", "60 s", "--json")
    first, again = program(*asked, "--seed", 5).document, program(*asked, "--seed", 5).document
    other = program(*asked, "--seed", 6).document

    assert first == again and first["seed"] == 5
    assert first["rows"] != other["rows"]
    alone, memory = first["rows"]
    assert (alone["memory_every_s"], memory["memory_every_s"]) == (None, 60)
    assert memory["goodput"]["value"] > alone["goodput"]["value"]
    assert memory["goodput"]["value"] + memory["lost"] + memory["stalled"] + memory["down"] == pytest.approx(1)


def test_options_go_before_the_file(program: Program, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes: 32\nranks_per_node: 4\nimage: 1GiB\nmemory_every: never\nstore_every: 30 min\n")
    done = program("simulate", *QUICK, "--cluster", file, "--image", "3GiB", "--json").document

    assert (done["cluster"]["num_nodes"], done["cluster"]["ranks_per_node"]) == (32, 4)
    assert done["tiers"]["image_bytes"] == 3 * 1024**3
    assert [row["store_every_s"] for row in done["rows"]] == [1800]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ranks", 12), "ranks come in whole nodes of 8, found 12"),
        (("--ranks", 64, "--nodes", 8), "either by --nodes or by --ranks"),
        (("--parity", 3, "--group-size", 3), "`parity` must be from 0 to one less than the group size 3"),
        (("--nodes", 4, "--parity", 1, "--group-size", 8), "a group of 8 nodes needs as many"),
        (("--image", "many"), "`image` must be a size"),
        (("--duration", "never"), "the duration must be above 0 and finite"),
        (("--runs", 1), "the number of runs must be from 2"),
        (("--cluster", "nowhere.yaml"), "cluster file `nowhere.yaml` cannot be read"),
        (("--memory-max", "1MiB"), "no code fits"),
        (("--node-mtbf", "1 s", "--trainer-mtbf", "1 s"), "failures would have to be simulated"),
    ],
)
def test_mistakes_are_told_with_exit_code_2(program: Program, arguments: tuple[object, ...], words: str) -> None:
    done = program("simulate", *arguments)

    assert (done.code, words in done.err, done.out) == (2, True, ""), done.err
