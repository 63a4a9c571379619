"""Python values as tagged JSON: how inputs reach a program and results come back, and nothing else does.

JSON's own types stand for themselves; the others are objects with one key: ``int`` (hexadecimal, for long ones),
``float`` (nan, inf, -inf), ``complex``, ``bytes``, ``tuple``, ``set``, ``frozenset``, ``dict``.  This file is read on both
sides of the pipe: it imports only the standard library.
"""

from __future__ import annotations

import collections
import math
from typing import Any

_LONG = 1 << 1024
"""Larger integers are written in hexadecimal: decimal conversion takes quadratic time, and Python refuses it."""
_DICTS = (dict, collections.Counter, collections.OrderedDict, collections.defaultdict)
_TAGS = frozenset({"int", "float", "complex", "bytes", "tuple", "set", "frozenset", "dict"})


def encode(value: Any) -> Any:
    """``value`` as tagged JSON.  TypeError for a subclass or another type: only plain data has a meaning outside."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_LONG < value < _LONG else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [encode(item) for item in value]
    if kind is tuple or kind is set or kind is frozenset:
        return {kind.__name__: [encode(item) for item in value]}
    if kind in _DICTS:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    raise TypeError(f"a value of type {kind.__name__} is not plain data")


def decode(value: Any) -> Any:
    """The value that ``encode`` wrote; ValueError, TypeError or RecursionError for what it cannot have written.

    An object that is no tag is a dict with text keys, so hand-written JSON is read as it looks.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value)) if len(value) == 1 else None
    if tag not in _TAGS:
        return {key: decode(item) for key, item in value.items()}
    body = value[tag]
    if tag == "int":
        return int(body, 16)
    if tag == "float":
        return float(body)
    if tag == "bytes":
        return bytes.fromhex(body)
    if not isinstance(body, list):
        raise ValueError(f"'{tag}' holds {type(body).__name__}, expected a list")
    if tag == "complex":
        return complex(*[decode(part) for part in body])
    if tag == "dict":
        return {decode(key): decode(item) for key, item in body}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](decode(item) for item in body)
