"""LiveCodeBench's tests, unpacked only when they are needed: those of all problems take more memory than most machines have.

    {"packed": {"file": "/data/test6.jsonl", "offset": 1234, "question_id": "abc301_a"}, "fn_name": null, ...}
    {"packed": {"public_test_cases": "[...]", "private_test_cases": "eJx..."}, ...}

The first says where the row begins in its file, the second holds the row's columns.  Private tests are a JSON text inside a
pickle inside zlib inside base64; they are read without running any of it.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from typing import Any

from uniopd_mm.errors import DataError

COLUMNS = ("public_test_cases", "private_test_cases")
MAX_TEST_BYTES = 2**30
"""Unpacked private tests of one problem; more is a bomb, not a test."""

_DAMAGED = (
    pickle.UnpicklingError,
    zlib.error,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)
"""What reading a pickle that is damaged, or no pickle of plain values, may raise."""


class PlainUnpickler(pickle.Unpickler):
    """Reads what is made of built-in values only; a pickle that names any class or function is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to load {module_name}.{global_name}")


def unpack_tests(packed: Any) -> dict[str, list[str]]:
    """``inputs`` and ``outputs`` of all tests of a problem; DataError where they cannot be read."""
    row = _row(packed) if isinstance(packed, Mapping) and "file" in packed else packed
    if not isinstance(row, Mapping) or not all(column in row for column in COLUMNS):
        raise DataError(f"packed tests need a file and an offset, or the columns {' and '.join(COLUMNS)}")
    tests = [test for column in COLUMNS for test in unpack(row[column], column)]
    if not tests:
        raise DataError("the problem has no tests")
    return {key + "s": [test[key] for test in tests] for key in ("input", "output")}


def unpack(text: Any, name: str) -> list[dict[str, str]]:
    """Tests of a column: JSON text, or JSON text pickled, compressed and base64-encoded.  DataError for anything else."""
    if not isinstance(text, str):
        raise DataError(f"{name}: tests are {type(text).__name__}, expected text")
    if not text.strip():
        return []
    try:
        tests = json.loads(text)
    except (ValueError, RecursionError):
        tests = _unpickled(text, name)
    fine = isinstance(tests, list) and all(
        isinstance(test, dict) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str)
        for test in tests
    )
    if not fine:
        raise DataError(f"{name}: tests are not a list of objects with the texts input and output")
    return tests


def _row(place: Mapping[str, Any]) -> Any:
    """The row that begins at ``offset`` of ``file``."""
    where = f"{place['file']} at byte {place.get('offset')}"
    try:
        with open(str(place["file"]), "rb") as file:
            file.seek(place["offset"])
            row = json.loads(file.readline())
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{where}: the tests cannot be read ({error})") from error
    found = row.get("question_id") if isinstance(row, dict) else row
    if found != place.get("question_id"):
        raise DataError(
            f"{where}: problem {found!r}, expected {place.get('question_id')!r}. The file was changed: start again"
        )
    return row


def _unpickled(text: str, name: str) -> Any:
    try:
        value = PlainUnpickler(io.BytesIO(_inflated(base64.b64decode(text, validate=True)))).load()
        return json.loads(value) if isinstance(value, str | bytes) else value
    except _DAMAGED as error:
        raise DataError(
            f"{name}: private tests cannot be read ({type(error).__name__}: {error}); expected a pickled JSON text"
        ) from error


def _inflated(packed: bytes) -> bytes:
    inflate = zlib.decompressobj()
    data = inflate.decompress(packed, MAX_TEST_BYTES)
    if inflate.unconsumed_tail:
        raise ValueError(f"they unpack to more than {MAX_TEST_BYTES} bytes")
    return data
