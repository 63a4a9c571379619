"""LiveCodeBench, code generation (lite): contest problems, as programs (stdin) or as methods of a class (LeetCode).

The hub repository is a loading script over ``test.jsonl`` ... ``test6.jsonl``, so the files are read as they are.
``--split release_vN`` is everything up to file N, ``vN`` only what file N added.
The default is ``v6``, the 175 problems of January to April 2025: what G-OPD's script asks for, under a name that its
loader takes to be one file.

All tests together take many gigabytes: they stay in the files, and those of one problem are unpacked when it is scored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uniopd_mm.config import SamplingConfig
from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Scores, Source
from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers.packed_tests import COLUMNS

from ._code import pass_at_1
from ._text import NO_THINKING, text_of, turns

NAME = "livecodebench"
FILES = ("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl", "test5.jsonl", "test6.jsonl")
SPLITS = {f"release_v{n}": FILES[:n] for n in range(1, 7)} | {f"v{n}": FILES[n - 1 : n] for n in range(1, 7)}
ADDED = (400, 111, 101, 101, 167, 175)
"""Problems in each file."""
N_ROWS = {
    name: sum(n for file, n in zip(FILES, ADDED, strict=True) if file in SPLITS[name]) for name in SPLITS
}
TIME_LIMIT_S = 60.0
"""Per test, G-OPD's; LiveCodeBench's own default of 6 s measures the machine as well."""

# G-OPD asks in these words and, unlike LiveCodeBench, does not show the starter code of problems from LeetCode: what the class
# and its method are called is not said, and such a problem can hardly be solved.  Preset "own" shows it.
PROMPT = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests. You will NOT return anything except for the program.\n\n"
    "Question:\n{question}\n\n\n\n"
    "Write Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.\n"
    "You need to think first then write the Python code."
)
SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a correct "
    "Python program that matches the specification and passes all tests."
)
OWN_PROMPT = (
    "### Question:\n{question}\n\n### Format: {format}\n```python\n{starter}\n```\n\n"
    "### Answer: (use the provided format with backticks)\n\n"
)
METHOD_FORMAT = "You will use the following starter code to write the solution to the problem and enclose your code within delimiters."
PROGRAM_FORMAT = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the inputs, "
    "runs the algorithm and writes output to STDOUT."
)

PRESETS = {
    "paper": Preset(
        sampling=SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=16384),
        n=4,
        prompt=PROMPT,
        template=NO_THINKING,
    ),
    "quick": Preset(
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=4096),
        n=1,
        prompt=PROMPT,
        template=NO_THINKING,
        limit=20,
    ),
    "own": Preset(
        sampling=SamplingConfig(temperature=0.2, top_p=0.95, max_new_tokens=2000),
        n=10,
        prompt=OWN_PROMPT,
        system=SYSTEM,
    ),
}


@dataclass(frozen=True)
class Release(Source):
    """A source whose files follow from its split, also where the split is replaced; the tests stay in them."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"LiveCodeBench has no split '{self.split}'. Known: {', '.join(SPLITS)}")
        object.__setattr__(self, "files", SPLITS[self.split])
        object.__setattr__(self, "late", COLUMNS)
        object.__setattr__(self, "n_rows", N_ROWS[self.split])


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    number = text_of(NAME, row, "question_id")
    name = f"{NAME}/{number}"
    starter = str(row["starter_code"] or "").strip()
    packed = {column: row[column] for column in COLUMNS}
    if isinstance(packed[COLUMNS[-1]], Mapping):  # where the row is in its file
        packed = {**packed[COLUMNS[-1]], "question_id": row["question_id"]}
    tests = {
        "packed": packed,
        "fn_name": _metadata(row, name).get("func_name"),
        "time_limit_s": TIME_LIMIT_S,
    }
    return Prompt(
        id=name,
        messages=turns(
            preset,
            question=text_of(NAME, row, "question_content").strip(),
            format=METHOD_FORMAT if starter else PROGRAM_FORMAT,
            starter=starter or "# YOUR CODE HERE",
        ),
        answer=json.dumps(tests),
        domain="code",
        verifier="code" if profile == "strict" else "code:livecodebench",
        source=NAME,
    )


def _metadata(row: Row, name: str) -> dict[str, Any]:
    try:
        found = json.loads(row["metadata"] or "{}")
    except (ValueError, TypeError) as error:
        raise DataError(f"{name}: metadata is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def aggregate(rows: Sequence[Row], scores: Sequence[Scores]) -> dict[str, float]:
    """Pass@1 of all problems, and of each difficulty."""
    result = pass_at_1(rows, scores)
    for level in ("easy", "medium", "hard"):
        some = [i for i, row in enumerate(rows) if row["difficulty"] == level]
        if some:
            part = pass_at_1([rows[i] for i in some], [scores[i] for i in some])
            result |= {level: part["score"]} if part else {}
    return result


BENCHMARK = Benchmark(
    name=NAME,
    title="LiveCodeBench",
    domain="code",
    sources=(Release("livecodebench/code_generation_lite", split="v6"),),
    columns=(
        "question_title",
        "question_content",
        "platform",
        "question_id",
        "contest_id",
        "contest_date",
        "starter_code",
        "difficulty",
        "public_test_cases",
        "private_test_cases",
        "metadata",
    ),
    presets=PRESETS,
    read=read,
    n_rows=N_ROWS["v6"],
    metric="pass@1",
    aggregate=aggregate,
)
