"""The numbers of a simulation as text: their names, their units, the cluster file.

In: texts with units (`340 d`, `2GiB`, `10 GiB/s`, `2 %`), or the text of a YAML file of such. Out: records. Pure; opens no file.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ckpt import config
from ckpt.errors import InvalidInputError
from ckpt.simulate.cluster import Cluster, Tiers
from ckpt.simulate.search import Demand

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z%/]*)")
_SECONDS = {"ms": 0.001, "s": 1, "": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_POWERS = "BKMGTP"


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number that a user can give, as an option or in a cluster file (with `_` for `-`)."""

    name: str
    record: type  # Cluster, Tiers or Demand
    field: str
    kind: str  # count, time, size, rate or share
    text: str

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


def _parameters(record: type, *rows: tuple[str, str, str, str]) -> tuple[Parameter, ...]:
    return tuple(Parameter(record=record, name=n, field=f, kind=k, text=t) for n, f, k, t in rows)


PARAMETERS = (
    *_parameters(
        Cluster,
        ("nodes", "num_nodes", "count", "Nodes."),
        ("ranks-per-node", "ranks_per_node", "count", "Ranks of a node."),
        ("node-mtbf", "node_mtbf_s", "time", "Mean time until a node is lost with its memory, of one node."),
        ("trainer-mtbf", "trainer_mtbf_s", "time", "Mean time until the trainers of a node crash, of one node."),
        ("nodes-per-domain", "nodes_per_domain", "count", "Nodes of a failure domain (a switch, a power supply)."),
        ("domain-mtbf", "domain_mtbf_s", "time", "Mean time until a domain is lost at once, of one domain."),
        ("site-mtbf", "site_mtbf_s", "time", "Mean time until all nodes are lost at once."),
        ("detect", "detect_s", "time", "From a failure until it is known."),
        ("replace", "replace_s", "time", "Until a node stands in for a lost one."),
        ("restart", "restart_s", "time", "To start the trainers again."),
    ),
    *_parameters(
        Tiers,
        ("image", "image_bytes", "size", "State of one rank."),
        ("memory-speed", "memory_bytes_per_s", "rate", "Of one rank to and from its own agent."),
        ("network-speed", "network_bytes_per_s", "rate", "Of one node, each way, as far as agents may use it."),
        ("code-speed", "code_bytes_per_s", "rate", "Of one node's erasure coder."),
        ("store-node-speed", "store_node_bytes_per_s", "rate", "Of one node to and from the store."),
        ("store-speed", "store_bytes_per_s", "rate", "Of the store, all nodes together."),
        ("memory-stall", "memory_stall_s", "time", "Training stands still so long for a snapshot in memory."),
        ("store-stall", "store_stall_s", "time", "Training stands still so long for a save to the store."),
        ("slowdown", "slowdown", "share", "Speed that training loses while a snapshot is on its way."),
    ),
    *_parameters(
        Demand,
        ("group-size", "group_size", "count", "Nodes of a group; default: the best."),
        ("parity", "parity", "count", "Nodes of a group that may be lost; default: the best."),
        ("memory-every", "memory_every_s", "time", "Work between snapshots in memory, or never; default: the best."),
        ("store-every", "store_every_s", "time", "Work between saves to the store, or never; default: the best."),
        ("store-every-max", "store_every_max_s", "time", "The best is looked for up to this interval."),
        (
            "memory-max",
            "memory_bytes_per_rank_max",
            "size",
            "Memory that an agent may take, when the best is looked for.",
        ),
    ),
)


def parse(parameter: Parameter, text: str) -> float | int:
    """The number that a text means. InvalidInputError (`bad-number`) that says what is expected."""
    text = text.strip()
    match = _NUMBER.fullmatch(text)
    if text in ("never", "inf") and parameter.kind in ("time", "size"):
        return math.inf
    value = None if match is None else _value(parameter.kind, float(match[1]), match[2])
    if value is None or match is None:
        expected = {
            "count": "a whole number",
            "time": "a time such as `90 s`, `250 ms`, `6 h`, `340 d`, `5 y` or `never`",
            "size": "a size such as `512MiB` or `2GiB`",
            "rate": "a rate such as `10GiB/s`",
            "share": "a share such as `0.02` or `2%`",
        }[parameter.kind]
        raise InvalidInputError(f"`{parameter.name}` must be {expected}, found {text!r}", kind="bad-number")
    return value


def _value(kind: str, number: float, unit: str) -> float | int | None:
    """The number in its base unit; None for a unit that its kind does not have."""
    if kind == "count":
        return int(number) if unit == "" and number == int(number) else None
    if kind == "time":
        return number * _SECONDS[unit] if unit in _SECONDS else None
    if kind == "share":
        return {"": number, "%": number / 100}.get(unit)
    if kind == "rate":
        if not unit.endswith("/s") and unit != "":
            return None
        unit = unit.removesuffix("/s")
    power = re.fullmatch(r"([KMGTP]?)(i?)B?", unit, re.IGNORECASE)
    if power is None or (power[2] and not power[1]):
        return None
    return number * 1024.0 ** _POWERS.index((power[1] or "B").upper())


def read_file(text: str, *, source: str) -> dict[str, str]:
    """The texts of a cluster file, by the names of parameters.

    InvalidInputError (`bad-cluster`) that names the line, and for an unknown name the nearest one.
    """
    if len(text.encode()) > config.SIMULATE_FILE_BYTES_MAX:
        raise InvalidInputError(
            f"{source}: a cluster file has at most {config.SIMULATE_FILE_BYTES_MAX:,} bytes", kind="bad-cluster"
        )
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it is nested too deep or has characters that YAML does not allow"
        raise InvalidInputError(f"{source}{line}: not YAML: {problem}", kind="bad-cluster") from None
    if not isinstance(root, yaml.MappingNode):
        raise InvalidInputError(f"{source}: expected lines `name: value`", kind="bad-cluster")
    known = {parameter.key: parameter.name for parameter in PARAMETERS}
    found: dict[str, str] = {}
    for key, value in root.value:
        at = f"{source} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
            raise InvalidInputError(f"{at}: expected `name: value`, both of one line", kind="bad-cluster")
        if key.value not in known:
            near = difflib.get_close_matches(key.value, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}"
            raise InvalidInputError(f"{at}: unknown name `{key.value}`", kind="bad-cluster", hints=(hint,))
        if known[key.value] in found:
            raise InvalidInputError(f"{at}: `{key.value}` is there twice", kind="bad-cluster")
        found[known[key.value]] = value.value
    return found


def build(texts: Mapping[str, str]) -> tuple[Cluster, Tiers, Demand]:
    """The records that texts by parameter name give; defaults where there is none."""
    values: dict[type, dict[str, Any]] = {Cluster: {}, Tiers: {}, Demand: {}}
    for parameter in PARAMETERS:
        if parameter.name in texts:
            values[parameter.record][parameter.field] = parse(parameter, texts[parameter.name])
    return Cluster(**values[Cluster]), Tiers(**values[Tiers]), Demand(**values[Demand])


def default_of(parameter: Parameter) -> Any:
    """What a parameter is where it is not given; None: the best is looked for."""
    return next(f.default for f in dataclasses.fields(parameter.record) if f.name == parameter.field)
