"""What the tensors are called that a method makes of one, where it makes several (`Method.num_outputs`).

In: names. Out: names. Pure. The first one bears the name itself; further ones are under the state key `basis`, by their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.errors import InvalidInputError

KEY = "basis"
UNMERGE = "unmerge"  # the method that puts them together again: ckpt.merge.methods.reversible


def output_name(name: str, number: int) -> str:
    """Of output `number` of a tensor."""
    return name if number == 0 else f"{KEY}/{number}/{name}"


def subject_of(name: str, number: int) -> str:
    """The tensor whose output `number` has this name."""
    return name if number == 0 else name.removeprefix(f"{KEY}/{number}/")


def refuse_taken(names: Sequence[str], more: Sequence[str]) -> None:
    """InvalidInputError (`taken`) where a source has a tensor of a name that is needed."""
    taken = sorted(set(names) & set(more))
    if taken:
        raise InvalidInputError(
            f"the sources have a tensor `{taken[0]}`, and the result needs the state key `{KEY}` for itself",
            kind="taken",
            hints=("rules can rename tensors of a source, or drop some",),
        )
