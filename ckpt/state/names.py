"""Names: keys of a state, fully qualified names of a module's tensors, names of optimizer slots.

In: modules, keys. Out: names. Pure: looks at the structure of modules, never at their tensors' data.

A tensor's name is `<state key>/<name>`: the name of a parameter or buffer is what `named_parameters` gives for the
module without its wrappers, so that a layer keeps its name whatever it is wrapped in.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ckpt.errors import InvalidInputError

# Children by which a wrapper holds the module that it wraps; the names are such that nobody else uses them.
_WRAPPED_CHILDREN = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})


def check_key(key: object) -> str:
    """A key of the state dict as the first part of names; InvalidInputError for one that cannot be."""
    if not isinstance(key, str) or not key or "/" in key or any(ord(c) < 32 for c in key):
        raise InvalidInputError(f"state key {key!r} must be a non-empty string without `/` and control characters")
    return key


def join(*parts: str) -> str:
    """Parts of a name put together."""
    return "/".join(parts)


def slot_name(key: str, param: str, slot: str) -> str:
    """Name of an optimizer slot of a parameter."""
    return f"{key}/{param}/{slot}"


def walk_module(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All (prefix, module) below `root`, itself first, with the prefix ("" or "a.b.") that its tensors' names have.

    Wrappers (DDP, DataParallel, FSDP, torch.compile, activation checkpointing) add nothing to the prefix. A module that
    hangs in two places comes twice.
    """
    return _walk(root, "", ())


def _walk(module: nn.Module, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in above:
        raise InvalidInputError(f"module `{prefix or '<root>'}` of type {type(module).__name__} contains itself")
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            inlined = name in _WRAPPED_CHILDREN or (name == "module" and _holds_module_as_module(module))
            yield from _walk(child, prefix if inlined else f"{prefix}{name}.", (*above, id(module)))


def _holds_module_as_module(module: nn.Module) -> bool:
    return isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))
