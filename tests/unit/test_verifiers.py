"""Routing, registry and contracts of the verifiers, without worker processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniopd_mm.config import VerifierConfig
from uniopd_mm.errors import ConfigError
from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.verifiers import (
    Verifier,
    VerifierPool,
    avg_at_k,
    cov_at_k,
    get_verifier,
    maj_at_k,
    pass_at_k,
    register_verifier,
)


def ask(answer, question="q", **fields) -> Prompt:
    return Prompt("row", ({"role": "user", "content": question},), answer=answer, **fields)


@register_verifier("length-parity")
class LengthParity(Verifier):
    """Correct when text and gold have lengths of the same parity."""

    def extract(self, prompt: Prompt, text: str) -> str | None:
        return text or None

    def score(self, answer: str, gold: str, prompt: Prompt) -> float:
        return float(len(answer) % 2 == len(gold) % 2)


def test_a_row_names_its_verifier_before_its_domain_and_its_domain_before_the_default():
    pool = VerifierPool(VerifierConfig(default="exact", by_domain={"chart": "chart", "doc": "document"}))
    assert pool.name_of(ask("1", domain="chart", verifier="choice")) == "choice"
    assert pool.name_of(ask("1", domain="chart")) == "chart"
    assert pool.name_of(ask("1", domain="other")) == "exact"


def test_outcomes_come_back_in_order_whatever_verifiers_they_need():
    config = VerifierConfig(default="exact", by_domain={"chart": "chart"})
    items = [
        (ask("14", domain="chart"), "14%"),
        (ask("14"), "14%"),
        (ask("1200", domain="chart"), "$1,200"),
        (ask("Blue"), "blue"),
        (ask("ab", verifier="length-parity"), "abcd"),
    ]
    with VerifierPool(config) as pool:
        assert [outcome.correct for outcome in pool.check(items)] == [True, False, True, True, True]


def test_an_unknown_verifier_in_the_settings_is_an_error_with_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean 'math'"):
        VerifierPool(VerifierConfig(default="mth"))
    with pytest.raises(ConfigError, match="Did you mean 'upstream'"):
        get_verifier("chart:upstrem")


def test_an_unknown_verifier_in_a_row_is_found_by_the_gold_check_and_makes_its_outcome_unknown():
    pool = VerifierPool(VerifierConfig(default="exact"))
    row = ask("1", verifier="chrat")
    assert "Did you mean 'chart'" in (pool.check_gold(row) or "")
    good, bad = pool.check([(ask("1"), "1"), (row, "1")])
    assert good.correct is True
    assert bad.correct is None and "chart" in bad.reason


def test_a_registered_name_cannot_be_taken_over():
    with pytest.raises(ConfigError, match="taken"):
        register_verifier("math")(LengthParity)
    with pytest.raises(ConfigError, match="taken"):
        register_verifier("length-parity")(type("Other", (Verifier,), {}))


@pytest.mark.parametrize("answer", [None, "", "  ", []])
@pytest.mark.parametrize("name", ["exact", "chart", "document", "choice", "math"])
def test_without_a_gold_answer_the_outcome_is_unknown_and_the_check_says_why(name, answer):
    pool = VerifierPool()
    row = ask(answer, verifier=name)
    assert pool.check_gold(row) == "no gold answer"
    assert pool.check([(row, "7")]) == [Outcome(None, reason="no gold answer")]


@pytest.mark.parametrize("name", ["exact", "chart", "document", "choice", "math"])
def test_a_response_without_an_answer_is_incorrect_not_unknown(name):
    (outcome,) = VerifierPool().check([(ask("B", verifier=name), "<think>it may be B")])
    assert outcome.correct is False
    assert outcome.extracted is None and outcome.reason == "no answer found"


def test_any_of_several_golds_will_do():
    pool = VerifierPool(VerifierConfig(default="exact"))
    right, wrong = pool.check([(ask(["NYC", "New York"]), "new york."), (ask(["NYC", "New York"]), "Boston")])
    assert right.correct is True and wrong.correct is False


MARKS = (
    "\\boxed{",
    "\\text{",
    "}",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "Answer: ",
    "答案：",
    "####",
)
PIECES = (
    "(",
    "A",
    ")",
    "14%",
    "$",
    "\n",
    "\\",
    "½",
    "．",
    "1/0",
    "1e999",
    "-",
    ".",
    "[",
    "]",
    ",",
    "\ud800",
    "\x00",
    "nan",
)
FRAGMENTS = st.sampled_from((*MARKS, *PIECES))
TEXTS = st.one_of(st.text(max_size=60), st.lists(FRAGMENTS, max_size=25).map("".join))
IN_PROCESS = [
    "exact",
    *(f"chart:{p}" for p in ("strict", "upstream", "upstream_vlmevalkit")),
    *(f"document:{p}" for p in ("strict", "upstream", "upstream_vlmevalkit")),
    *(
        f"choice:{p}"
        for p in ("strict", "upstream_ai2d", "upstream_visulogic", "upstream_visulogic_vlmevalkit")
    ),
]
VERIFIERS = [get_verifier(name) for name in IN_PROCESS]


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, gold=TEXTS, question=TEXTS)
def test_no_text_gold_or_question_makes_a_verifier_raise(text, gold, question):
    for verifier in VERIFIERS:
        outcome = verifier.verify(ask(gold, question), text)
        assert outcome.correct in (True, False, None)
        assert outcome.score is None or 0 <= outcome.score <= 1


def test_the_package_and_the_worker_load_nothing_heavy():
    code = (
        "import sys, uniopd_mm.verifiers, uniopd_mm.verifiers.math_worker;"
        "heavy = {'torch', 'transformers', 'deepspeed', 'pydantic', 'numpy', 'sympy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_averages_over_samples_match_worked_examples():
    assert avg_at_k([[1, 0, 0, 0], [1, 1, 1, 1]]) == 0.625
    assert cov_at_k([[1, 0, 0, 0], [0, 0, 0, 0]]) == 0.5
    assert maj_at_k([[1, 1, 0, 0], [1, 1, 1, 0]]) == 0.5
    assert avg_at_k([]) == cov_at_k([]) == maj_at_k([]) == 0.0


def test_pass_at_k_is_the_chance_of_a_correct_one_among_k_drawn():
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(10, 3, 5) == pytest.approx(0.9166666666666666)
    assert pass_at_k(10, 3, 8) == 1.0
    with pytest.raises(ValueError, match="k=11"):
        pass_at_k(10, 3, 11)
