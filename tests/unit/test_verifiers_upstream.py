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


FIVE = ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("gold", "answer", "options", "score"),
    [
        ("12", "\\boxed{12}", [], 1), ("12", "The answer is \\boxed{12}.", [], 1), ("12", "12)", [], 0), ("12", "12.", [], 1),
        ("\\sqrt{8}", "2\\sqrt{2}", [], 0), ("0.5", "50 %", [], 1), ("1.5", "1\\frac{1}{2}", [], 1), ("12", "12^\\circ", [], 1),
        ("12", "x=12", [], 0), ("12", "\\boxed{11} or \\boxed{12}", [], 0), ("0.5", "1/2", [], 1), ("1000", "1e3", [], 1),
        ("10^{3}", "1e3", [], 0), ("12", "A", [], 1), ("8", "2**3", [], 1), ("12", "+\t12", [], 1), ("0.5", "10^{400}", [], 0),
        ("C", "\\boxed{C}", [], 0), ("C", "\\boxed{C}", FIVE, 1), ("C", "C is the answer to this one", FIVE, 0),
        ("1200", "1,200", [], 1), ("12", "12\\text{ cm}", [], 0), ("C", "3 of them", FIVE, 1), ("-5", "−5", [], 1),
    ],
)  # fmt: skip
def test_vlmevalkits_mathvision_rule_compares_as_python_or_as_latex(gold, answer, options, score):
    assert mathvision.score(answer, gold, "upstream_vlmevalkit", options) == score


@given(st.text("0123456789.,+-*/^!(){}[]\\%$=|'_ \t abefinpqrstx", max_size=40))
def test_no_answer_makes_vlmevalkits_rule_raise(text):
    assert mathvision.score(text, "12", "upstream_vlmevalkit") in (0.0, 1.0)


@pytest.mark.parametrize(
    ("task", "scorer", "gold", "text", "alone", "printed"),
    [
        ("chartqa", "chart:upstream", "14", "<think>12</think>14\n", 0, 1),
        ("chartqa", "chart:upstream", "Blue ", "Blue", 1, 0),
        ("ai2d", "choice:upstream_ai2d", "B", "<think>A</think>\nB", 0, 1),
        ("ai2d", "choice:upstream_ai2d", "B", " B", 0, 1),
        ("ai2d", "choice:upstream_ai2d", "B", "B. heart", 1, 1),
        ("ai2d", "choice:upstream_ai2d", "B", "<think>A</think>B. heart", 0, 0),
        ("visulogic", "choice:upstream_visulogic", "C", "<think>option A</think>C", 0, 1),
        ("docvqa", "document:upstream", ["pears"], "<analysis>a tree</analysis>pears ", 0, 1),
        ("mathvision", "mathvision:upstream", "12", "<think>\\boxed{3}</think>12", 0, 1),
        ("reasoning", "recipe:lmms_eval", "8", "<think><answer>7</answer></think><answer>8</answer>", 0, 1),
        ("reasoning", "recipe:lmms_eval", "8", "<think>so \\boxed{8}", 1, 1),
        ("reasoning", "recipe:lmms_eval", "8", "<think>so \\boxed{8}</think> Eight.", 1, 0),
    ],
)
def test_lmms_evals_command_line_takes_closed_reasoning_away_before_it_scores(
    task, scorer, gold, text, alone, printed
):
    prompt = Prompt("row", ({"role": "user", "content": "q"},), answer=gold)
    for name, score in ((scorer, alone), (f"lmms_eval:{task}", printed)):
        verifier = get_verifier(name, VerifierConfig(timeout_s=20.0))
        assert verifier.verify(prompt, text).score == score
        verifier.close()


def test_a_document_task_with_reasoning_measures_the_answer_that_the_recipe_finds():
    prompt = Prompt("row", ({"role": "user", "content": "q"},), answer=["apples", "pears"])
    verifier = get_verifier("lmms_eval:docvqa_reasoning")
    text = "<analysis>apples?</analysis><answer> peers </answer>"
    outcome = verifier.verify(prompt, text)
    assert (outcome.score, outcome.extracted, outcome.correct) == (pytest.approx(0.8), "peers", True)
    assert verifier.verify(prompt, "<think>\\boxed{pears}</think>nuts").score == 0.0
    assert verifier.verify(Prompt("row", prompt.messages, answer=None), text).correct is None


@pytest.mark.parametrize("text", ["\\boxed{10^{400}}", '{"short answer": "1e400"}', "10^{400}"])
def test_a_number_beyond_floats_is_a_wrong_dynamath_answer(text):
    prompt = Prompt("row", ({"role": "user", "content": "q"},), answer="3.142")
    assert get_verifier("dynamath").verify(prompt, text).correct is False


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
