"""Random number generators as state of a rank: taken, put back, and handed on when the world changes.

In: the process's generators, and those that the user names. Out: typed trees. `inherit` is pure; `RNG` reads and sets
generators. Never draws a number, and never leaves some generators set when another one could not be.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ckpt.errors import DamagedError, InvalidInputError, MismatchError
from ckpt.format.objects import Tree, decode, encode
from ckpt.format.spec import ObjectKind

_log = logging.getLogger("ckpt")

Generator = torch.Generator | np.random.Generator | random.Random


@dataclass(frozen=True, kw_only=True)
class Inherited:
    """Which streams a rank goes on with."""

    tree: Tree  # for `RNG.load_state_tree`
    source_rank: int | None  # the saved rank whose streams these are; None: fresh ones


def inherit(rows: Sequence[tuple[int, bytes]], *, rank: int, world: int, name: str = "rng") -> Inherited:
    """The streams of `rank` among `world` ranks, out of the (rank, payload) rows of all saved ranks. Pure.

    Rank r of the new world goes on with the streams of saved rank r. A rank beyond the saved world gets fresh streams,
    from the seed SHA-256("ckpt.rng/1", then each saved payload with its length before it, then the rank), all lengths
    and the rank as 8 bytes little-endian: the same on every try, unlike any other rank's. Streams of saved ranks beyond
    the new world end. The parallel layout plays no part.
    """
    if not 0 <= rank < world:
        raise InvalidInputError(f"rank {rank} is outside a world of {world}")
    by_rank = dict(rows)
    if not by_rank or sorted(by_rank) != list(range(len(rows))):
        raise DamagedError(f"object `{name}` must have one row of each saved rank, found ranks {sorted(by_rank)[:20]}")
    if rank in by_rank:
        return Inherited(tree=decode(by_rank[rank], name=name), source_rank=rank)
    digest = hashlib.sha256(b"ckpt.rng/1")
    for saved_rank in range(len(rows)):
        payload = by_rank[saved_rank].rstrip(b" ")  # an image pads objects with spaces
        digest.update(len(payload).to_bytes(8, "little") + payload)
    digest.update(rank.to_bytes(8, "little"))
    return Inherited(tree={"seed": digest.hexdigest()}, source_rank=None)


class RNG:
    """The random state of this rank: Python's `random`, NumPy's global one, torch on the CPU and all CUDA devices.

    `generators` adds generators of your own, by name: `torch.Generator`, `numpy.random.Generator`, `random.Random`. The
    same names must be there when the state is loaded. Used from the thread that trains; makes no collective.
    """

    kind: ObjectKind = "rank"

    def __init__(self, generators: Mapping[str, Generator] | None = None) -> None:
        self.generators = dict(generators or {})
        for name, generator in self.generators.items():
            if not isinstance(generator, Generator) or isinstance(generator, random.SystemRandom):
                raise InvalidInputError(
                    f"generator `{name}` is a `{type(generator).__name__}`",
                    hints=("give a torch.Generator, a numpy.random.Generator or a random.Random",),
                )

    def state_tree(self) -> Tree:
        """The state of all streams, as a typed tree. Initialises CUDA where there are devices."""
        cuda = _cuda_generators()
        return {
            "python": _get(random),
            "numpy": np.random.get_state(legacy=False),
            "torch": _get(torch.default_generator),
            "cuda": [_get(generator) for generator in cuda],
            "cuda_current": _cuda_current() if cuda else None,
            "named": {name: _get(generator) for name, generator in self.generators.items()},
        }

    def load_state_tree(self, tree: Tree) -> None:
        """Set all streams from what `state_tree` or `inherit` gave.

        Raises MismatchError for other names or kinds of generators, DamagedError for a tree that is not one of RNG's.
        After an error every stream is as it was.
        """
        before = self.state_tree()
        try:
            self._set(tree)
        except (MismatchError, DamagedError):
            self._set(before)
            raise
        except (ValueError, TypeError, KeyError, RuntimeError, OverflowError, AttributeError) as error:
            self._set(before)
            raise DamagedError(f"the saved random state does not fit: {error!r}") from error

    def prepare_rows(
        self, rows: Sequence[tuple[int, bytes]], *, rank: int, world: int, name: str = "rng"
    ) -> Callable[[], None]:
        """Choose with `inherit`; the result loads what was chosen, and warns of streams that are fresh or end.

        Changes nothing yet, and raises here what can be known before: missing rows, other names or kinds of generators.
        """
        chosen, num_saved = inherit(rows, rank=rank, world=world, name=name), len(rows)
        self.check(chosen.tree)

        def act() -> None:
            self.load_state_tree(chosen.tree)
            if chosen.source_rank is None:
                _warn("rng-fresh", f"rank {rank} got fresh random streams: {num_saved} ranks saved, {world} ranks now")
            elif rank == 0 and num_saved > world:
                _warn("rng-ended", f"the random streams of ranks {world} to {num_saved - 1} end: {world} ranks now")

        return act

    def load_rows(self, rows: Sequence[tuple[int, bytes]], *, rank: int, world: int, name: str = "rng") -> None:
        """`prepare_rows`, done at once."""
        self.prepare_rows(rows, rank=rank, world=world, name=name)()

    def check(self, tree: Tree) -> None:
        """Raise MismatchError when the named generators of a tree are not those of this object. Changes nothing."""
        if not isinstance(tree, dict) or not ("seed" in tree or isinstance(tree.get("named"), dict)):
            raise DamagedError(f"not a random state: a `{type(tree).__name__}` without streams")
        if "seed" in tree:
            return
        named = tree["named"]
        if set(named) != set(self.generators):
            raise MismatchError(
                f"generators differ: expected {sorted(self.generators)}, found {sorted(named)} in the checkpoint",
                hints=("pass the generators of these names: ckpt.RNG({...})",),
            )
        for name, generator in self.generators.items():
            if not isinstance(named[name], dict):
                raise DamagedError(f"the saved state of generator `{name}` is not a dict")
            _check_kind(_get(generator), named[name], f"generator `{name}`")

    def _set(self, tree: Tree) -> None:
        self.check(tree)
        if "seed" in tree:
            self._seed(str(tree["seed"]))
            return
        for name, generator in self.generators.items():
            _put(generator, tree["named"][name], f"generator `{name}`")
        _put(torch.default_generator, tree["torch"], "torch's generator")
        _set_cuda(tree["cuda"], tree["cuda_current"])
        _check_bit_generator(np.random.get_state(legacy=False), tree["numpy"], "NumPy's global generator")
        np.random.set_state(tree["numpy"])
        _put(random, tree["python"], "Python's generator")

    def _seed(self, seed: str) -> None:
        random.seed(_derive(seed, "python"))
        like = np.random.get_bit_generator()  # type: ignore[attr-defined]
        np.random.set_state(_numpy_fresh(like, _derive(seed, "numpy")))
        torch.default_generator.manual_seed(_derive(seed, "torch") >> 193)
        for device, cuda in enumerate(_cuda_generators()):
            cuda.manual_seed(_derive(seed, f"cuda:{device}") >> 193)
        for name, generator in self.generators.items():
            value = _derive(seed, f"named/{name}")
            if isinstance(generator, torch.Generator):
                generator.manual_seed(value >> 193)
            elif isinstance(generator, random.Random):
                generator.seed(value)
            else:
                generator.bit_generator.state = _numpy_fresh(generator.bit_generator, value)


def _derive(seed: str, stream: str) -> int:
    """A number of 256 bits for one stream; torch takes its upper 63."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest(), "big")


def _numpy_fresh(like: Any, value: int) -> dict[str, Any]:
    state: dict[str, Any] = type(like)(value).state
    return state


def _get(generator: Any) -> Tree:
    """The state of one generator (or of the module `random`) as a tree."""
    if isinstance(generator, torch.Generator):
        return {"kind": f"torch.{generator.device.type}", "state": generator.get_state().numpy().copy()}
    if isinstance(generator, np.random.Generator):
        return {"kind": "numpy", "state": generator.bit_generator.state}
    version, key, gauss = generator.getstate()
    return {"kind": "python", "version": version, "key": np.array(key, np.uint32), "gauss": gauss}


def _put(generator: Any, tree: Tree, what: str) -> None:
    _check_kind(_get(generator), tree, what)
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.from_numpy(tree["state"].astype(np.uint8, casting="equiv")))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = tree["state"]
    else:
        generator.setstate((tree["version"], tuple(tree["key"].tolist()), tree["gauss"]))


def _check_kind(expected: Tree, found: Tree, what: str) -> None:
    if found.get("kind") != expected["kind"]:
        raise MismatchError(f"{what} is of kind `{expected['kind']}`, found `{found.get('kind')}` in the checkpoint")
    if expected["kind"] == "numpy":
        _check_bit_generator(expected["state"], found.get("state", {}), what)


def _check_bit_generator(expected: Any, found: Any, what: str) -> None:
    name = found.get("bit_generator")
    if name != expected["bit_generator"]:
        raise MismatchError(f"{what} is a `{expected['bit_generator']}`, found `{name}` in the checkpoint")


def _set_cuda(saved: list[Tree], saved_current: int | None) -> None:
    """Give the devices their streams: the current device that of the saved current device, the others by index.

    One process per device is the rule, and its device may have another index on another machine: hence the exchange. A
    device without a saved stream gets a fresh one from a hash of all saved ones and its index; saved streams without a
    device end.
    """
    devices = _cuda_generators()
    if devices:
        source = list(range(max(len(devices), len(saved))))
        if saved_current is not None:
            current = _cuda_current()
            source[current], source[saved_current] = saved_current, current
        seed = hashlib.sha256(encode(saved, name="cuda")).hexdigest()
        fresh = [device for device in range(len(devices)) if source[device] >= len(saved)]
        for device, generator in enumerate(devices):
            if device in fresh:
                generator.manual_seed(_derive(seed, f"cuda:{device}") >> 193)
            else:
                _put(generator, saved[source[device]], f"the generator of cuda:{device}")
        if fresh:
            _warn("rng-fresh-device", f"CUDA devices {fresh} got fresh random streams: {len(saved)} devices were saved")
    if len(saved) > len(devices):
        _warn("rng-ended-device", f"{len(saved) - len(devices)} CUDA random streams end: {len(devices)} devices now")


def _cuda_generators() -> list[torch.Generator]:
    if not torch.cuda.is_available():
        return []
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return list(torch.cuda.default_generators)


def _cuda_current() -> int:
    return torch.cuda.current_device()


def _warn(event: str, message: str) -> None:
    _log.warning("%s", message, extra={"event": event})
