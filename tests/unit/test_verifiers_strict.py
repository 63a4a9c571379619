"""Strict profiles of the image benchmarks, numbers with units, and the recipe without its false positives."""

from __future__ import annotations

import time

import pytest

from uniopd_mm.config import VerifierConfig
from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers import VerifierPool, dynamath, numeric

OPTIONS = "Which?\nChoices: A. heart\nB. lung\nC. kidney"


def ask(answer, question="q", **fields) -> Prompt:
    return Prompt("row", ({"role": "user", "content": question},), answer=answer, **fields)


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(VerifierConfig(timeout_s=20.0)) as pool:
        yield pool


@pytest.mark.parametrize(
    ("verifier", "question", "gold", "text", "correct"),
    [
        ("mathvision", OPTIONS, "C", "Answer: (C)", True), ("mathvision", OPTIONS, "C", "\\boxed{kidney}", True),
        ("mathvision", OPTIONS, "C", "（C）", True), ("mathvision", OPTIONS, "C", "\\boxed{A}", False),
        ("mathvision", "q", "12", "\\boxed{12\\text{ cm}}", True), ("mathvision", "q", "12", "\\boxed{12.004}", False),
        ("mathvision", "q", "\\sqrt{8}", "\\boxed{2\\sqrt2}", True), ("mathvision:upstream", "q", "12", "\\boxed{12.004}", True),
        ("mathvision:upstream", OPTIONS, "C", "\\boxed{kidney}", True),
        ("mathvision:upstream_073", "q", "6.28", "\\boxed{2\\pi}", False),
        ("dynamath", "q", "3.142", '{"solution": "s", "short answer": "3.1425"}', True),
        ("dynamath", "q", "3.142", "The answer is \\pi.", True), ("dynamath", "q", "3.142", "Answer: 3.144", False),
        ("dynamath", "q", "1200", "\\boxed{1,200}", True), ("dynamath", "q", "0.500", "\\boxed{\\frac{1}{2}}", True),
        ("dynamath", "q", "even function", '{"short answer": ""}', False), ("dynamath", "q", "even function", "even", False),
        ("dynamath", "q", "even function", "Answer: Even function.", True),
        ("dynamath", "q", "C", '{"short answer": "(C)"}', True), ("dynamath", "q", "C", "Answer: B", False),
        ("dynamath:upstream", "q", "even function", '{"short answer": ""}', True),
        ("dynamath:upstream", "q", "1200", '{"short answer": "1,200"}', False),
        ("wemath", OPTIONS, "C", "The answer is C", True), ("wemath", OPTIONS, "C", "Answer: Cat", False),
        ("wemath:upstream", OPTIONS, "C", "The answer is C", False), ("wemath:upstream", OPTIONS, "C", "Answer: Cat", True),
        ("logicvista", "q", "A, B", "Answer: B and A", True), ("logicvista", "q", "A, B", "Answer: A", False),
        ("logicvista", "q", "A", "\\boxed{A, B}", False), ("logicvista:upstream", "q", "B, A", "AB", True),
        ("logicvista:upstream", "q", "A", "no idea", False),
        ("numeric", "q", "12", "The length is given; the answer is 12 cm.", True), ("numeric", "q", "12 cm", "12 mm", False),
        ("math", "q", "\\{1,2\\}", "\\boxed{\\{2,1\\}}", True), ("math", "q", "(1,2)", "\\boxed{(2,1)}", False),
        ("recipe", "q", "10000000001", "<answer>1000000000</answer>", False), ("recipe", "q", "Blue", "<answer>B</answer>", False),
        ("recipe", "q", "B", "<answer>Blue</answer>", False), ("recipe", "q", "C", "<answer>Answer: (C)</answer>", True),
        ("recipe", "q", "Paris", "<answer>paris</answer>", True), ("recipe", "q", "\\frac{1}{2}", "<answer>\\dfrac{1}{2}</answer>", True),
        ("recipe", "q", "7", "<answer>7</answer> wait <answer>8</answer>", False), ("recipe", "q", "42 cm", "answer: 42 mm", False),
    ],
)  # fmt: skip
def test_the_profile_judges_as_it_says(verifier, question, gold, text, correct, pool):
    assert pool.check([(ask(gold, question, verifier=verifier), text)])[0].correct is correct


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("12 cm", "12", True), ("1.2e3", "1200", True), ("12 mm", "12 cm", False), ("5 %", "5", True), ("5 %", "0.05", False),
        ("$1,200", "1200 dollars", True), ("12cm²", "12 cm^2", True), ("12 m", "12 m^2", False), ("90^\\circ", "90", True),
        ("12 kilometers per hour", "12 km/h", True), ("1.2 \\times 10^{3} m", "1200 m", True), ("12 or 13", "12", False),
        ("12 and 5", "12", False), ("5 is wrong", "5", False), ("−5", "-5", True), ("1e999", "5", False), ("1/0", "5", False),
        ("\\frac{1}{2} cm", "0.5", True), ("twelve", "12", True), ("0.5", "0.52", False), ("", "5", False), ("cm", "5", False),
    ],
)  # fmt: skip
def test_quantities_are_equal_when_number_and_unit_agree(answer, gold, same):
    assert numeric.score(answer, gold) == float(same)


def test_a_numeric_gold_that_is_no_number_is_reported(pool):
    assert "not one number" in (pool.check_gold(ask("12 or 13", verifier="numeric")) or "")


def test_dynamath_tells_the_kind_of_answer_from_the_gold():
    kinds = [dynamath.answer_type(gold) for gold in ("3.142", "-5", "C", "even function", "AB")]
    assert kinds == ["float", "float", "multiple choice", "text", "text"]


HARD = ["\\boxed{", "答案：", "<answer>", "A, ", "{", '"short answer":"']
NAMES = (
    "numeric",
    "dynamath",
    "choice",
    "mathvision:upstream",
    "mathvision:upstream_vlmevalkit",
    "wemath:upstream",
    "exact",
)


@pytest.mark.parametrize("piece", HARD)
def test_a_megabyte_of_anything_is_judged_in_linear_time(piece, pool):
    text = "\\boxed{" + piece * (10**6 // len(piece))
    items = [(ask("12", OPTIONS, verifier=name), text) for name in NAMES]
    start = time.process_time()
    pool.check(items)
    assert time.process_time() - start < 5.0  # about 0.1 s each; quadratic work would take minutes
