"""LiveCodeBench, code generation (lite): contest problems, as programs (stdin) or as methods of a class (LeetCode).

The hub repository is a loading script over ``test.jsonl`` ... ``test6.jsonl``, so the files are read as they are.
``--split release_vN`` is everything up to file N (400, 511, 612, 713, 880, 1055 problems), ``vN`` only what file N added.
The default is ``v6``, the 175 problems of January to April 2025: what G-OPD's script asks for, under a name that its
loader takes to be one file.

Private tests are a pickle inside zlib inside base64.  They are read without running any of it.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uniopd_mm.config import SamplingConfig
from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Scores, Source
from uniopd_mm.rollout import Prompt

from ._code import pass_at_1
from ._text import text_of, turns

NAME = "livecodebench"
FILES = ("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl", "test5.jsonl", "test6.jsonl")
SPLITS = {f"release_v{n}": FILES[:n] for n in range(1, 7)} | {f"v{n}": FILES[n - 1 : n] for n in range(1, 7)}
MAX_TEST_BYTES = 2**30
"""Unpacked private tests of one problem; more is a bomb, not a test."""
TIME_LIMIT_S = 60.0
"""Per test, G-OPD's; LiveCodeBench's own default of 6 s measures the machine as well."""

DAMAGED = (
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

PROMPT = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests. You will NOT return anything except for the program.\n\n"
    "Question:\n{question}\n\n{starter}"
    "Write Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.\n"
    "You need to think first then write the Python code."
)
STARTER = "You will use the following starter code to write the solution to the problem:\n```python\n{code}\n```\n\n"
"""LiveCodeBench's own words: without the class and method names no answer to such a problem could be called."""

PRESETS = {
    "paper": Preset(
        sampling=SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=16384), n=4, prompt=PROMPT
    ),
    "quick": Preset(
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=4096), n=1, prompt=PROMPT, limit=20
    ),
}


@dataclass(frozen=True)
class Release(Source):
    """A source whose files follow from its split, also where the split is replaced."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"LiveCodeBench has no split '{self.split}'. Known: {', '.join(SPLITS)}")
        object.__setattr__(self, "files", SPLITS[self.split])


class PlainUnpickler(pickle.Unpickler):
    """Reads what is made of built-in values only; a pickle that names any class or function is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to load {module_name}.{global_name}")


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    from uniopd_mm.verifiers.code import CodeTests

    name = f"{NAME}/{text_of(NAME, row, 'question_id')}"
    starter = str(row["starter_code"] or "").strip()
    tests = unpack(row["public_test_cases"], name) + unpack(row["private_test_cases"], name)
    if not tests:
        raise DataError(f"{name} has no tests")
    packed = CodeTests.from_input_output(  # with the imports that LiveCodeBench puts before each answer
        {
            "inputs": [test["input"] for test in tests],
            "outputs": [test["output"] for test in tests],
            "fn_name": _metadata(row, name).get("func_name"),
        },
        time_limit_s=TIME_LIMIT_S,
        total_limit_s=(TIME_LIMIT_S + 1) * len(tests) + 5,  # as its own judge
    )
    question = text_of(NAME, row, "question_content").strip()
    return Prompt(
        id=name,
        messages=turns(preset, question=question, starter=STARTER.format(code=starter) if starter else ""),
        answer=packed.to_json(),
        domain="code",
        verifier="code" if profile == "strict" else "code:livecodebench",
        source=NAME,
    )


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


def _unpickled(text: str, name: str) -> Any:
    try:
        data = _inflated(base64.b64decode(text, validate=True))
        value = PlainUnpickler(io.BytesIO(data)).load()
        return json.loads(value) if isinstance(value, (str, bytes)) else value
    except DAMAGED as error:
        raise DataError(
            f"{name}: private tests cannot be read ({type(error).__name__}: {error}); expected a pickled JSON text"
        ) from error


def _inflated(packed: bytes) -> bytes:
    inflate = zlib.decompressobj()
    data = inflate.decompress(packed, MAX_TEST_BYTES)
    if inflate.unconsumed_tail:
        raise ValueError(f"they unpack to more than {MAX_TEST_BYTES} bytes")
    return data


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
    n_rows=175,
    metric="pass@1",
    aggregate=aggregate,
)
