"""MBPP+ (378 functions from a sentence and one assert, many more tests than MBPP).

Rows are those of the hub (``test`` is a program with inputs and results) or of evalplus' own MbppPlus.jsonl
(``base_input``, ``plus_input``, ``atol``; expected outputs are what the reference solution returns).
"""

from __future__ import annotations

from typing import Any

from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Source
from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers.code_compare import NOT_NONE_TASKS

from ._code import PRESETS, Cases, cases_of, evalplus_tests, native_cases, pass_at_1
from ._text import text_of, turns

NAME = "mbpp_plus"

# evalplus' JSONL has lists where these problems take tuples (and text where they take complex numbers): what
# ``evalplus.data.mbpp.mbpp_deserialize_inputs`` turns back.  By task: how deep the tuples are, in which arguments.
EACH = {
    2,
    116,
    132,
    143,
    222,
    261,
    273,
    394,
    399,
    421,
    424,
    429,
    470,
    560,
    579,
    596,
    616,
    630,
    726,
    740,
    744,
    809,
}
INNER = {63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780}
INNER_OF_FIRST = {75, 413, 444, 753}
SECOND = {106, 750}
FIRST = {250, 307, 405, 446, 617, 720, 763, 808}
EACH_AND_INNER = {259, 278, 401, 445}
ALL = {580, 615, 791}


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    task = text_of(NAME, row, "task_id").removeprefix("Mbpp/")
    name = f"{NAME}/{task}"
    if "test" in row:
        cases = cases_of(text_of(name, row, "test"), name)
        entry_point, solution = cases.function or "", text_of(name, row, "code")
        question = f'"""\n{text_of(name, row, "prompt")}\n{_first_assert(row, name)}\n"""'
    else:
        cases = _with_tuples(native_cases(row, name), int(task))
        entry_point, solution = text_of(name, row, "entry_point"), text_of(name, row, "canonical_solution")
        question = text_of(name, row, "prompt").strip()
        if entry_point in NOT_NONE_TASKS:
            solution += (
                f"\n_found = {entry_point}\ndef {entry_point}(*given): return _found(*given) is not None\n"
            )
    return Prompt(
        id=name,
        messages=turns(preset, question=question),
        answer=evalplus_tests(name, cases, entry_point, reference=solution).to_json(),
        domain="code",
        verifier="code" if profile == "strict" else "code:evalplus",
        source=NAME,
    )


def _first_assert(row: Row, name: str) -> str:
    """The one test that evalplus shows: it says what the function is called."""
    shown = row.get("test_list")
    if not isinstance(shown, list) or not shown:
        raise DataError(f"{name}: test_list is {shown!r}, expected a list of asserts")
    return str(shown[0]).strip()


def _with_tuples(cases: Cases, task: int) -> Cases:
    return Cases([_arguments(inputs, task) for inputs in cases.inputs], cases.outputs, cases.atol)


def _arguments(inputs: list[Any], task: int) -> list[Any]:
    """One argument list as the problem takes it."""
    first, *rest = inputs or [None]
    if task in EACH:
        return [tuple(argument) for argument in inputs]
    if task in INNER:
        return [_inner(argument) for argument in inputs]
    if task in EACH_AND_INNER:
        return [tuple(_inner(argument)) for argument in inputs]
    if task in INNER_OF_FIRST:
        return [_inner(first), *rest]
    if task in FIRST:
        return [tuple(first), *rest]
    if task in SECOND:
        return [first, *map(tuple, rest)]
    if task in ALL:
        return [_all(argument) for argument in inputs]
    if task == 115:
        return [[set(item) if isinstance(item, list) and item else {} for item in first]]
    if task == 124:
        return [float(first), *map(complex, rest)]
    if task == 252:
        return [complex(first)]
    if task == 722:
        return [{key: tuple(value) for key, value in first.items()}, *rest]
    return inputs


def _inner(value: list[Any]) -> list[Any]:
    return [tuple(item) if isinstance(item, list) else item for item in value]


def _all(value: Any) -> Any:
    return tuple(map(_all, value)) if isinstance(value, list) else value


BENCHMARK = Benchmark(
    name=NAME,
    title="MBPP+",
    domain="code",
    sources=(
        Source("evalplus/mbppplus", files=("data/test-*.parquet",)),
        Source("evalplus/mbppplus", files=("MbppPlus*.jsonl",)),
    ),
    columns=("task_id", "prompt"),
    presets=PRESETS,
    read=read,
    n_rows=378,
    metric="pass@1",
    aggregate=pass_at_1,
)
