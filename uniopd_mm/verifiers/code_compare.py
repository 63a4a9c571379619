"""Whether a program's result is the expected one, decided in our process on plain data.

exact: same types, same values; texts without trailing blanks.  evalplus and livecodebench: as those benchmarks decide,
special cases included.  prime: equal lines, or one decimal per line within a tolerance; a result may be wrapped in a list.
"""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
from typing import Any

from uniopd_mm.verifiers.code_tests import CodeTest, CodeTests

SET_TASKS = frozenset(
    {
        "similar_elements",
        "find_char_long",
        "common_in_nested_lists",
        "extract_singly",
        "larg_nnum",
        "intersection_array",
        "find_dissimilar",
        "Diff",
    }
)
"""MBPP+ functions whose result is compared as a set."""
NOT_NONE_TASKS = frozenset({"check_str", "text_match_three", "text_starta_endb"})
"""MBPP+ functions for which only "found" or "not found" counts."""
_RTOL = 1e-7
_FLOAT_ATOL = 1e-6
_ROOT_ATOL = 1e-4


def passes(tests: CodeTests, test: CodeTest, found: Any) -> bool:
    """Whether ``found`` passes ``test``; never raises on what a program chose to return."""
    try:
        if tests.style == "stdin":
            return _TEXT[tests.compare](found, test.output)
        if tests.compare == "evalplus":
            return _evalplus(tests, test, found)
        return _VALUE[tests.compare](found, test.output)
    except (
        TypeError,
        ValueError,
        ArithmeticError,
        RecursionError,
    ):  # values that cannot be compared are not equal
        return False


# -- texts --------------------------------------------------------------------------------------------------------------
def _exact_text(found: str, expected: str) -> bool:
    return [line.rstrip() for line in found.rstrip().split("\n")] == [
        line.rstrip() for line in expected.rstrip().split("\n")
    ]


def _stripped_lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_decimals(found: str, expected: str) -> bool:
    try:
        return [Decimal(word) for word in found.split()] == [Decimal(word) for word in expected.split()]
    except InvalidOperation:
        return False


def _livecodebench_text(found: str, expected: str) -> bool:
    ours, theirs = _stripped_lines(found), _stripped_lines(expected)
    return len(ours) == len(theirs) and all(
        a == b or _same_decimals(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def _prime_text(found: str, expected: str) -> bool:
    """Lines without the empty ones; if not all are whole numbers, one number per line may differ a little."""
    ours, theirs = ([line for line in _stripped_lines(text) if line] for text in (found, expected))
    if ours == theirs:
        return True
    if len(ours) != len(theirs) or all(line.isdigit() for line in (*ours, *theirs)):
        return False
    return all(_close(float(a), float(b), 1e-5, 1e-8) for a, b in zip(ours, theirs, strict=True))


# -- values -------------------------------------------------------------------------------------------------------------
def same_value(found: Any, expected: Any) -> bool:
    """Equal in value and type, all the way down; nan equals nan."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same_value, found, expected))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same_value(found[key], expected[key]) for key in expected
        )
    return found == expected or (isinstance(expected, float) and found != found and expected != expected)


def _livecodebench_value(found: Any, expected: Any) -> bool:
    return (list(found) if isinstance(found, tuple) else found) == expected


def _prime_value(found: Any, expected: Any) -> bool:
    found = _lists(found)
    return found == expected or (isinstance(expected, list) and len(expected) == 1 and found == expected[0])


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _evalplus(tests: CodeTests, test: CodeTest, found: Any) -> bool:
    name, expected, atol = tests.entry_point, test.output, tests.atol
    if name == "find_zero":
        return _residual(test.input[0], found) <= (atol or _ROOT_ATOL)
    equal = found == expected
    if name == "are_equivalent":
        equal = True
    elif name == "sum_div":
        equal = equal or found == 0
    elif name == "surface_Area":
        equal = equal or abs(found - _pyramid_surface(*test.input)) <= atol
    elif name == "digit_distance_nums":
        equal = equal or found == _digit_distance(*test.input)
    elif name in SET_TASKS:
        equal = set(found) == set(expected)
    elif name in NOT_NONE_TASKS:
        equal = equal if isinstance(found, bool) else expected == (found is not None)
    if equal:
        return True
    if atol == 0 and _is_floats(expected):
        atol = _FLOAT_ATOL
    return atol != 0 and type(found) is type(expected) and all_close(found, expected, _RTOL, atol)


def _residual(coefficients: list[float], x: Any) -> float:
    """|polynomial| at x; HumanEval/32 has several right answers."""
    return abs(sum(c * math.pow(x, i) for i, c in enumerate(coefficients)))


def _pyramid_surface(base_edge: float, height: float) -> int:
    """MBPP/581, where the height given is that of the pyramid and not of its sides."""
    side = math.sqrt((base_edge / 2) ** 2 + height**2)
    return round(base_edge**2 + 2 * base_edge * side)


def _digit_distance(first: int, second: int) -> int:
    """MBPP/558, where the shorter number is filled with zeros."""
    digits = [str(number) for number in (first, second)]
    width = max(map(len, digits))
    return sum(abs(int(a) - int(b)) for a, b in zip(*(text.zfill(width) for text in digits), strict=True))


def _is_floats(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def all_close(found: Any, expected: Any, rtol: float, atol: float) -> bool:
    """Numbers, or nested sequences of them, within ``atol + rtol * |expected|``."""
    if isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            return False
        return all(all_close(a, b, rtol, atol) for a, b in zip(found, expected, strict=True))
    numbers = int | float | complex
    return (
        isinstance(found, numbers) and isinstance(expected, numbers) and _close(found, expected, rtol, atol)
    )


def _close(found: complex, expected: complex, rtol: float, atol: float) -> bool:
    if found == expected:
        return True
    difference = abs(found - expected)
    return math.isfinite(difference) and difference <= atol + rtol * abs(expected)


_TEXT = {
    "exact": _exact_text,
    "evalplus": _exact_text,
    "livecodebench": _livecodebench_text,
    "prime": _prime_text,
}
_VALUE = {"exact": same_value, "livecodebench": _livecodebench_value, "prime": _prime_value}


def show(value: Any, limit: int = 120) -> str:
    """A value for a message, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer too long to be written in decimal
        text = f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."
