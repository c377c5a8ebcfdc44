"""Name patterns: which tensors a rule is about, and which layer or expert each of them belongs to.

In: pattern text and tensor names. Out: the captured numbers, or None. Pure. Never knows shapes or meshes.

A tensor name is `<state key>/<path>`, for optimizer state `<state key>/<path>/<slot>`. A pattern with a `/` is compared
with the whole name, one without with the path alone, so that it covers a parameter and its optimizer state.

    *        any characters of one component, none or more (never `.` or `/`)
    **       any characters at all
    {a,b}    one of these words (each may hold `*` and `**`)
    {layer}  a decimal number without leading zeros, handed on under this name
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ckpt.errors import InvalidInputError

_TOKEN = re.compile(r"\*\*|\*|\{[^{}]*\}|[^*{}]+|[{}]")
_CAPTURE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PATTERN_BYTES_MAX = 1024


@dataclass(frozen=True, kw_only=True)
class TensorName:
    """A tensor name in its parts."""

    key: str  # state key: "model", "optimizer"
    path: str  # "layers.3.attention.wq.weight"
    slot: str | None  # "exp_avg" of optimizer state, None for anything else

    @staticmethod
    def parse(name: str) -> TensorName:
        """Split at the first and at the last `/`. A name without `/` is all path."""
        key, slash, rest = name.partition("/")
        if not slash:
            return TensorName(key="", path=name, slot=None)
        path, slash, slot = rest.rpartition("/")
        return TensorName(key=key, path=path if slash else slot, slot=slot if slash else None)


@dataclass(frozen=True)
class NamePattern:
    """One compiled pattern. Two patterns with the same text are equal."""

    text: str

    def __post_init__(self) -> None:
        if not self.text or len(self.text.encode()) > PATTERN_BYTES_MAX:
            raise InvalidInputError(f"a name pattern has 1 to {PATTERN_BYTES_MAX} bytes, found {len(self.text)}")
        seen: set[str] = set()
        for token in _tokens(self.text):
            if token in ("{", "}"):
                raise InvalidInputError(f"pattern `{self.text}` has a `{token}` without its partner")
            if not token.startswith("{") or "," in token:
                continue
            if not _CAPTURE.fullmatch(token[1:-1]):
                raise InvalidInputError(
                    f"pattern `{self.text}`: `{token}` is neither a name like {{layer}} nor a list like {{a,b}}"
                )
            if token in seen:
                raise InvalidInputError(f"pattern `{self.text}` names {token} twice")
            seen.add(token)

    @cached_property
    def regex(self) -> re.Pattern[str]:
        return re.compile("".join(_regex_of(token) for token in _tokens(self.text)), re.DOTALL)

    @cached_property
    def whole_name(self) -> bool:
        """True when the pattern is about whole names, state key included."""
        return "/" in self.text

    @cached_property
    def exact(self) -> bool:
        """True when the pattern is a name, letter by letter."""
        return not any(token[0] in "*{" for token in _tokens(self.text))

    @cached_property
    def captures(self) -> frozenset[str]:
        return frozenset(t[1:-1] for t in _tokens(self.text) if t.startswith("{") and "," not in t)

    @cached_property
    def level(self) -> int:
        """Which pattern wins where several match, the highest.

        With the state key (so that a rule for optimizer state wins over that of its parameter): 4 a name in full,
        3 a pattern. Without: 2 a path in full, 1 a pattern, 0 `**`.
        """
        if self.text == "**":
            return 0
        return (3 if self.whole_name else 1) + self.exact

    def match(self, name: str, parsed: TensorName) -> dict[str, int] | None:
        """The captured numbers when the pattern matches this tensor, else None."""
        text = name if self.whole_name else parsed.path
        if self.exact:  # the usual case of thousands of names: compiling each would take a second
            return {} if text == self.text else None
        found = self.regex.fullmatch(text)
        return None if found is None else {key: int(value) for key, value in found.groupdict().items()}


def _tokens(text: str) -> Iterator[str]:
    return (found.group() for found in _TOKEN.finditer(text))


def _regex_of(token: str) -> str:
    if token == "**":
        return ".*"
    if token == "*":
        return "[^./]*"
    if token.startswith("{") and "," in token:
        words = ("".join(_regex_of(part) for part in _tokens(word)) for word in token[1:-1].split(","))
        return f"(?:{'|'.join(words)})"
    if token.startswith("{"):
        return f"(?P<{token[1:-1]}>0|[1-9][0-9]{{0,8}})"
    return re.escape(token)
