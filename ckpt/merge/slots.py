"""Which optimizer slots belong to which parameter, and which of them is its master copy.

In: the tensors of one source. Out: ids of slots by parameter. Pure. A slot is a tensor of role `optim.<slot>` that is called
`<state key>/<parameter>/<slot>`, where `<parameter>` is the parameter's name without its own state key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt.format.spec import TensorSpec

ROLE = "optim."
# What optimizers call the fp32 copy of a parameter of lower precision: apex and Transformer Engine, Megatron, DeepSpeed, others.
MASTER_SLOTS = (
    "master",
    "master_param",
    "master_weight",
    "main_param",
    "fp32",
    "fp32_param",
    "fp32_weight",
    "param_fp32",
)
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "v", "exp_avg_sq_row", "exp_avg_sq_col")
COUNTERS = ("step", "steps", "t")


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The slots of one source's parameters."""

    by_param: Mapping[str, Mapping[str, int]]  # name of the parameter -> slot -> tensor id
    ambiguous: frozenset[str]  # parameters whose slots may as well be those of another one

    def of(self, param: str, slot: str) -> int | None:
        return self.by_param.get(param, {}).get(slot)


def slots_of(specs: Sequence[TensorSpec], names: Mapping[int, str]) -> Slots:
    """Find the slots.

    Args:
        names: tensor id to the name that the recipe knows it by.
    """
    owners: dict[str, list[str]] = {}  # path without state key -> parameters
    for i, spec in enumerate(specs):
        if not spec.role.startswith(ROLE) and i in names:
            for name in (names[i], *spec.aliases):
                owners.setdefault(name.partition("/")[2] or name, []).append(names[i])
    found: dict[str, dict[str, int]] = {}
    for i, spec in enumerate(specs):
        if spec.role.startswith(ROLE) and i in names:
            slot = spec.role[len(ROLE) :]
            path = names[i].partition("/")[2]
            path = path[: -len(slot) - 1] if path.endswith("/" + slot) else path.rpartition("/")[0]
            for owner in dict.fromkeys(owners.get(path, ())):
                found.setdefault(owner, {})[slot] = i
    ambiguous = frozenset(name for names_of in owners.values() if len(set(names_of)) > 1 for name in names_of)
    return Slots(by_param=found, ambiguous=ambiguous)


def master_of(param: TensorSpec, slots: Mapping[str, int], specs: Sequence[TensorSpec], wanted: str) -> int | None:
    """The id of the master copy of a parameter, None when there is none.

    Args:
        slots: of this parameter.
        wanted: `auto` (a usual name, the parameter's shape, more precision), `none`, or the name of a slot.
    """
    if wanted == "none":
        return None
    names = MASTER_SLOTS if wanted == "auto" else (wanted,)
    for name in names:
        found = slots.get(name)
        if found is None or specs[found].shape != param.shape:
            continue
        if wanted != "auto" or specs[found].itemsize > param.itemsize:
            return found
    return None


def is_master(slot: str, wanted: str) -> bool:
    """Whether a slot of this name holds master copies."""
    return slot in MASTER_SLOTS if wanted == "auto" else slot == wanted
