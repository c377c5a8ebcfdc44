"""A candidate, as an evaluator sees it: a merged model in memory, or a checkpoint on disk.

In: raw tensors, or where a checkpoint lies. Out: torch tensors, a URL. Good only while its evaluator runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.errors import InvalidInputError
from ckpt.search.point import Point

KIND = "not-given"


@dataclass(frozen=True, kw_only=True)
class RawTensor:
    """A tensor as bytes."""

    data: NDArray[np.uint8]
    dtype: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """What is to be scored."""

    number: int  # of the evaluation, from 0; -1 and below: outside the search
    point: Point
    tensors: Mapping[str, RawTensor] = field(default_factory=dict)  # in memory
    where: tuple[str, int] | None = None  # (url, step), on disk

    @property
    def url(self) -> str:
        """The run that the candidate's checkpoint is in. InvalidInputError where it is in memory."""
        return self._where[0]

    @property
    def step(self) -> int:
        return self._where[1]

    @property
    def _where(self) -> tuple[str, int]:
        if self.where is None:
            raise InvalidInputError(
                "this candidate is in memory and has no URL",
                kind=KIND,
                hints=("make the evaluator with `on_checkpoint`",),
            )
        return self.where

    def state_dict(self, key: str = "model") -> dict[str, Any]:
        """The merged tensors under a state key, as torch tensors by their names there, tied ones under each of their names.

        They are the evaluator's own: changing them changes nothing else. InvalidInputError where the candidate is on disk
        (`ckpt.load` reads it from `url`), or nothing is under this key.
        """
        import torch  # here, so that the command line starts without it

        from ckpt.state.dtypes import torch_dtype

        if self.where is not None:
            raise InvalidInputError(
                "this candidate is on disk", kind=KIND, hints=("load it from `candidate.url` and `candidate.step`",)
            )
        out: dict[str, Any] = {}
        for name, raw in self.tensors.items():
            if raw.data.size:
                tensor = torch.from_numpy(raw.data).view(torch_dtype(raw.dtype)).reshape(raw.shape)
            else:
                tensor = torch.empty(raw.shape, dtype=torch_dtype(raw.dtype))
            for one in (name, *raw.aliases):
                if one.startswith(f"{key}/"):
                    out[one.removeprefix(f"{key}/")] = tensor
        if not out:
            keys = sorted({name.partition("/")[0] for name in self.tensors})
            raise InvalidInputError(f"nothing is under the state key `{key}`, there are: {', '.join(keys)}", kind=KIND)
        return out
