"""The format of a problem's tests, how results are compared, and where the program is in a response."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniopd_mm.errors import DataError
from uniopd_mm.sandbox.values import decode, encode
from uniopd_mm.verifiers.code_asserts import parse_checks
from uniopd_mm.verifiers.code_compare import passes, same_value, show
from uniopd_mm.verifiers.code_extract import extract_code
from uniopd_mm.verifiers.code_tests import CodeTest, CodeTests

HASHABLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
VALUES = st.recursive(
    HASHABLE | st.complex_numbers(allow_nan=False) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(HASHABLE, max_size=3)
        | st.dictionaries(HASHABLE, inner, max_size=3)
    ),
    max_leaves=10,
)


@given(VALUES)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert same_value(decode(json.loads(json.dumps(encode(value)))), value)


@given(st.lists(VALUES, max_size=3), VALUES)
def test_tests_come_back_as_they_were(arguments: list[Any], expected: Any) -> None:
    tests = CodeTests("call", (CodeTest(arguments, expected),), "evalplus", "f", "import x", 0.1, 2.0)
    again = CodeTests.from_json(tests.to_json())
    assert same_value(again.tests[0].input, arguments) and same_value(again.tests[0].output, expected)
    assert (again.compare, again.entry_point, again.setup, again.atol) == ("evalplus", "f", "import x", 0.1)


def test_values_of_other_types_are_refused() -> None:
    class Sly(int):
        pass

    for value in (Sly(1), [Sly(1)], {1: Sly(1)}, object(), range(3), int):
        with pytest.raises(TypeError, match="not plain data"):
            encode(value)


def test_a_long_integer_is_carried_and_shown() -> None:
    number = 7**100000
    assert decode(json.loads(json.dumps(encode(number)))) == number
    assert "too long" in show([number])


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("no json", "not JSON"),
        ("[]", "JSON object"),
        ('{"style": "stdin", "tests": [], "tset": 1}', "tset"),
        ('{"style": "pipe", "tests": []}', "stdin | call | assert"),
        ('{"style": "stdin", "tests": []}', "at least one test"),
        ('{"style": "stdin", "tests": [{"input": "1"}]}', "tests[0]"),
        ('{"style": "stdin", "tests": [{"input": 1, "output": "1"}]}', "tests[0].input"),
        ('{"style": "call", "tests": [{"input": [1], "output": 1}]}', "entry_point"),
        ('{"style": "call", "entry_point": "f", "tests": [{"input": 1, "output": 1}]}', "list of arguments"),
        (
            '{"style": "call", "entry_point": "f", "tests": [{"input": [{"set": [[1]]}], "output": 1}]}',
            "read",
        ),
        ('{"style": "assert", "tests": [{"code": "assert 1"}], "atol": -1}', "atol"),
        ('{"style": "assert", "tests": [{"code": "assert 1"}], "time_limit_s": 0}', "time_limit_s"),
        ('{"style": "assert", "tests": [{"code": "assert 1"}], "compare": "x"}', "compare"),
    ],
)
def test_tests_that_cannot_be_used_say_which_field_is_wrong(text: str, field: str) -> None:
    with pytest.raises(DataError) as error:
        CodeTests.from_json(text)
    assert field in str(error.value)


def test_input_output_pairs_of_other_collections_are_read() -> None:
    call = CodeTests.from_input_output({"inputs": ["[1]\n2"], "outputs": ["[1, 2]"], "fn_name": "f"})
    assert call.tests == (CodeTest([[1], 2], [1, 2]),) and call.entry_point == "f"
    script = CodeTests.from_input_output({"inputs": [[100, 5]], "outputs": [[95]]})
    assert script.style == "stdin" and script.tests == (CodeTest("100\n5", "95"),)
    with pytest.raises(DataError, match="same length"):
        CodeTests.from_input_output({"inputs": ["1"], "outputs": []})


def compared(
    compare: str, found: Any, expected: Any, name: str = "f", atol: float = 0.0, given: Any = None
) -> bool:
    style = "stdin" if isinstance(found, str) and given is None and name == "" else "call"
    test = CodeTest(given or [], expected) if style == "call" else CodeTest("", expected)
    return passes(CodeTests(style, (test,), compare, name or None, atol=atol), test, found)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        (7.0, 7, True),
        (True, 1, True),
        (0.1 + 0.2, 0.3, True),
        (0.3333, 1 / 3, False),
        ([0.1 + 0.2], [0.3], True),
        ((0.1 + 0.2,), [0.3], False),
        ([0.30000001, 1.0], [0.3, 1.0], True),
        ([0.3], [0.3, 0.3], False),
        (float("nan"), float("nan"), False),
        (float("inf"), float("inf"), True),
        (1e999, 1.0, False),
        ((1, 2), [1, 2], False),
        (1000001, 1000000, False),
        (None, 0.5, False),
        ("0.5", 0.5, False),
    ],
)
def test_evalplus_compares_floats_with_tolerance_and_the_rest_exactly(
    found: Any, expected: Any, equal: bool
) -> None:
    assert compared("evalplus", found, expected) is equal


def test_evalplus_special_functions() -> None:
    assert compared("evalplus", [2, 1, 1], [1, 2], "similar_elements")
    assert not compared("evalplus", [2, 3], [1, 2], "similar_elements")
    assert not compared("evalplus", 5, [1, 2], "similar_elements")
    assert compared("evalplus", "a match", True, "check_str")
    assert not compared("evalplus", None, True, "check_str")
    assert compared("evalplus", "anything", False, "are_equivalent")
    assert compared("evalplus", 0, 12, "sum_div")
    for found, equal in ((10, True), (8, True), (9, False), (8.5, False), ("8", False)):
        assert compared("evalplus", found, 10, "digit_distance_nums", 0.0, [23, 9]) is equal
    for found, equal in ((33, True), (40, True), (39, False), (None, False)):
        assert compared("evalplus", found, 33, "surface_Area", 0.0, [3, 5]) is equal
    assert not compared("evalplus", 40, 33, "another_area", 0.0, [3, 5])
    assert compared("evalplus", -0.5, None, "find_zero", 1e-4, [[1, 2]])
    assert not compared("evalplus", 0.5, -0.5, "find_zero", 1e-4, [[1, 2]])
    for found in (float("nan"), "x", None, 10**400, [1]):
        assert not compared("evalplus", found, -0.5, "find_zero", 1e-4, [[1, 2]])


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        ("6\n", "6", True),
        ("  6  \n\n", "6", True),
        ("6.0", "6", True),
        ("1 2.50", "1.0 2.5", True),
        ("50000000000000001", "50000000000000000", False),
        ("0.3333333334", "0.3333333333", False),
        ("a  b", "a b", False),
        ("1\n\n2", "1\n2", False),
        ("nan", "nan", True),
        ("sNaN", "1", False),
        ("1e999999999999", "1", False),
        ("YES", "yes", False),
        ("", "0", False),
    ],
)
def test_livecodebench_compares_lines_then_decimals(found: str, expected: str, equal: bool) -> None:
    assert compared("livecodebench", found, expected, "") is equal


def test_livecodebench_reads_a_tuple_as_a_list() -> None:
    assert compared("livecodebench", (1, 2), [1, 2])
    assert compared("livecodebench", True, 1)
    assert not compared("livecodebench", [1, 2], [2, 1])


def test_exact_means_the_same_types() -> None:
    assert not compared("exact", 1.0, 1) and not compared("exact", [True], [1])
    assert not compared("exact", {1: 1.0}, {1: 1}) and compared("exact", {1: (2,)}, {1: (2,)})
    assert compared("exact", "a \nb\n\n", "a\nb", "") and not compared("exact", " a", "a", "")


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        ("0.3333333334", "0.3333333333", True),
        ("6.0", "6", True),
        (" 1 2 \n\n3\n", "1 2\n3", True),
        ("nan", "nan", True),
        ("-inf", "-Infinity", True),
        ("100001", "100000", False),
        ("007", "7", False),
        ("1.0 2", "1 2", False),
        ("0.3334", "0.3333", False),
        ("0.5\n1", "0.5", False),
        ("0.5", "", False),
        ("nan", "NaN", False),
    ],
)
def test_prime_compares_lines_then_one_decimal_per_line(found: str, expected: str, equal: bool) -> None:
    assert compared("prime", found, expected, "") is equal


def test_prime_takes_a_wrapped_result() -> None:
    assert compared("prime", 3, [3]) and compared("prime", [(1, 2)], [[1, 2]])
    assert not compared("prime", 3, [3, 4])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 2"),
        ("```python\nx = 1\n```\n```\n5\n```", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```\nso\n```python\nx = 2", "x = 1"),
        ("```python\nx = 1\nagain\n```python\nx = 2\n```", "x = 2"),
        ("x = 1", None),
        ("```python\n\n```", None),
        ("", None),
        ("<think>\n```python\nx = 1\n```\n", None),
        ("<think>\n```python\nx = 1\n```\n</think>\n```python\nx = 2\n```", "x = 2"),
        ("```python\nx = 1\n```\n</think>\nno", None),
        ("```python\ns = '１'\n```", "s = '１'"),
    ],
)
def test_strict_takes_the_last_closed_python_block_of_the_answer(text: str, code: str | None) -> None:
    assert extract_code(text) == code


def test_other_profiles_take_what_their_judges_take() -> None:
    two = "```python\nx = 1\ny = 2\n```\n```\nz\n```"
    assert extract_code(two, "evalplus") == "x = 1\ny = 2" and extract_code("x = 1", "evalplus") == "x = 1"
    assert extract_code(two, "livecodebench") == "z" and extract_code("```python\nx", "livecodebench") is None
    assert extract_code(two, "prime") == "\nx = 1\ny = 2\n" and extract_code("x = 1", "prime") == "x = 1"


@given(st.text(alphabet="`a\n<>/think python"))
def test_extraction_never_fails(text: str) -> None:
    for profile in ("strict", "evalplus", "livecodebench", "prime"):
        code = extract_code(text, profile)
        assert code is None or code.strip()


@pytest.mark.parametrize(
    "code",
    ["assert eq(f(1), 5)", "assert (f(1) == 5) == True", "assert max(f(1), 5) == 5", "assert f(1) == g(1)",
     "assert g(f(1)) == 5", "assert [f(1), 5][1] == 5", "x = f(1) == 5\nassert x", "assert f(1) == 5 or True",
     "def g(x): return x\nassert g(5) == 5", "x = 1"],
)  # fmt: skip
def test_a_check_is_trusted_only_if_the_program_alone_can_answer_it(code: str) -> None:
    assert any(check.holds is None for check in parse_checks(code, "f"))


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.lists(st.integers()))
def test_the_expected_value_is_not_in_what_the_program_is_asked(value: Any) -> None:
    (check,) = parse_checks(f"assert f(0) == {value!r}", "f")
    assert check.expression == "f(0)" and not check.statements
    assert check.holds is not None and check.holds(value)


def test_the_form_of_apps_and_prime_is_read_as_an_answer() -> None:
    answer = json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})
    assert CodeTests.from_json(answer) == CodeTests.from_input_output(json.loads(answer))
    with pytest.raises(DataError, match="two lists of the same length"):
        CodeTests.from_json(json.dumps({"inputs": ["1"], "outputs": []}))
