"""Which tensors the sources have in common, and everything in which they differ.

In: opened sources, and what becomes of each tensor of the newest. Out: one `Entry` per tensor of the result, with its id in every
source that it is read from, or one error that lists all differences. Pure: reads nothing but what is open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt.config import MERGE_LISTED_MAX
from ckpt.errors import InvalidInputError, MismatchError
from ckpt.format.spec import TensorSpec
from ckpt.kernels.merge import is_float
from ckpt.merge.policy import Decision, decide, mean_of
from ckpt.merge.recipe import Recipe
from ckpt.merge.slots import ROLE, master_of
from ckpt.merge.sources import Opened, Source

COMPARED = ("combine", "same", "pool")  # policies that read every source


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the result."""

    spec: TensorSpec  # of the result: name, dtype and aliases as there
    decision: Decision
    ids: tuple[int | None, ...]  # in each source: of what is read there
    masters: tuple[bool, ...]  # whether that is a master copy
    means: tuple[int | None, ...] = ()  # of the running mean beside, for policy `pool`
    base: int | None = None  # in the base


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """All tensors of the result, by name, and what was left out."""

    entries: tuple[Entry, ...]
    dropped: tuple[tuple[str, str], ...]  # (name, why) of tensors of the newest source that the result has not


def match(opened: Opened, recipe: Recipe) -> Catalog:
    """Find every tensor of the result in the sources.

    Raises:
        MismatchError: sources differ in names, shapes or kinds of dtype; with `intersect` only when nothing is left.
        InvalidInputError: tensors that cannot be merged (`cannot-merge`).
    """
    newest = opened.newest
    specs = {name: _renamed(newest, i, name) for i, name in newest.names.items()}
    names = frozenset(specs)
    decisions = {name: decide(specs[name], recipe, names) for name in sorted(specs)}
    _refuse(specs, decisions)
    differences: dict[str, list[str]] = {}
    for source in opened.sources:
        _compare(source, newest, specs, decisions, recipe, differences)
    _compare_base(opened.base, specs, decisions, differences)
    if differences and not recipe.intersect:
        raise _mismatch(differences)
    entries, dropped = [], []
    for name, decision in decisions.items():
        if name in differences:
            dropped.append((name, "; ".join(differences[name])))
        elif decision.policy == "drop":
            dropped.append((name, decision.why))
        else:
            entries.append(_entry(name, specs[name], decision, opened, recipe))
    dropped += [(name, "; ".join(texts)) for name, texts in sorted(differences.items()) if name not in decisions]
    if not any(entry.decision.policy == "combine" or entry.decision.rule for entry in entries):
        raise MismatchError(
            "no tensor is left to combine" + (": the sources have none in common" if differences else ""),
            kind="nothing-to-merge",
        )
    return Catalog(entries=tuple(entries), dropped=tuple(dropped))


def _renamed(source: Source, i: int, name: str) -> TensorSpec:
    return dataclasses.replace(source.specs[i], name=name, aliases=source.aliases(i))


def _refuse(specs: Mapping[str, TensorSpec], decisions: Mapping[str, Decision]) -> None:
    refused = [(name, d.why) for name, d in decisions.items() if d.policy == "refuse"]
    refused += [
        (name, f"dtype `{specs[name].dtype}` cannot be combined, as {d.why} wants")
        for name, d in decisions.items()
        if d.policy in ("combine", "pool") and not is_float(specs[name].dtype)
    ]
    if refused:
        raise InvalidInputError(
            f"{len(refused)} tensors cannot be merged:\n" + _listed([f"`{name}`: {why}" for name, why in refused]),
            kind="cannot-merge",
            hints=("a rule says what becomes of them: `rules: [{match: PATTERN, policy: newest}]`",),
        )


def _compare(
    source: Source,
    newest: Source,
    specs: Mapping[str, TensorSpec],
    decisions: Mapping[str, Decision],
    recipe: Recipe,
    out: dict[str, list[str]],
) -> None:
    """Note what one source has otherwise than the newest."""
    if source is newest:
        return
    for name, decision in decisions.items():
        i = _find(source, specs[name])
        if decision.policy not in COMPARED:
            _compare_kind(source, i, newest, specs[name], decision, out)
            continue
        if i is None:
            out.setdefault(name, []).append(f"missing in {source.label}")
            continue
        other = source.specs[i]
        if other.shape != specs[name].shape:
            text = f"{list(other.shape)} in {source.label}, {list(specs[name].shape)} in {newest.label}"
            out.setdefault(name, []).append(text)
        elif is_float(other.dtype) != is_float(specs[name].dtype):
            text = f"`{other.dtype}` in {source.label}, `{specs[name].dtype}` in {newest.label}"
            out.setdefault(name, []).append(text)
    for i, name in source.names.items():
        spec = source.specs[i]
        if spec.role.startswith(ROLE) or name in newest.ids or any(alias in newest.ids for alias in source.aliases(i)):
            continue
        if decide(_renamed(source, i, name), recipe, frozenset(source.names.values())).policy in COMPARED:
            out.setdefault(name, []).append(f"only in {source.label}, missing in {newest.label}")


def _compare_kind(
    source: Source, i: int | None, newest: Source, spec: TensorSpec, decision: Decision, out: dict[str, list[str]]
) -> None:
    """What is copied because it is no number to combine should be none in the other sources, either."""
    if i is not None and decision.policy == "newest" and not decision.rule and not spec.role.startswith(ROLE):
        other = source.specs[i].dtype
        if is_float(other) != is_float(spec.dtype):
            out.setdefault(spec.name, []).append(f"`{other}` in {source.label}, `{spec.dtype}` in {newest.label}")


def _find(source: Source, spec: TensorSpec) -> int | None:
    """A tensor by its name, or by one of its aliases: tied weights may be stored under either."""
    return next((source.ids[name] for name in (spec.name, *spec.aliases) if name in source.ids), None)


def _compare_base(
    base: Source | None,
    specs: Mapping[str, TensorSpec],
    decisions: Mapping[str, Decision],
    out: dict[str, list[str]],
) -> None:
    if base is None:
        return
    for name, decision in decisions.items():
        if decision.policy != "combine" or specs[name].role.startswith(ROLE):
            continue
        i = _find(base, specs[name])
        if i is None:
            out.setdefault(name, []).append(f"missing in the base {base.label}")
        elif base.specs[i].shape != specs[name].shape or not is_float(base.specs[i].dtype):
            found = f"`{base.specs[i].dtype}` {list(base.specs[i].shape)}"
            out.setdefault(name, []).append(f"{found} in the base {base.label}")


def _mismatch(differences: Mapping[str, Sequence[str]]) -> MismatchError:
    lines = [f"`{name}`: {text}" for name, texts in sorted(differences.items()) for text in texts]
    return MismatchError(
        f"the sources differ in {len(differences)} tensors:\n" + _listed(lines),
        hints=("`--intersect` merges what they have in common", "rules can rename tensors of a source, or drop some"),
    )


def _listed(lines: Sequence[str]) -> str:
    more = [f"  and {len(lines) - MERGE_LISTED_MAX} more"] if len(lines) > MERGE_LISTED_MAX else []
    return "\n".join([*(f"  {line}" for line in lines[:MERGE_LISTED_MAX]), *more])


def _entry(name: str, spec: TensorSpec, decision: Decision, opened: Opened, recipe: Recipe) -> Entry:
    """The tensor in all sources that its policy reads; master copies in the place of parameters."""
    found: list[int | None] = []
    masters: list[bool] = []
    for source in opened.sources:
        i = _find(source, spec)
        master = _master(source, i, recipe) if decision.policy == "combine" and i is not None else None
        found.append(i if master is None else master)
        masters.append(master is not None)
    if decision.policy in ("newest", "reset"):
        found = [None] * (len(found) - 1) + [opened.newest.ids[name]]
    elif decision.policy == "oldest":
        found = [_oldest(spec, opened)] + [None] * (len(found) - 1)
    combined = decision.policy in ("combine", "pool") and not spec.role.startswith(ROLE)
    return Entry(
        spec=dataclasses.replace(spec, dtype=recipe.dtype or spec.dtype) if combined else spec,
        decision=decision,
        ids=tuple(found),
        masters=tuple(masters),
        means=tuple(source.ids.get(mean_of(name)) for source in opened.sources) if decision.policy == "pool" else (),
        base=None if opened.base is None else _find(opened.base, spec),
    )


def _master(source: Source, i: int, recipe: Recipe) -> int | None:
    spec = source.specs[i]
    name = source.names[i]
    if spec.role.startswith(ROLE) or name in source.slots.ambiguous:
        return None
    return master_of(spec, source.slots.by_param.get(name, {}), source.specs, recipe.state.masters)


def _oldest(spec: TensorSpec, opened: Opened) -> int:
    oldest = opened.sources[0]
    i = _find(oldest, spec)
    if i is None or (oldest.specs[i].shape, oldest.specs[i].dtype) != (spec.shape, spec.dtype):
        raise MismatchError(f"`{spec.name}` cannot be taken from {oldest.label}: it is not there in the same form")
    return i
