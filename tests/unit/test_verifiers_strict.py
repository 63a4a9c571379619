"""Strict profiles of the image benchmarks, numbers with units, and the recipe without its false positives."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
        ("numeric", "q", "12", "There are twelve apples.", True), ("numeric", "q", "12", "3 + 9 = 12", True),
        ("numeric", "q", "12", "Total: 12", True), ("numeric", "q", "12", "2x = 12", False), ("numeric", "q", "12", "It is 12 or 13.", False),
        ("chart", "q", "2010", "In the year 2010", True), ("chart", "q", "2010", "2010s", False), ("chart", "q", "2010", "2010-2011", False),
        ("chart", "q", "[Red, Blue]", "Blue and Red", True), ("chart", "q", "[Red, Blue]", "Red or Blue", False),
        ("chart", "q", "Yes", "Yes, it is higher.", True), ("chart", "q", "Yes", "Yes and no", False), ("chart", "q", "14", "about 14", True),
        ("chart", "q", "United States", "the United States", True), ("chart", "q", "14", "14 or 20", False),
        ("document", "q", "July 4, 2014", "June 4, 2014", False), ("document", "q", "$5 million", "$5 billion", False),
        ("document", "q", "1.5 mg", "1.5 kg", False), ("document", "q", "sales", "no sales", False),
        ("document", "q", "March 3, 2014", "March 03, 2014", True), ("document", "q", "Philip Morris USA", "Phillip Morris U.S.A.", False),
        ("document", "q", "Philip Morris USA", "Philip Morris U.S.A.", True), ("document", "q", "$1,200.50", "1200.50", True),
        ("math", "q", "5", "\\boxed{2x=5}", False), ("math", "q", "5", "\\boxed{x=5}", True), ("math", "q", "33", "\\boxed{m+n=33}", True),
        ("math", "q", "5", "\\boxed{\\neq 5}", False), ("math", "q", "5", "\\boxed{> 5}", False), ("math", "q", "12", "\\boxed{12\\text{ or }13}", False),
        ("math", "q", "5\\text{ cm}", "\\boxed{5\\text{ km}}", False), ("math", "q", "5\\text{ cm}", "\\boxed{50\\text{ mm}}", True),
        ("math", "q", "123_4", "\\boxed{123_5}", False), ("math", "q", "123_4", "\\boxed{123_{4}}", True), ("math", "q", "ABC", "\\boxed{ACB}", False),
        ("math", "q", "[1,2)", "\\boxed{1\\le x<2}", True), ("math", "q", "x>5", "\\boxed{(5,\\infty)}", True), ("math", "q", "5", "\\boxed{x>5}", False),
        ("math", "q", "\\{1,2\\}", "\\boxed{x=1 \\text{ or } x=2}", True), ("math", "q", "5", "\\boxed{1}, \\boxed{5}", False),
        ("logicvista", "q", "A, B", "A or B", False), ("recipe", "q", "12,345,678,901", "12,345,678,902", False),
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


ANGLE = "Angle 1 is\nA. 30°\nB. 45°\nC. 60°\nD. 90°"
LETTERED = "Which letter marks the roots?\nA. A\nB. C\nC. D\nD. B"
ROOT = "sin 60° is\nA. $\\frac{1}{2}$\nB. $\\frac{\\sqrt{3}}{2}$\nC. $\\frac{\\sqrt{2}}{2}$"
BIRD = "What is it?\nA. a bird\nB. an owl\nC. a cat"


@pytest.mark.parametrize(
    ("verifier", "question", "gold", "text", "correct"),
    [
        ("choice", ANGLE, "B", "Solution: B", True), ("choice", ANGLE, "B", "A... no, wait: B", True), ("choice", ANGLE, "A", "A... no, wait: B", False),
        ("choice", ANGLE, "B", "Answer: B... no, C", False), ("choice", ANGLE, "B", "```\nB\n```", True), ("choice", ANGLE, "B", "\\boxed{45^\\circ}", True),
        ("choice", ANGLE, "B", "The answer is 45 degrees.", True), ("choice", ANGLE, "B", "The angle is 45°.", True), ("choice", ANGLE, "B", "45", True),
        ("choice", ANGLE, "B", "Answer: B. 60°", False), ("choice", ANGLE, "B", "\\boxed{B. 60^\\circ}", False), ("choice", ANGLE, "B", "Answer: B = 60°", False), ("choice", ANGLE, "B", "Answer: B - 60°", False), ("choice", ANGLE, "D", "First 45°.\n\nD. 90° is too large", False),
        ("choice", ANGLE, "B", "Answer: B vs C", False), ("choice", ANGLE, "B", "Answer: B (or C)", False), ("choice", ANGLE, "B", "Answer: B+C", False),
        ("choice", ANGLE, "B", "Answer: B as well as C", False), ("choice", ANGLE, "B", "Answer: B if x = 2, C otherwise", False), ("choice", ANGLE, "B", "Answer: B is wrong", False),
        ("choice", ANGLE, "B", "The answer would be B if it were acute, so C.", False), ("choice", ANGLE, "B", "Answer: B.A.", False), ("choice", ANGLE, "B", "The wrong option is 45°.", False),
        ("choice", ANGLE, "B", "Answer: B (not A)", True), ("choice", ANGLE, "B", "Answer: B rather than A", True), ("choice", ANGLE, "B", "Answer: B. A is too small.", True),
        ("choice", ANGLE, "B", "C seems wrong. I choose B.", True), ("choice", ANGLE, "B", "Answer: I believe B", True), ("choice", ANGLE, "B", "Therefore, B.", True),
        ("choice", ANGLE, "B", "Answer: B is not correct", False), ("choice", ANGLE, "B", "Answer: B or not", False), ("choice", ANGLE, "A", "A, because B is too large", True),
        ("choice", ANGLE, "B", '{"answer": ["B", "C"]}', False), ("choice", "q", "A, C", '{"answer": ["A", "C"]}', True), ("choice", ANGLE, "B", "答案是B，因为C太大。", True),
        ("choice", "q", "D", "(D) the rotated one", True), ("choice", "q", "D", "C, not D", False), ("choice", ANGLE, "B", "The answer to your question is: **B**", True),
        ("choice", ANGLE, "C", "不应选C", False), ("choice", ANGLE, "C", "答案：C错误", False), ("choice", ANGLE, "C", "综上，选项C正确。", True),
        ("choice", LETTERED, "B", "B", True), ("choice", LETTERED, "B", "B. C", True), ("choice", LETTERED, "B", "D. B", False),
        ("choice", ROOT, "B", "\\boxed{\\dfrac{\\sqrt{3}}{2}}", True), ("choice", ROOT, "B", "\\boxed{\\frac{\\sqrt{2}}{2}}", False),
        ("choice", BIRD, "B", "owl", True), ("choice", BIRD, "A", "A bird", True), ("choice", BIRD, "A", "A cat", False),
        ("numeric", "q", "12", "2=12", False), ("numeric", "q", "12", "Area = 1/2 × 6 × 4 = 12", True), ("numeric", "q", "12", "12 dozen", False),
        ("numeric", "q", "12 °C", "$12^\\circ\\text{C}$", True), ("numeric", "q", "12", "12以上", False), ("chart", "q", "[1,200, 300]", "300 and 1,200", True),
        ("numeric", "q", "12 m", "The tree is 12 m tall.", True), ("numeric", "q", "12", "### Answer\nWe compute step by step.\n\n12", True), ("numeric", "q", "12", "\\boxed{5}, or \\boxed{12}", False),
        ("numeric", "q", "12", "The area of 3 triangles is $12$.", True), ("numeric", "q", "12", "### Answer\n12", True), ("numeric", "q", "12", "答案是12平方厘米。", True),
        ("math", "q", "42", "**Final Answer**\n\n42", True), ("math", "q", "42", "### Answer\nThe area is 42 cm².", True), ("math", "q", "42", "### Answer\nTo be found.\n\n\\boxed{42}", True),
        ("math", "q", "5", "\\boxed{5:1}", False), ("math", "q", "2:3", "\\boxed{4:6}", True), ("math", "q", "5", "\\boxed{2=5}", False), ("math", "q", "5", "\\boxed{x/2 = 5}", False),
        ("math", "q", "5", "\\boxed{\\frac{x}{2} = 5}", False), ("math", "q", "5", "\\boxed{|x| = 5}", False), ("math", "q", "5", "\\boxed{f(3) = 5}", True),
        ("math", "q", "5", "\\boxed{a_1+a_2 = 5}", True), ("math", "q", "5", "\\boxed{\\angle ABC = 5^\\circ}", True), ("math", "q", "42", "\\boxed{V = 6 \\times 7 = 42}", True),
        ("math", "q", "42", "\\boxed{42 \\text{ million}}", False), ("math", "q", "42", "\\boxed{42 \\text{ is wrong}}", False), ("math", "q", "42", "\\boxed{\\text{about } 42}", True),
        ("math", "q", "42", "\\boxed{\\text{Area} = 42 \\text{ cm}^2}", True), ("math", "q", "5", "Answer: five", True), ("math", "q", "\\ln 2", "ln 2", True), ("math", "q", "\\ln 2", "\\boxed{ln(3)}", False),
        ("math", "q", "(1,2)", "\\boxed{y=2, x=1}", True), ("math", "q", "(1,2)", "\\boxed{y=1, x=2}", False), ("math", "q", "(1,2)", "\\boxed{\\{1,2\\}}", False),
        ("math", "q", "\\{1,3\\}", "\\boxed{(1,3)}", False), ("math", "q", "\\{(1,2),(2,1)\\}", "\\boxed{(1,2),(2,1)}", True), ("math", "q", "\\{1,3\\}", "x = 1 or x = 3", True),
        ("math", "q", "x+1", "\\boxed{\\frac{x^2-1}{x-1} = x+1}", True), ("math", "q", "5", "\\boxed{5或6}", False), ("math", "q", "[1,2]", "\\boxed{1≤x≤2}", True), ("math", "q", "\\emptyset", "∅", True),
        ("math", "q", "2\\sqrt{3}", "\\boxed{2\\sqrt{3}\\text{ or }3}", False), ("math", "q", "[1,2]", "\\boxed{2 > x > 1}", False), ("math", "q", "5", "The answer is $5$. This is the sum.", True),
        ("math", "q", "(-\\infty,-1) \\cup (1,\\infty)", "\\boxed{\\left\\{ x \\mid x < -1 \\quad\\text{or}\\quad x > 1 \\right\\}}", True),
        ("math", "q", "[0,4)", "\\boxed{\\{x \\mid 0 \\le x < 4\\}}", True),
        ("chart", "q", "1200", "1.2k", True), ("chart", "q", "14", "14th", False), ("chart", "q", "45%", "The share in 2010 is 45%.", True), ("chart", "q", "5 km", "5 kg", False),
        ("chart", "q", "No", "No, it is not.", True), ("chart", "q", "No", "No, yes.", False), ("chart", "q", "Yes", "Yes, not no.", False),
        ("document", "q", "hypertension", "hypotension", False), ("document", "q", "macroeconomics", "microeconomics", False), ("document", "q", "approved", "unapproved", False),
        ("document", "q", "sulfate", "sulfite", False), ("document", "q", "methane", "ethane", False), ("document", "q", "reasoning", "resoning", True), ("document", "q", "-12,345", "12,345", False),
        ("document", "q", "John A. Smith", "Mr. John A. Smith", True), ("document", "q", "John A. Smith", "John Smith", False), ("document", "q", "12.5%", "12.5", False),
        ("document", "q", "3 of 12", "12 of 3", False), ("document", "q", "(212) 555-0147", "212-555-0147", True),
    ],
)  # fmt: skip
def test_what_models_write_is_judged_like_a_person_would(verifier, question, gold, text, correct, pool):
    assert pool.check([(ask(gold, question, verifier=verifier), text)])[0].correct is correct


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("12 cm", "12", True), ("1.2e3", "1200", True), ("12 mm", "12 cm", False), ("5 %", "5", True), ("5 %", "0.05", False),
        ("$1,200", "1200 dollars", True), ("12cm²", "12 cm^2", True), ("12 m", "12 m^2", False), ("90^\\circ", "90", True),
        ("12 kilometers per hour", "12 km/h", True), ("1.2 \\times 10^{3} m", "1200 m", True), ("12 or 13", "12", False),
        ("12 and 5", "12", False), ("5 is wrong", "5", False), ("−5", "-5", True), ("1e999", "5", False), ("1/0", "5", False),
        ("5000 m", "5 km", True), ("500 m", "5 km", False), ("120 mm^2", "1.2 cm^2", True), ("72 km/h", "20 m/s", True),
        ("5 m", "5 s", False), ("5 km", "5 km/h", False), ("10000000001", "10000000002", False), ("0.3333333", "1/3", True),
        ("$1.2 million", "1200000", True), ("1.2M", "$1,200,000", True), ("1.2 billion", "1.2 million", False), ("2½", "2.5", True),
        ("2 1/2", "2.5", True), ("21/2", "2.5", False), ("about 12", "12", True), ("between 12 and 13", "12", False), ("> 12", "12", False),
        ("12th of May", "12", False), ("12x", "12", False), ("B12", "12", False), ("3:12", "12", False), ("12个", "12", True),
        ("minus 5", "-5", True), ("–5", "-5", True), ("3-5", "-5", False), ("12-13", "12", False), ("12 long", "12", True),
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


GOLDS = {
    "choice": "C",
    "numeric": "7301",
    "chart": "7301",
    "exact": "walrus",
    "math": "7301",
    "recipe": "7301",
    "mathvision": "C",
}
FRAMES = (
    "{}",
    "The answer is {}.",
    "\\boxed{{{}}}",
    "Answer: {}",
    "<answer>{}</answer>",
    "答案：{}",
    '{{"answer": "{}"}}',
)
IN_PROCESS = ("choice", "numeric", "chart", "exact")


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40), frame=st.sampled_from(FRAMES))
def test_a_text_without_the_gold_is_never_correct(pool, text, frame):
    for name in IN_PROCESS:
        gold = GOLDS[name]
        folded = unicodedata.normalize("NFKC", frame.format(text)).casefold()
        if gold.casefold() in folded or "kidney" in folded or set("7301") <= set(folded):
            continue
        outcome = pool.check([(ask(gold, OPTIONS, verifier=name), frame.format(text))])[0]
        assert outcome.correct is False, (name, outcome)


@settings(max_examples=100, deadline=None)
@given(
    left=st.text("0123456789", max_size=4),
    right=st.text("0123456789", max_size=4),
    frame=st.sampled_from(FRAMES),
)
def test_a_gold_inside_a_longer_number_is_never_correct(pool, left, right, frame):
    number = f"{left}7301{right}"
    same = int(number) == 7301
    for name in ("numeric", "math", "recipe", "exact"):
        if not (name == "exact" and left):  # there, zeros in front are other words
            assert pool.check([(ask("7301", verifier=name), frame.format(number))])[0].correct is same


@settings(max_examples=60, deadline=None)
@given(
    letters=st.lists(st.sampled_from("ABC"), min_size=2, max_size=3, unique=True),
    joint=st.sampled_from((", ", " or ", " and ", "/", "; ", " or maybe ", " & ")),
    frame=st.sampled_from(FRAMES),
)
def test_several_letters_are_never_the_one_of_the_gold(pool, letters, joint, frame):
    text = frame.format(joint.join(letters))
    for gold in letters:
        assert pool.check([(ask(gold, OPTIONS, verifier="choice"), text)])[0].correct is False


@pytest.mark.parametrize(
    "name", ["choice", "numeric", "chart", "document", "exact", "math", "mathvision", "dynamath", "recipe"]
)
@pytest.mark.parametrize(
    "text", ["", "C", "Answer: C", "\\boxed{7301}", "<think>7301", "\x00", "\ud800 7301"]
)
def test_every_outcome_has_a_reason_and_a_bad_answer_is_never_unknown(name, text, pool):
    outcome = pool.check([(ask(GOLDS.get(name, "12"), OPTIONS, verifier=name), text)])[0]
    assert outcome.correct is not None and outcome.reason and outcome.score is not None
