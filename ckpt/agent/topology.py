"""Which failure domain a host is in.

In: a topology file, a YAML mapping of host names to names of domains. Out: names. Never guesses: a file that does not hold what
it should is an error, and a host that it lacks is a domain of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from ckpt.config import TOPOLOGY_BYTES_MAX
from ckpt.errors import InvalidInputError


def read_topology(path: Path) -> dict[str, str]:
    """Host to domain, from `path`. Names are taken as they are written: `07` stays `07`.

    Raises:
        InvalidInputError: the file cannot be read, or is no mapping of names to names; names file and line.
    """
    try:
        with path.open("rb") as file:
            text = file.read(TOPOLOGY_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidInputError(
            f"topology file {path} cannot be read: {error.strerror}", kind="bad-topology"
        ) from error
    if len(text) > TOPOLOGY_BYTES_MAX:
        raise InvalidInputError(f"topology file {path} has over {TOPOLOGY_BYTES_MAX} bytes", kind="bad-topology")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInputError(f"topology file {path} is not YAML: {error}", kind="bad-topology") from error
    if not isinstance(root, yaml.MappingNode):
        raise InvalidInputError(f"topology file {path} must map hosts to failure domains", kind="bad-topology")
    found: dict[str, str] = {}
    for host, domain in root.value:
        place = f"topology file {path} line {host.start_mark.line + 1}"
        if not all(isinstance(node, yaml.ScalarNode) and node.value for node in (host, domain)):
            raise InvalidInputError(f"{place} must be `host: domain`", kind="bad-topology")
        if host.value in found:
            raise InvalidInputError(f"{place} names host {host.value} again", kind="bad-topology")
        found[host.value] = domain.value
    return found


def domain_of(host: str, *, given: str | None = None, topology: Mapping[str, str] | None = None) -> str:
    """The domain of `host`: `given` (what `CKPT_FAILURE_DOMAIN` says there), else that of the file, else the host itself."""
    return given or (topology or {}).get(host, host)
