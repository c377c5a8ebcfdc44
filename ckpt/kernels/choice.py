"""Which kernel runs: the native core, or the NumPy reference when `CKPT_KERNEL=reference` demands it.

In: the environment, read here only, at call time. Out: the native module and the numbers of a CRC kernel and of a coder. A
demand that cannot be met is an error; there is no silent fallback.
"""

from __future__ import annotations

import os
import platform
from enum import IntEnum
from types import ModuleType
from typing import Any

from ckpt.errors import InvalidInputError

REFERENCE = "reference"
ENVIRONMENT_VARIABLE = "CKPT_KERNEL"
CODER_VARIABLE = "CKPT_CODER"  # for erasure coding alone; where it is not set, `CKPT_KERNEL=reference` holds for it too
LOOPS_VARIABLE = "CKPT_LOOPS"  # for merging alone; likewise
ISAL_HINTS = ("install Intel ISA-L's libisal.so.2: `apt-get install libisal2`, `dnf install libisal`",)


class CrcKernel(IntEnum):
    """As `ckpt_kernel` in native/include/ckpt_core.h."""

    auto = 0
    table = 1
    sse42 = 2
    arm = 3


class Coder(IntEnum):
    """As `ckpt_coder` in native/include/ckpt_core.h."""

    auto = 0
    portable = 1
    isal = 2


class Loops(IntEnum):
    """As `ckpt_loops` in native/include/ckpt_core.h."""

    auto = 0
    portable = 1
    avx2 = 2
    avx512 = 3


class Status(IntEnum):
    """As `ckpt_status` in native/include/ckpt_core.h."""

    OK = 0
    BAD_ARGUMENT = 1
    SOURCE_OUT_OF_BOUNDS = 2
    TARGET_OUT_OF_BOUNDS = 3
    TARGET_OVERLAPS = 4
    NO_KERNEL = 5
    SEGMENT_OUT_OF_BOUNDS = 6
    SYSTEM_ERROR = 7
    SINGULAR = 8


def demanded() -> str | None:
    """The kernel that `CKPT_KERNEL` asks for, None when it leaves the choice to us."""
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if not name:
        return None
    if name == REFERENCE or (name in CrcKernel.__members__ and name != "auto"):
        return name
    known = ", ".join([REFERENCE, *(kernel.name for kernel in CrcKernel if kernel)])
    raise InvalidInputError(
        f"environment variable {ENVIRONMENT_VARIABLE} must name a kernel, found {name!r}",
        kind="unknown-kernel",
        hints=(f"known: {known}; unset it to use the fastest",),
    )


try:
    from ckpt.kernels import _native as _module

    _loaded: ModuleType | None = _module
except ImportError as error:
    if demanded() != REFERENCE:
        raise ImportError(
            f"the native core of ckpt (ckpt/kernels/_native) cannot be loaded: {error}\n"
            "hint: build it with `make native` in a source tree, or `pip install .`\n"
            f"hint: {ENVIRONMENT_VARIABLE}={REFERENCE} runs without it, hundreds of times slower"
        ) from error
    _loaded = None


def native() -> ModuleType:
    """The compiled module; its functions are typed in _native.pyi."""
    if _loaded is None:
        raise InvalidInputError(
            f"the native core of ckpt is not built, and {ENVIRONMENT_VARIABLE} no longer asks for `{REFERENCE}`",
            kind="no-kernel",
            hints=("build it with `make native` in a source tree, or `pip install .`",),
        )
    return _loaded


def crc_kernel() -> CrcKernel:
    """The CRC kernel to run, as demanded. InvalidInputError where this build or this processor does not have it."""
    name = demanded()
    if name is None or name == REFERENCE:
        return CrcKernel.auto
    kernel = CrcKernel[name]
    if not native().kernel_available(kernel):
        raise InvalidInputError(
            f"{ENVIRONMENT_VARIABLE}={name}: this build on this processor ({platform.machine()}) has no such kernel",
            kind="no-kernel",
            hints=(f"here: {', '.join([REFERENCE, *available()])}; unset it to use the fastest",),
        )
    return kernel


def coder_demanded() -> str | None:
    """The coder that the environment asks for, None when it leaves the choice to us."""
    return _demanded(CODER_VARIABLE, "coder", Coder)


def _demanded(variable: str, what: str, kinds: type[Coder] | type[Loops]) -> str | None:
    """What a variable for one part of the kernels asks for."""
    name = os.environ.get(variable)
    everything = demanded()
    if not name:
        return REFERENCE if everything == REFERENCE else None
    if name != REFERENCE and (name not in kinds.__members__ or name == "auto"):
        known = ", ".join([REFERENCE, *(kind.name for kind in kinds if kind)])
        raise InvalidInputError(
            f"environment variable {variable} must name a {what}, found {name!r}",
            kind="unknown-kernel",
            hints=(f"known: {known}; unset it to use the fastest",),
        )
    if everything == REFERENCE and name != REFERENCE:
        raise InvalidInputError(
            f"{variable}={name} contradicts {ENVIRONMENT_VARIABLE}={REFERENCE}, which asks for no native code",
            kind="no-kernel",
        )
    return name


def coder() -> Coder | None:
    """The coder to run, None for the reference. InvalidInputError where the one demanded is not here."""
    name = coder_demanded()
    if name is None:
        return Coder.auto
    if name == REFERENCE:
        return None
    if not native().coder_available(Coder[name]):
        raise InvalidInputError(f"{CODER_VARIABLE}={name}: not here", kind="no-kernel", hints=ISAL_HINTS)
    return Coder[name]


def loops() -> Loops | None:
    """The loops of merging to run, None for the reference. InvalidInputError where those demanded are not here."""
    name = _demanded(LOOPS_VARIABLE, "set of loops", Loops)
    if name is None:
        return Loops.auto
    if name == REFERENCE:
        return None
    if not native().loops_available(Loops[name]):
        raise InvalidInputError(
            f"{LOOPS_VARIABLE}={name}: this build on this processor ({platform.machine()}) has no such loops",
            kind="no-kernel",
            hints=(f"here: {', '.join([REFERENCE, *loops_available()])}; unset it to use the fastest",),
        )
    return Loops[name]


def loops_available() -> list[str]:
    """Names of the loops of merging that run here; none when the native core is not built."""
    if _loaded is None:
        return []
    return [kind.name for kind in Loops if kind and _loaded.loops_available(kind)]


def coders_available() -> list[str]:
    """Names of the native coders that run here; none when the native core is not built."""
    if _loaded is None:
        return []
    return [coder.name for coder in Coder if coder and _loaded.coder_available(coder)]


def available() -> list[str]:
    """Names of the native CRC kernels that run here; none when the native core is not built."""
    if _loaded is None:
        return []
    return [kernel.name for kernel in CrcKernel if kernel and _loaded.kernel_available(kernel)]


def kernel_info() -> dict[str, Any]:
    """What runs here and how it was built, for `ckpt doctor` and reports. JSON-ready; keys are only ever added."""
    name = demanded()
    if name == REFERENCE:
        runs = REFERENCE
    else:
        runs = name or CrcKernel(native().kernel_auto()).name
        crc_kernel()
    chosen, merging = coder(), loops()
    built: dict[str, Any] = {} if _loaded is None else _loaded.build_info()
    return {
        "native": _loaded is not None,
        "core_version": None if _loaded is None else _loaded.CORE_VERSION,
        "demanded": name,
        "copy": REFERENCE if name == REFERENCE else "native",
        "crc32c": runs,
        "crc32c_available": available(),
        "coder": REFERENCE if chosen is None else (chosen or Coder(native().coder_auto())).name,
        "coders_available": coders_available(),
        "loops": REFERENCE if merging is None else (merging or Loops(native().loops_auto())).name,
        "loops_available": loops_available(),
        "isal_library": (_loaded.coder_isal_library() or None) if _loaded is not None else None,
        "machine": platform.machine(),
        "compiler": built.get("compiler"),
        "build_type": built.get("build_type"),
        "sanitizer": built.get("sanitizer"),
    }
