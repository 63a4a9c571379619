"""HumanEval+ (164 functions from signature and docstring, many more tests than HumanEval).

Rows are those of the hub (``test`` is a program with inputs and results) or of evalplus' own HumanEvalPlus.jsonl
(``base_input``, ``plus_input``, ``atol``; expected outputs are what the reference solution returns).
"""

from __future__ import annotations

from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Source
from uniopd_mm.rollout import Prompt

from ._code import PRESETS, cases_of, evalplus_tests, header, native_cases, pass_at_1
from ._text import text_of, turns

NAME = "humaneval_plus"


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    name = f"{NAME}/{text_of(NAME, row, 'task_id').removeprefix('HumanEval/')}"
    prompt, entry_point = text_of(name, row, "prompt"), text_of(name, row, "entry_point")
    cases = cases_of(text_of(name, row, "test"), name) if "test" in row else native_cases(row, name)
    tests = evalplus_tests(
        name,
        cases,
        entry_point,
        reference=prompt + text_of(name, row, "canonical_solution"),
        # evalplus grades the answer alone, so one that relies on the prompt's imports and helpers fails there
        setup=header(prompt, entry_point) if profile == "strict" else "",
    )
    return Prompt(
        id=name,
        messages=turns(preset, question=prompt.strip()),
        answer=tests.to_json(),
        domain="code",
        verifier="code" if profile == "strict" else "code:evalplus",
        source=NAME,
    )


BENCHMARK = Benchmark(
    name=NAME,
    title="HumanEval+",
    domain="code",
    sources=(
        Source("evalplus/humanevalplus", files=("data/test-*.parquet",)),
        Source("evalplus/humanevalplus", files=("HumanEvalPlus*.jsonl",)),
    ),
    columns=("task_id", "prompt", "entry_point", "canonical_solution"),
    presets=PRESETS,
    read=read,
    n_rows=164,
    metric="pass@1",
    aggregate=pass_at_1,
)
