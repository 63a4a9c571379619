"""Scoring: the benchmarks' own numbers in the ``upstream`` profiles, and the strict profiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniopd_mm.config import VerifierConfig
from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers import (
    VerifierPool,
    avg_at_k,
    chart,
    choice,
    cov_at_k,
    document,
    exact,
    logicvista,
    maj_at_k,
    pass_at_k,
)
from uniopd_mm.verifiers.document import levenshtein

CASES = Path(__file__).parents[1] / "fixtures" / "metric_cases.jsonl"
SCORERS = {
    "chartqa_relaxed_accuracy": (chart.score, "upstream"),
    "chartqa_relaxed_accuracy_vlmeval": (chart.score, "upstream_vlmevalkit"),
    "anls_0.5": (document.score, "upstream"),
    "anls_0.5_vlmeval": (document.score, "upstream_vlmevalkit"),
    "ai2d_exact_match": (choice.score, "upstream_ai2d"),
    "visulogic_letter_lmmseval": (choice.score, "upstream_visulogic"),
    "visulogic_letter_vlmeval": (choice.score, "upstream_visulogic_vlmevalkit"),
}


def cases(*metrics: str) -> list[dict]:
    rows = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    found = [row for row in rows if row["metric"] in metrics]
    assert {row["metric"] for row in found} == set(metrics)
    for row in found:
        if row["prediction"] is None:
            made = row["prediction_gen"]
            row["prediction"] = made["char"] * made["repeat"] + made["suffix"]
    return found


def label(case: dict) -> str:
    return f"{case['metric']}-{str(case['prediction'])[:20]!r}"


def ask(answer, **fields) -> Prompt:
    return Prompt("row", ({"role": "user", "content": "q"},), answer=answer, **fields)


@pytest.mark.parametrize("case", cases(*SCORERS), ids=label)
def test_the_upstream_profile_gives_the_benchmarks_own_score(case):
    score, profile = SCORERS[case["metric"]]
    golds = case["reference"] if isinstance(case["reference"], list) else [case["reference"]]
    best = max(score(case["prediction"], gold, profile) for gold in golds)
    assert best == pytest.approx(case["expected"], abs=1e-12)


@pytest.mark.parametrize("profile", ["upstream", "upstream_vlmevalkit"])
@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("$ﬁx$", "ﬁx", 0.6), ("  `my answer is B`)", "my answer is B", 0.8421052631578947), ("pears", "  pears!", 0.875),
        ("  straße", "STRASSE", 0.7777777777777778), ("pear" + 16 * " ", "pear", 1.0), ("ab", "abcd", 0.5), (" or ", "", 0.5),
    ],
)  # fmt: skip
def test_upstream_anls_divides_by_the_length_of_the_raw_string_in_capitals(answer, gold, score, profile):
    assert document.score(answer, gold, profile) == pytest.approx(score, abs=1e-12)


def test_ai2d_reads_the_letter_of_a_response_but_not_of_the_gold():
    rows = [
        ("B. heart", "B"),
        ("(B)", "B"),
        ("B. heart", "B. heart"),
        ("$B. heart$", "B. heart"),
        (" B", "B"),
    ]
    assert [choice.score(text, gold, "upstream_ai2d") for text, gold in rows] == [1, 1, 0, 1, 0]


def test_logicvista_sorts_the_letters_of_an_answer_and_the_parts_of_the_gold():
    rows = [("BA", "A, B"), ("AB", "AB"), ("AB", "BA"), ("AA", "A"), ("ab", "A, B")]
    assert [logicvista.score(letters, gold) for letters, gold in rows] == [1, 1, 0, 0, 0]


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(VerifierConfig(timeout_s=20.0)) as pool:
        yield pool


@pytest.mark.parametrize("case", cases("text_math_boxed_mathverify"), ids=label)
def test_the_upstream_profile_of_math_gives_the_benchmarks_own_score(case, pool):
    (outcome,) = pool.check([(ask(case["reference"], verifier="math:upstream"), case["prediction"])])
    assert outcome.correct is (case["expected"] == 1.0)


@pytest.mark.parametrize("name", ["chart", "document"])
def test_the_upstream_profile_is_reached_by_name(name, pool):
    answer = "1,200"
    strict, upstream = pool.check([(ask("1200", verifier=f"{name}{p}"), answer) for p in ("", ":upstream")])
    assert strict.correct is True
    assert upstream.score == (0.0 if name == "chart" else pytest.approx(0.8))


def test_averages_and_pass_rates_match_the_recorded_ones():
    for case in cases("avg_at_k"):
        if isinstance(case["prediction"], list):
            assert avg_at_k(case["prediction"]) == case["expected"]
            assert cov_at_k(case["prediction"]) == case["passk"]
        else:
            n, right = case["prediction"]["n"], case["prediction"]["correct_first"]
            row = [1.0] * right + [0.0] * (n - right)
            expected = case["expected"]
            assert (row[0], cov_at_k([row]), maj_at_k([row]), avg_at_k([row])) == tuple(
                expected[key] for key in ("exact_match", f"cov@{n}", f"maj@{n}", f"avg@{n}")
            )
    for case in cases("pass_at_k"):
        assert pass_at_k(**case["prediction"], **case["reference"]) == pytest.approx(case["expected"])


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("14", "14%"), ("14%", "14"), ("0.14", "14%"), ("14%", "0.14"), ("1200", "$1,200"), ("1200", "1200 dollars"),
        ("14", "fourteen"), ("14", "14.7"), ("14", "13.3"), ("0", "0.0"), ("0.5", "1/2"), ("2010", "2010"),
        ("5 million", "5"), ("5", "5 million"), ("1200000", "1.2 million"), ("[Red, Blue]", "[Blue, Red]"),
        ("[1,200, 5]", "5, 1200"), ("Yes", "yes."), ("１２", "12"), ("-5", "−5"), ("3.2e3", "3200"), ("1/8/93", "1/8/93"),
    ],
)  # fmt: skip
def test_strict_chart_answers_are_read_like_a_person_would(gold, answer):
    assert chart.score(answer, gold) == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("14", "14.71"), ("2010", "2011"), ("2010", "2110"), ("2010", "2010%"), ("0", "0.01"), ("5 million", "5 billion"),
        ("14", "0.14"), ("14%", "1400"), ("-5", "5"), (".5", "5"), ("5", "inf"), ("5", "nan"), ("5", ""), ("5", "1/0"),
        ("[Red, Blue]", "Red"), ("[Red, Blue]", "[Red, Blue, Green]"), ("[Red, Red]", "[Red, Blue]"), ("Blue", "Red"),
    ],
)  # fmt: skip
def test_strict_chart_rejects_what_is_not_the_answer(gold, answer):
    assert chart.score(answer, gold) == 0.0


def test_a_document_answer_with_another_number_is_wrong_however_similar(pool):
    year, typo = pool.check(
        [(ask("2014", verifier="document"), "2015"), (ask("pears", verifier="document"), "pear")]
    )
    assert (year.correct, year.score) == (False, 0.75)
    assert (typo.correct, typo.score) == (True, pytest.approx(0.8))


def test_the_nearest_of_several_golds_gives_the_document_score(pool):
    golds = ["itc limited", "ITC", "the ITC company"]
    (outcome,) = pool.check([(ask(golds, verifier="document"), "ITC.")])
    assert outcome.score == 1.0 and outcome.correct is True


@given(st.text("ab ", max_size=8), st.text("ab ", max_size=8))
def test_anls_is_symmetric_bounded_and_one_only_for_equal_strings(a, b):
    similarity = document.score(a, b)
    assert similarity == document.score(b, a)
    assert similarity == 0 or 0.5 <= similarity <= 1
    assert (similarity == 1) == (exact.normalize(a) == exact.normalize(b))


@given(st.text("abc", max_size=7), st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_levenshtein_is_a_metric(a, b, c):
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, b) == levenshtein(b, a)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("New  York.", "new york", True), ("“Blue”", "blue", True), ("\\text{Blue}", "Blue", True), ("ＡＢ", "ab", True),
        ("e\u0301", "é", True), ("Stop!", "stop", True), ("5!", "5", False), (".5", "5", False), ("-5", "5", False),
        ("...", ".", False), ("x²", "x2", False),
    ],
)  # fmt: skip
def test_exact_equality_ignores_form_but_not_content(a, b, same):
    assert (exact.normalize(a) == exact.normalize(b)) is same


def test_naming_more_letters_than_asked_is_wrong_and_letter_sets_have_no_order(pool):
    rows = [("C", "Answer: A, C"), ("A, B", "Answer: B and A"), ("AB", "\\boxed{A,B}"), ("A, B", "A")]
    outcomes = pool.check([(ask(gold, verifier="choice"), text) for gold, text in rows])
    assert [outcome.correct for outcome in outcomes] == [False, True, True, False]


def test_a_gold_that_is_an_options_text_means_its_letter(pool):
    question = ({"role": "user", "content": "Which?\nA. heart\nB. lung"},)
    right = Prompt("1", question, answer="lung", verifier="choice")
    lost = Prompt("2", question, answer="kidney", verifier="choice")
    assert pool.check([(right, "(B)"), (right, "lung"), (right, "A")]) == pool.check(
        [(Prompt("1", question, answer="B", verifier="choice"), text) for text in ("B", "B", "A")]
    )
    assert pool.check([(lost, "B")])[0].correct is None
    assert "kidney" in (pool.check_gold(lost) or "")
