"""The dtypes that a checkpoint can hold: their names, sizes, and how safetensors and NumPy call them.

In: a dtype name. Out: `DType`. Pure; the torch side of the table is in ckpt/state/dtypes.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class DType:
    """One storable dtype. All are little-endian at rest."""

    name: str  # as in tensors.parquet: PyTorch's name without the `torch.`
    itemsize: int  # bytes
    safetensors: str | None  # code in an image header; None: stored as bytes ("U8")
    numpy: str | None  # NumPy's name, None where NumPy has none


def _dtype(name: str, itemsize: int, safetensors: str | None, numpy: str | None = "") -> DType:
    return DType(name=name, itemsize=itemsize, safetensors=safetensors, numpy=name if numpy == "" else numpy)


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        _dtype("bool", 1, "BOOL"),
        _dtype("uint8", 1, "U8"),
        _dtype("int8", 1, "I8"),
        _dtype("uint16", 2, "U16"),
        _dtype("int16", 2, "I16"),
        _dtype("uint32", 4, "U32"),
        _dtype("int32", 4, "I32"),
        _dtype("uint64", 8, "U64"),
        _dtype("int64", 8, "I64"),
        _dtype("float16", 2, "F16"),
        _dtype("bfloat16", 2, "BF16", None),
        _dtype("float32", 4, "F32"),
        _dtype("float64", 8, "F64"),
        _dtype("complex32", 4, None, None),
        _dtype("complex64", 8, "C64"),
        _dtype("complex128", 16, None),
        _dtype("float8_e4m3fn", 1, "F8_E4M3", None),
        _dtype("float8_e5m2", 1, "F8_E5M2", None),
        _dtype("float8_e4m3fnuz", 1, None, None),
        _dtype("float8_e5m2fnuz", 1, None, None),
        _dtype("float8_e8m0fnu", 1, None, None),
    )
}


def dtype_of(name: str) -> DType:
    """The dtype of this name; InvalidInputError for one that a checkpoint cannot hold."""
    try:
        return DTYPES[name]
    except KeyError:
        raise InvalidInputError(
            f"dtype `{name}` cannot be stored", kind="unknown-dtype", hints=(f"known: {', '.join(DTYPES)}",)
        ) from None
