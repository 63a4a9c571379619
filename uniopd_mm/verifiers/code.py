"""Verifier of programs: the code in a response passes every test of its problem, or it does not.

The program runs in the sandbox, which is told inputs one at a time and never an expected result; results are compared
here.  A program's own fault (wrong result, timeout, crash, memory) is incorrect; a sandbox that fails is unknown.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from uniopd_mm.errors import DataError
from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.sandbox import Failure, Limits, Program, Run, Sandbox, SandboxError, Success
from uniopd_mm.sandbox.values import encode
from uniopd_mm.verifiers.base import (
    MAX_ANSWER_CHARS,
    NO_ANSWER,
    NO_GOLD,
    Verifier,
    VerifierError,
    gold_answers,
)
from uniopd_mm.verifiers.code_asserts import Check, parse_checks
from uniopd_mm.verifiers.code_compare import passes, show
from uniopd_mm.verifiers.code_extract import extract_code
from uniopd_mm.verifiers.code_tests import IMPORTS, CodeTest, CodeTests

if TYPE_CHECKING:
    from uniopd_mm.config import VerifierConfig

__all__ = ["IMPORTS", "CodeTest", "CodeTests", "CodeVerifier", "extract_code"]

_UNPROVEN = "all checks passed, but some can only be decided beside the program, which could forge them"


class CodeVerifier(Verifier):
    """``Prompt.answer`` is a :class:`CodeTests` as JSON.  VerifierError where the sandbox offers too little isolation."""

    profiles = ("strict", "evalplus", "livecodebench", "prime")

    def __init__(self, config: VerifierConfig, profile: str | None = None) -> None:
        super().__init__(config, profile)
        settings = config.sandbox
        limits = Limits(settings.time_limit_s, settings.total_limit_s, settings.memory_mb)
        try:
            self.sandbox = Sandbox(limits, settings.allow_unsafe)
        except SandboxError as error:
            raise VerifierError(str(error)) from None
        self._slots = threading.BoundedSemaphore(config.workers)

    def extract(self, prompt: Prompt, text: str) -> str | None:
        return extract_code(text, self.profile)

    def verify(self, prompt: Prompt, text: str) -> Outcome:
        try:
            tests = _tests_of(prompt)
        except DataError as error:
            return Outcome(None, reason=str(error))
        code = self.extract(prompt, text)
        if code is None:
            return Outcome(False, score=0.0, reason=NO_ANSWER)
        correct, reason = self.judge(tests, code)
        score = None if correct is None else float(correct)
        return Outcome(correct, score=score, extracted=code[:MAX_ANSWER_CHARS], reason=reason)

    def verify_many(self, items: Sequence[tuple[Prompt, str]]) -> list[Outcome]:
        if self.config.workers == 1 or len(items) < 2:
            return super().verify_many(items)
        with ThreadPoolExecutor(self.config.workers, thread_name_prefix="code") as pool:
            return list(pool.map(lambda item: self.verify(*item), items))

    def check_golds(self, prompts: Sequence[Prompt]) -> list[str | None]:
        return [_gold_problem(prompt) for prompt in prompts]

    def judge(self, tests: CodeTests, code: str) -> tuple[bool | None, str]:
        """(correct, reason) of a program; None = unknown."""
        program = Program(code, tests.style, tests.entry_point, tests.setup)
        with self._slots, self.sandbox.start(program, tests.total_limit_s) as run:
            verdicts = _asserts(tests, run) if tests.style == "assert" else _values(tests, run)
            unproven = False
            for i, (correct, reason) in enumerate(verdicts):
                if reason == _UNPROVEN:
                    unproven = True
                elif not correct:
                    return correct, f"test {i + 1} of {len(tests.tests)}: {reason}"
        if unproven and self.profile == "strict":
            return None, _UNPROVEN
        return True, f"passed {len(tests.tests)} tests"


def _values(tests: CodeTests, run: Run) -> Iterator[tuple[bool | None, str]]:
    """Verdicts of styles stdin and call."""
    for test in tests.tests:
        result = run.test(test.input, tests.time_limit_s, _room(tests, test, run.limits))
        if isinstance(result, Failure):
            yield _failed(result)
        else:
            ok = passes(tests, test, result.value)
            yield ok, "" if ok else f"expected {show(test.output)}, found {show(result.value)}"


def _asserts(tests: CodeTests, run: Run) -> Iterator[tuple[bool | None, str]]:
    """Verdicts of style assert, one per test."""
    for test in tests.tests:
        verdict: tuple[bool | None, str] = (True, "")
        for check in parse_checks(test.input, tests.entry_point, tests.setup):
            result = run.test([check.statements, check.expression], tests.time_limit_s)
            verdict = _assert_verdict(check, result, verdict)
            if not verdict[0]:
                break
        yield verdict


def _assert_verdict(
    check: Check, result: Success | Failure, before: tuple[bool | None, str]
) -> tuple[bool | None, str]:
    if isinstance(result, Failure):
        return _failed(result)
    if not _holds(check, result.value):
        return False, f"{check.expression[:80]}: expected {check.wanted[:120]}, found {show(result.value)}"
    return (True, _UNPROVEN) if check.holds is None else before


def _holds(check: Check, found: Any) -> bool:
    try:
        return check.holds is None or bool(check.holds(found))
    except (TypeError, ValueError, ArithmeticError, RecursionError):  # not comparable, so not equal
        return False


def _failed(failure: Failure) -> tuple[bool | None, str]:
    return (None if failure.kind == "unknown" else False), str(failure)


def _room(tests: CodeTests, test: CodeTest, limits: Limits) -> int:
    """Bytes a result may take: more than the limit only where the expected one is that long, and not telling how long."""
    stdin = tests.style == "stdin"
    n_expected = (
        len(test.output.encode("utf-8", "replace")) if stdin else len(json.dumps(encode(test.output)))
    )
    least = limits.stdout_bytes if stdin else limits.result_bytes
    return max(least, 1 << (8 * n_expected).bit_length())


_reading = threading.Lock()


def _read_tests(text: str) -> CodeTests:
    """The tests of a problem, held for the samples that follow; many tests take hundreds of megabytes, so no more are."""
    with _reading:  # threads that need the same tests at the same time wait for one to read them
        return _read_once(text)


@lru_cache(maxsize=4)
def _read_once(text: str) -> CodeTests:
    return CodeTests.from_json(text)


def _tests_of(prompt: Prompt) -> CodeTests:
    """The tests of a prompt; DataError says why they cannot be used."""
    golds = gold_answers(prompt)
    if not golds:
        raise DataError(NO_GOLD)
    if len(golds) > 1:
        raise DataError(f"{len(golds)} answers; a programming problem has one, its tests as JSON")
    tests = _read_tests(golds[0])
    if tests.style == "assert":
        for test in tests.tests:
            parse_checks(test.input, tests.entry_point, tests.setup)
    return tests


def _gold_problem(prompt: Prompt) -> str | None:
    try:
        _tests_of(prompt)
    except DataError as error:
        return str(error)
    return None
