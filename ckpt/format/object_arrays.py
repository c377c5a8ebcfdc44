"""NumPy values in the typed tree: arrays, scalars and dtypes, as dtype text plus little-endian bytes.

In: NumPy values, or the fields of a tagged node. Out: the fields, or the values. Pure. Never holds Python objects in an
array, and never gives NumPy a dtype text that it did not check first.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from typing import Any

import numpy as np

from ckpt.config import TENSOR_DIMS_MAX

_DTYPE = re.compile(
    r"\|b1|[|][iu]1|[<>](?:[iu][248]|f[248]|c(?:8|16))|\|S\d{1,9}|[<>]U\d{1,9}"
    r"|[<>][mM]8(?:\[\d{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?"
)
_CODE_POINT_MAX = 0x10FFFF


def dtype_text(dtype: np.dtype[Any]) -> str:
    """NumPy's text of a dtype, as `<f4`; ValueError for one that the tree cannot hold."""
    text = dtype.str
    # The second test refuses dtypes of other packages that borrow a text of NumPy's, rather than losing their kind.
    if _DTYPE.fullmatch(text) is None or np.dtype(text) != dtype:
        raise ValueError(f"its dtype is `{dtype}`")
    return text


def dtype_from(text: object) -> np.dtype[Any]:
    """The dtype of this text; ValueError for text that `dtype_text` cannot give."""
    if type(text) is not str or _DTYPE.fullmatch(text) is None:
        raise ValueError(f"not a dtype: {str(text)[:60]!r}")
    try:
        return np.dtype(text)
    except TypeError as error:
        raise ValueError(f"not a dtype: {text!r}: {error}") from None


def bytes_text(data: bytes | bytearray | memoryview) -> str:
    """Standard base64 with padding."""
    return base64.b64encode(data).decode("ascii")


def bytes_from(text: object) -> bytes:
    """The bytes of standard base64 with padding, and nothing else in it; ValueError otherwise."""
    if type(text) is not str:
        raise ValueError("base64 text is missing")
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError(f"not base64: {error}") from None
    if bytes_text(data) != text:  # unused bits set, or padding in the middle: two texts for the same bytes
        raise ValueError("not base64 in its one form")
    return data


def encode_array(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Fields of an array: row-major, little-endian. ValueError for a dtype or number of dims that cannot be held."""
    little = array.dtype.newbyteorder("<")
    dtype_text(array.dtype)
    if array.ndim > TENSOR_DIMS_MAX:
        raise ValueError(f"an array of {array.ndim} dims; at most {TENSOR_DIMS_MAX} can be held")
    data = np.ascontiguousarray(array, dtype=little).tobytes()
    return {"dtype": dtype_text(little), "shape": list(array.shape), "base64": bytes_text(data)}


def decode_array(dtype: object, shape: object, text: object) -> np.ndarray[Any, Any]:
    """The array, writable and owning its memory; ValueError when the fields contradict each other."""
    kind = dtype_from(dtype)
    if kind.byteorder == ">":
        raise ValueError(f"array data must be little-endian, found `{dtype}`")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > TENSOR_DIMS_MAX:
        raise ValueError(f"not a shape: {str(shape)[:60]}")
    data = bytes_from(text)
    expected = math.prod(shape) * kind.itemsize
    if len(data) != expected:
        raise ValueError(f"expected {expected} bytes for shape {shape} of `{dtype}`, found {len(data)}")
    _check_bytes(data, kind)
    array: np.ndarray[Any, Any] = np.ndarray(tuple(shape), kind, buffer=bytearray(data))
    return array


def _check_bytes(data: bytes, dtype: np.dtype[Any]) -> None:
    """Refuse bytes that NumPy would only stumble over later: a bool that is neither 0 nor 1, text beyond Unicode."""
    if dtype.kind == "b" and data.translate(None, b"\x00\x01"):
        raise ValueError("a bool is neither 0 nor 1")
    if dtype.kind == "U" and data and int(np.frombuffer(data, "<u4").max()) > _CODE_POINT_MAX:
        raise ValueError("text holds a number that is no code point")


def encode_scalar(value: np.generic) -> dict[str, Any]:
    """Fields of a NumPy scalar: its dtype and little-endian bytes."""
    if isinstance(value, (np.str_, np.bytes_)):  # their dtype drops trailing NULs
        kind, data = (
            ("str", str(value).encode("utf-8", "surrogatepass")) if isinstance(value, np.str_) else ("bytes", value)
        )
        return {"dtype": kind, "base64": bytes_text(bytes(data))}
    fields = encode_array(np.asarray(value))
    return {"dtype": fields["dtype"], "base64": fields["base64"]}


def decode_scalar(dtype: object, text: object) -> np.generic:
    """The scalar; ValueError when the fields contradict each other."""
    if dtype == "str":
        return np.str_(bytes_from(text).decode("utf-8", "surrogatepass"))
    if dtype == "bytes":
        return np.bytes_(bytes_from(text))
    if dtype_from(dtype).kind in "SU":
        raise ValueError(f"a scalar of dtype `{dtype}`")
    scalar: np.generic = decode_array(dtype, [], text).flat[0]
    return scalar
