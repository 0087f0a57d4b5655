"""Torch's dtypes by name, what files call them, and which numbers a shape can have. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

MAX_DIMENSIONS = 64
"""Of a tensor: torch's own limit."""

MAX_COUNT = 2**63
"""Counts below this keep products and offsets small enough to compute."""

DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
}
"""Names of torch's dtypes and the bytes of one number."""

STORAGES: Mapping[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
"""The dtype of each class of storages in the module torch."""

SAFETENSORS: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""What the header of a safetensors file calls them."""


def is_count(value: object) -> TypeGuard[int]:
    """True for a number of elements, bytes or steps below MAX_COUNT."""
    return type(value) is int and 0 <= value < MAX_COUNT  # `type is int` keeps out true and false
