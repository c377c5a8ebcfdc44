"""Goal: numbers with units are read right or refused in words. Method: a table of texts, and files with one mistake each."""

from __future__ import annotations

import dataclasses
import math

import pytest

from ckpt.errors import InvalidInputError
from ckpt.simulate.cluster import Cluster, Tiers
from ckpt.simulate.inputs import PARAMETERS, build, default_of, parse, read_file
from ckpt.simulate.search import Demand

BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}
ONE_OF_EACH = {"count": "nodes", "time": "restart", "size": "image", "rate": "store-speed", "share": "slowdown"}


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("count", "128", 128),
        ("count", "1e5", 100_000),
        ("time", "90", 90),
        ("time", "250 ms", 0.25),
        ("time", "1.5h", 5400),
        ("time", "340 d", 340 * 86400),
        ("time", "2 w", 14 * 86400),
        ("time", "5y", 5 * 365 * 86400),
        ("time", "10 min", 600),
        ("time", "never", math.inf),
        ("size", "2GiB", 2 * 1024**3),
        ("size", "512 M", 512 * 1024**2),
        ("size", "1000", 1000),
        ("size", "3 B", 3),
        ("rate", "10 GiB/s", 10 * 1024**3),
        ("rate", "1.5TB/s", 1.5 * 1024**4),
        ("rate", "1e9", 1e9),
        ("share", "2%", 0.02),
        ("share", "0.02", 0.02),
    ],
)
def test_texts_that_mean_a_number(kind: str, text: str, value: float) -> None:
    assert parse(BY_NAME[ONE_OF_EACH[kind]], text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("count", "1.5"),
        ("count", "12 nodes"),
        ("count", "never"),
        ("count", ""),
        ("time", "5 m"),
        ("time", "-3 s"),
        ("time", "soon"),
    ]
    + [
        ("size", "2 GiB/s"),
        ("size", "iB"),
        ("size", "1 iB"),
        ("rate", "10 GiB/h"),
        ("rate", "never"),
        ("share", "2 GiB"),
    ]
    + [("time", "nan"), ("size", "2 XB"), ("share", "%")],
)
def test_texts_that_mean_none_are_refused_with_an_example(kind: str, text: str) -> None:
    with pytest.raises(InvalidInputError, match=f"`{ONE_OF_EACH[kind]}` must be a") as error:
        parse(BY_NAME[ONE_OF_EACH[kind]], text)
    assert error.value.kind == "bad-number"


def test_every_field_of_the_records_is_a_parameter_with_its_default() -> None:
    fields = [(record, f.name) for record in (Cluster, Tiers, Demand) for f in dataclasses.fields(record)]

    assert {(p.record, p.field) for p in PARAMETERS} == set(fields) and len(PARAMETERS) == len(fields)
    assert build({}) == (Cluster(), Tiers(), Demand())
    assert [default_of(p) for p in PARAMETERS if p.record is Demand][:4] == [None] * 4


def test_a_cluster_file_is_read() -> None:
    texts = read_file("nodes: 64\nnode_mtbf: 200 d  # measured\nimage: '3GiB'\nstore_every: never\n", source="c.yaml")
    cluster, tiers, demand = build(texts)

    assert (cluster.num_nodes, cluster.node_mtbf_s, tiers.image_bytes) == (64, 200 * 86400, 3 * 1024**3)
    assert (demand.store_every_s, demand.group_size) == (math.inf, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes: 4\nnodess: 5\n", "c.yaml line 2: unknown name `nodess`"),
        ("nodes: 4\nnodes: 5\n", "c.yaml line 2: `nodes` is there twice"),
        ("nodes: [4]\n", "c.yaml line 1: expected `name: value`"),
        ("- nodes\n", "c.yaml: expected lines"),
        ("", "c.yaml: expected lines"),
        ("nodes: {\n", "c.yaml line 2: not YAML"),
        ("a: &a [1]\nb: *c\n", "not YAML"),
        ("nodes: \x00", "not YAML"),
        ("#" * 70_000, "at most 65,536 bytes"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_files_with_a_mistake_are_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words) as error:
        read_file(text, source="c.yaml")
    assert error.value.kind == "bad-cluster"


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(InvalidInputError) as error:
        read_file("node_mtfb: 3 d", source="c.yaml")
    assert error.value.hints == ("did you mean `node_mtbf`?",)
