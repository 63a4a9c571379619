"""Scores of the benchmarks' own code, case by case, for the image benchmarks and the reward recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniopd_mm.config import VerifierConfig
from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers import dynamath, logicvista, mathvision, recipe, wemath
from uniopd_mm.verifiers.base import get_verifier
from uniopd_mm.verifiers.latex_number import evaluate
from uniopd_mm.verifiers.math_workers import MathWorkers
from uniopd_mm.verifiers.metrics import dynamath_worst_average, wemath_scores

CASES = Path(__file__).parents[1] / "fixtures" / "metric_cases.jsonl"
SCORERS = {
    "mathvision_standard_head": lambda c: mathvision.score(*c, "upstream", c.case["options"]),
    "mathvision_standard_073": lambda c: mathvision.score(*c, "upstream_073", c.case["options"]),
    "mathvision_vlmeval_postcheck": lambda c: mathvision.score(*c, "upstream_vlmevalkit", c.case["options"]),
    "dynamath_item_vlmeval": lambda c: dynamath.score(*c, kind=c.case["answer_type"]),
    "wemath_item_official": lambda c: wemath.score(*c),
    "logicvista_set_match": lambda c: logicvista.score(*c),
    "dynamath_worst_average": lambda c: dynamath_worst_average(c[0]),
    "lmmseval_strip_reasoning": lambda c: recipe.strip_reasoning(c[0]),
}
RECIPES = {"openmmreasoner_uniopd_score": "uniopd", "lmmseval_reasoning_acc": "lmms_eval"}


class Case(tuple):
    """(prediction, reference) of a recorded case."""

    case: dict


def cases(metrics) -> list[Case]:
    found = []
    for line in CASES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["metric"] not in metrics:
            continue
        made = row.get("prediction_gen") or {}
        if row["prediction"] is None and made:
            middle = made.get("char", made.get("middle", "")) * made["repeat"]
            row["prediction"] = made.get("prefix", "") + middle + made["suffix"]
        case = Case((row["prediction"], row["reference"]))
        case.case = row
        found.append(case)
    assert {case.case["metric"] for case in found} == set(metrics)
    return found


def label(case: Case) -> str:
    return f"{case.case['metric']}-{str(case[0])[:20]!r}"


@pytest.mark.parametrize("case", cases(SCORERS), ids=label)
def test_the_upstream_rule_gives_the_recorded_score(case):
    assert SCORERS[case.case["metric"]](case) == pytest.approx(case.case["expected"])


@pytest.fixture(scope="module")
def equal():
    workers = MathWorkers(1, timeout_s=20.0, boxed=False)
    yield lambda gold, answer: bool(workers.compare([(gold, answer)])[0].equal)
    workers.close()


@pytest.mark.parametrize("case", cases(RECIPES), ids=label)
def test_the_recipe_gives_the_recorded_reward(case, equal):
    found = recipe.reward(*case, RECIPES[case.case["metric"]], equal)
    total = case.case["metric"] == "openmmreasoner_uniopd_score"
    assert (found.total if total else found.accuracy) == pytest.approx(case.case["expected"])
    assert found.format == case.case.get("format", found.format)
    assert found.answer == case.case.get("extracted", found.answer)


@pytest.mark.parametrize("case", cases(["wemath_four_dim"]), ids=label)
def test_the_four_dimensions_of_wemath_match_the_recorded_ones(case):
    problems = []
    for key, n in case[0].items():
        _, steps, whole = key.split("|")
        problems += [([step == "1" for step in steps], whole == "1")] * n
    scores = wemath_scores(problems)
    assert scores.problems == 525
    expected = case.case["expected"]
    if isinstance(expected, str):  # upstream divides by zero
        assert scores.rote_rate() == scores.rote_rate(loose=True) == scores.score() == 0.0
        return
    assert f"{scores.score():.2%}" == expected["strict"]
    assert f"{scores.score(loose=True):.2%}" == expected["loose"]
    counts = expected["counts"]
    assert scores.complete_mastery == counts["CompleteMastery_strict"]
    assert scores.rote_memorization_loose == counts["RoteMemorization_loose"]


def test_a_mixed_run_has_the_published_four_dimensional_score():
    two = {"11|1": 120, "11|0": 80, "10|1": 60, "10|0": 60, "00|1": 20, "00|0": 20}
    three = {"111|1": 60, "110|1": 40, "000|1": 10, "111|0": 25, "100|0": 30}
    problems = [
        ([step == "1" for step in key.split("|")[0]], key.endswith("1"))
        for key, n in [*two.items(), *three.items()]
        for _ in range(n)
    ]
    scores = wemath_scores(problems)
    assert (f"{scores.score():.2%}", f"{scores.score(loose=True):.2%}") == ("44.29%", "63.33%")


@pytest.mark.parametrize(
    ("text", "head", "release_073"),
    [
        ("12.004", 12.0, 12.0), ("1,200", 1200, 1200), ("1,20", None, None), ("50\\%", 0.5, 0.5), ("50%", None, None),
        ("12)", 12, 12), ("2\\sqrt{2}", 2.83, None), ("\\sqrt[3]{8}", 2.0, 2.0), ("\\sqrt8", None, None),
        ("2\\pi", 6.28, None), ("\\frac12", None, None), ("1\\frac{1}{2}", 0.5, 0.5), ("2^3^2", 64, 64), ("-2^2", -4, -4),
        ("5!", 120, None), ("e", None, None), ("e^2", 7.39, None), ("\\log_{2}8", 3.0, None), ("x=5", 5, 5),
        ("\\frac{1}{0}", None, None), ("(1,2)", None, None), ("5.5.5", 2.75, 2.75), ("x", None, None), ("１２", None, None),
        ("\\sin30\\sqrt{3}", -1.71, None), ("__import__('os')", None, None), ("9^{9^{9}}", None, None), ("", None, None),
    ],
)  # fmt: skip
def test_latex_numbers_have_the_value_that_the_mathvision_scorers_compute(text, head, release_073):
    assert evaluate(text) == head
    assert evaluate(text, names=False) == release_073


@given(st.text("0123456789.,+-*/^!(){}[]\\%$=|'_ abefinpqrstx", max_size=40))
def test_no_expression_makes_the_number_parser_raise_or_hang(text):
    value = evaluate(text)
    assert value is None or isinstance(value, int | float)


@pytest.mark.parametrize(
    ("gold", "answer", "uniopd", "lmms_eval"),
    [
        ("Blue", "B", False, True), ("Decrease", "D", False, True), ("C", "Answer: (C)", False, False),
        ("10000000001", "1000000000", True, True), ("B", "Blue", True, True), ("A, B", "A", False, True),
    ],
)  # fmt: skip
def test_the_recipes_false_positives_are_in_its_upstream_profiles_only(gold, answer, uniopd, lmms_eval):
    assert recipe.is_match(answer, gold, "uniopd") is uniopd
    assert recipe.is_match(answer, gold, "lmms_eval") is lmms_eval


def test_the_recipe_verifier_says_accuracy_format_and_total():
    verifier = get_verifier("recipe:uniopd", VerifierConfig(timeout_s=20.0))
    prompt = Prompt("row", ({"role": "user", "content": "q"},), answer="1200")
    try:
        right, wrong = verifier.verify_many(
            [
                (prompt, "<think>r</think><answer>1,200</answer>"),
                (prompt, "<think>r</think><answer>5</answer>"),
            ]
        )
    finally:
        verifier.close()
    assert (right.correct, right.score, right.extracted, right.reason) == (
        True,
        1.0,
        "1,200",
        "format 1, total 1",
    )
    assert (wrong.correct, wrong.score, wrong.reason) == (False, 0.0, "format 1, total 0.1")
