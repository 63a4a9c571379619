"""The tests of a programming problem, as they travel in ``Prompt.answer``: one JSON object per problem.

    {"style": "stdin" | "call" | "assert", "compare": "exact" | "evalplus" | "livecodebench" | "prime",
     "entry_point": "solve" | null, "setup": "code put before the program", "atol": 0.0, "time_limit_s": 10.0 | null,
     "total_limit_s": 60.0 | null,
     "tests": [{"input": ..., "output": ...}, ...]}

stdin: ``input`` and ``output`` are texts.  call: ``input`` is the list of arguments, ``output`` the expected value.
assert: ``{"code": "assert f(1) == 2"}``.  What JSON has no word for is tagged (``uniopd_mm.sandbox.values``):
``{"tuple": [1, 2]}``, ``{"set": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"float": "nan"}``, ``{"bytes": "00ff"}``.
A plain JSON object is also read as a dict.  LiveCodeBench's tests may stay packed: ``uniopd_mm.verifiers.packed_tests``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from uniopd_mm.errors import DataError
from uniopd_mm.sandbox.values import decode, encode

Style = Literal["stdin", "call", "assert"]
Compare = Literal["exact", "evalplus", "livecodebench", "prime"]

MODULES = (
    "string",
    "re",
    "datetime",
    "collections",
    "heapq",
    "bisect",
    "copy",
    "math",
    "random",
    "statistics",
    "itertools",
    "functools",
    "operator",
    "io",
    "sys",
    "json",
    "builtins",
    "typing",
)
IMPORTS = "\n".join(
    [f"from {name} import *" for name in MODULES]
    + [f"import {name}" for name in MODULES]
    + ["sys.setrecursionlimit(50000)", ""]
)
"""The ``setup`` of LiveCodeBench and PRIME: their programs may use these modules without importing them."""

_FIELDS = ("style", "compare", "entry_point", "setup", "tests", "atol", "time_limit_s", "total_limit_s")


@dataclass(frozen=True, slots=True)
class CodeTest:
    """One test.  stdin: texts; call: a list of arguments and a value; assert: the statement is ``input``, no ``output``."""

    input: Any
    output: Any = None


@dataclass(frozen=True, slots=True)
class CodeTests:
    """All tests of one problem and how results are compared; a program is correct when it passes every one."""

    style: Style
    tests: tuple[CodeTest, ...]
    compare: Compare = "exact"
    entry_point: str | None = None
    """Function to call (style call); a method of ``class Solution`` is found too."""
    setup: str = ""
    """Code put before the program."""
    atol: float = 0.0
    """Absolute tolerance of numbers (compare evalplus)."""
    time_limit_s: float | None = None
    """Per test; None = the settings' ``verifier.sandbox.time_limit_s``."""
    total_limit_s: float | None = None
    """All tests together; None = the settings' ``verifier.sandbox.total_limit_s``."""

    def __post_init__(self) -> None:
        _expect(self.style in get_args(Style), "style", self.style, " | ".join(get_args(Style)))
        _expect(self.compare in get_args(Compare), "compare", self.compare, " | ".join(get_args(Compare)))
        _expect(len(self.tests) > 0, "tests", [], "at least one test")
        _expect(isinstance(self.setup, str), "setup", self.setup, "a string")
        name = self.entry_point
        if self.style == "call":
            _expect(isinstance(name, str) and name.isidentifier(), "entry_point", name, "a function name")
        _expect(_is_number(self.atol) and self.atol >= 0, "atol", self.atol, "a number >= 0")
        for limit in ("time_limit_s", "total_limit_s"):
            value = getattr(self, limit)
            _expect(value is None or (_is_number(value) and value > 0), limit, value, "seconds > 0 or null")
        for i, test in enumerate(self.tests):
            _check_test(self.style, i, test)

    @classmethod
    def from_json(cls, text: str) -> CodeTests:
        """The tests written in ``text``, in this form, packed, or in that of :meth:`from_input_output`; DataError says which
        field is wrong."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError, TypeError) as error:
            raise DataError(
                f"code tests are not JSON ({error}); expected {{'style': ..., 'tests': [...]}}"
            ) from None
        _expect(isinstance(fields, dict), "answer", fields, "a JSON object")
        if "packed" in fields:
            return cls._from_packed(fields)
        if "inputs" in fields:
            return cls.from_input_output(fields)
        unknown = sorted(set(fields) - set(_FIELDS))
        _expect(not unknown, "fields", unknown, "only " + ", ".join(_FIELDS))
        style, tests = fields.get("style"), fields.get("tests")
        _expect(style in get_args(Style), "style", style, " | ".join(get_args(Style)))
        _expect(isinstance(tests, list), "tests", tests, "a list")
        settings = {k: v for k, v in fields.items() if k not in ("style", "tests")}
        return cls(style=style, tests=tuple(_read_test(style, i, t) for i, t in enumerate(tests)), **settings)

    def to_json(self) -> str:
        """The text ``from_json`` reads; DataError for a value of no known type."""
        key = {
            "assert": lambda t: {"code": t.input},
            "stdin": lambda t: {"input": t.input, "output": t.output},
        }
        write = key.get(self.style, _write_call)
        fields = {name: getattr(self, name) for name in _FIELDS if name != "tests"}
        return json.dumps({**fields, "tests": [write(test) for test in self.tests]})

    @classmethod
    def from_input_output(cls, fields: Mapping[str, Any], **settings: Any) -> CodeTests:
        """Tests in the ``{"inputs": [...], "outputs": [...], "fn_name": ...}`` form of APPS, TACO, PRIME and LiveCodeBench.

        With a function name, an input is a list of arguments or a text with one JSON value per line, an output a value or
        its JSON text.  Without one, texts; a list stands for lines.  As there, ``setup`` is ``IMPORTS`` if not given.
        """
        settings = {"compare": "livecodebench", "setup": IMPORTS, **settings}
        inputs, outputs = fields.get("inputs"), fields.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            found = f"{type(inputs).__name__} and {type(outputs).__name__}"
            raise DataError(
                f"code tests: inputs and outputs are {found}; expected two lists of the same length"
            )
        pairs = list(zip(inputs, outputs, strict=True))
        name = fields.get("fn_name")
        if name is None:
            tests = [CodeTest(_lines(given), _lines(wanted)) for given, wanted in pairs]
            return cls("stdin", tuple(tests), **settings)
        tests = [CodeTest(_arguments(given), _json_value(wanted)) for given, wanted in pairs]
        return cls("call", tuple(tests), entry_point=name, **settings)

    @classmethod
    def _from_packed(cls, fields: Mapping[str, Any]) -> CodeTests:
        """Tests of LiveCodeBench; time for all of them as its own judge gives."""
        from uniopd_mm.verifiers.packed_tests import unpack_tests

        tests, limit_s = unpack_tests(fields["packed"]), fields.get("time_limit_s")
        _expect(limit_s is None or _is_number(limit_s), "time_limit_s", limit_s, "seconds > 0 or null")
        total_s = None if limit_s is None else (limit_s + 1) * len(tests["inputs"]) + 5
        return cls.from_input_output(
            {**tests, "fn_name": fields.get("fn_name")}, time_limit_s=limit_s, total_limit_s=total_s
        )


def _write_call(test: CodeTest) -> dict[str, Any]:
    try:
        return {"input": encode(test.input), "output": encode(test.output)}
    except (TypeError, RecursionError) as error:
        raise DataError(f"code tests: {error}") from None


def _read_test(style: str, i: int, fields: Any) -> CodeTest:
    wanted = {"code"} if style == "assert" else {"input", "output"}
    found = set(fields) if isinstance(fields, dict) else fields
    _expect(found == wanted, f"tests[{i}]", found, f"an object with {', '.join(sorted(wanted))}")
    if style == "assert":
        return CodeTest(fields["code"])
    if style == "stdin":
        return CodeTest(fields["input"], fields["output"])
    try:
        return CodeTest(decode(fields["input"]), decode(fields["output"]))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"code tests: tests[{i}] holds a value that cannot be read: {error}") from None


def _check_test(style: str, i: int, test: CodeTest) -> None:
    if style == "call":
        _expect(isinstance(test.input, list), f"tests[{i}].input", test.input, "a list of arguments")
        return
    field = "code" if style == "assert" else "input"
    _expect(isinstance(test.input, str), f"tests[{i}].{field}", test.input, "a string")
    if style == "stdin":
        _expect(isinstance(test.output, str), f"tests[{i}].output", test.output, "a string")


def _lines(value: Any) -> str:
    return "\n".join(str(v) for v in value) if isinstance(value, list) else str(value)


def _arguments(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [_json_value(line) for line in value.split("\n") if line.strip()]
    return value if isinstance(value, list) else [value]


def _json_value(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"code tests: {value[:80]!r} is not a JSON value ({error})") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _expect(ok: bool, field: str, found: Any, expected: str) -> None:
    if not ok:
        raise DataError(f"code tests: {field} is {str(found)[:200]!r}; expected {expected}")
