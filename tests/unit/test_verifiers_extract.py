"""Extraction: which answer a response gives."""

from __future__ import annotations

import time

import pytest

from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers import choice, math
from uniopd_mm.verifiers.extract import fold, last_boxed, short_answer, visible

OPTIONS = {"A": "heart", "B": "lung", "C": "kidney", "D": "A and B"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{7} then \\boxed{8}", "8"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {7}", "7"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
        ("\\boxed{x = \\boxed{7}}", "7"),
        ("put it in \\boxed{}: \\boxed{7}, again \\boxed{ }", "7"),
        ("\\boxed{7} and \\boxed{8", "7"),
        ("\\boxed{204", None),
        ("\\fbox{7}", None),
        ("\\boxed{}", None),
        ("{\\boxed{7}", "7"),
        ("}}\\boxed{7}", "7"),
    ],
)
def test_the_last_balanced_box_with_content_is_the_answer(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("<think>never closed b", ""),
        ("<think>a</think>b<think>c", "b"),
        ("x</think>y</think>z", "z"),
        ("◁think▷a◁/think▷b", "b"),
        ("<THINK>a</THINK>b", "b"),
    ],
)
def test_reasoning_is_not_part_of_the_answer(text, shown):
    assert visible(text).strip() == shown


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{１２}", "12"),
        ("\\boxed{x²}", "x^{2}"),
        ("\\boxed{½}", "\\frac{1}{2}"),
        ("\\boxed{√2}", "\\sqrt{2}"),
        ("\\boxed{1\\,000}", "1000"),
        ("\\boxed{1 000.5}", "1000.5"),
        ("\\boxed{1.03e2}", "1.03\\cdot 10^{2}"),
        ("\\boxed{−984}", "-984"),
        ("\\boxed{$7$}", "7"),
        ("\\boxed{7.}", "7"),
        ("The answer is 204. This is the sum.", "204"),
        ("The answer is: **204**", "204"),
        ("**Final Answer:** $\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("答案：7", "7"),
        ("答案是７。", "7"),
        ("#### 72", "72"),
        ("<answer>\\boxed{7}</answer> \\boxed{8}", "7"),
        ("<answer>7</answer><answer>8</answer>", "8"),
        ("Answer: 5, or so I thought.\nAnswer: 6", "6"),
        ("\\boxed{7}\nThe answer is clear.", "7"),
        ("It is 204.", None),
        ("5", "5"),
        ("$x=5$", "x=5"),
        ("12 cm", "12 cm"),
        ("so\n5", None),
        ("\\boxed{5", None),
        ("\\boxed{5}, \\boxed{6}", "5, 6"),
        ("\\boxed{5} or \\boxed{6}", "5 or 6"),
        ('{"answer": "\\\\frac{1}{2}"}', "\\frac{1}{2}"),
        ("\\boxed{1\\le x<2}", "[1,2)"),
        ("\\boxed{x<-1 \\text{ or } x>1}", "(-\\infty,-1) \\cup (1,\\infty)"),
        ("\\boxed{3 > x}", "(-\\infty,3)"),
        ("\\boxed{a<x>b}", "a<x>b"),
    ],
)
def test_a_mathematical_answer_is_found_and_tidied(text, answer):
    assert math.extract(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        *(
            "C",
            "(C)",
            "c",
            "C.",
            "**C**",
            "（Ｃ）",
            "C. kidney",
            "kidney",
            "C. kidney\nbecause the others are not",
        ),
        *(
            "Answer: (C)",
            "答案：C",
            "答案是C。",
            "故选C",
            "选择：C",
            "Answer: option C",
            "My answer is: C) kidney",
        ),
        *(
            "\\boxed{C}",
            "\\boxed{\\text{C}}",
            "\\boxed{(C)}",
            "\\boxed{C. kidney}",
            "\\boxed{kidney}",
            "\\boxed{c}",
        ),
        *(
            "The answer is C.",
            "the answer is **(C)**",
            "The correct option is C.",
            "Answer:\nC",
            "Answer: c) kidney",
        ),
        *("Answer: C because A is wrong", "Answer: C. A is wrong since", "\\boxed{A}, no: \\boxed{C}"),
        *(
            "<think>\\boxed{A}</think>C",
            "<answer>C</answer>",
            "<answer>Answer: (C)</answer>",
            "The answer is kidney.",
        ),
        *("The answer is \\(C\\).", "The answer is \u200fC\u200f.", "Answer: \u200bC", "My final choice: C"),
        *("\\boxed{\\boxed{C}}", "thought \\boxed{A}</think>\n\\boxed{C}", "<answer>\nC\n</answer>"),
        *("Answer: A\nWait.\nAnswer: C", "\\boxed{C}\n\nThe answer is clear."),
        *(
            '{"answer": "C"}',
            '```json\n{"why": "A is wrong", "final_answer": "C. kidney", "sure": 1}\n```',
            "【答案】C",
        ),
        *(
            "So I pick (C).",
            "It's C.",
            "Hence option C is the correct answer.",
            "C选项正确",
            "The answer to this question is C.",
        ),
        *(
            "C kidney",
            "**C** - kidney",
            "the kidney",
            "a kidney",
            "kidney (C)",
            "\\boxed{'C'}",
            "C<|im_end|>",
            "\x00Answer: C\x00",
        ),
    ],
)
def test_a_choice_is_found_in_every_usual_form(text):
    assert choice.extract(text, OPTIONS) == {"C"}


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("Answer: A, B, C", {"A", "B", "C"}),
        ("Both A and C", {"A", "C"}),
        ("(A) and (C)", {"A", "C"}),
        ("The correct options are A and C.", {"A", "C"}),
        ("\\boxed{ABC}", {"A", "B", "C"}),
        ("\\boxed{A, C}", {"A", "C"}),
        ("Answer: A and C are right", {"A", "C"}),
        ("Answer: D. A and B", {"D"}),
    ],
)
def test_several_letters_are_all_of_them(text, letters):
    assert choice.extract(text, OPTIONS) == letters


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Answer: Cat",
        "The answer is correct.",
        "Answer: I think so",
        "Answer: Z",
        "<think>Answer: C",
        "A. The heart is wrong\nB. So is the lung\nC. This one fits",
        "Option A is wrong; option C fits",
        "A. heart\nB. lung\nC. kidney\nD. A and B",
        "thought\nAnswer: A</think>",
        *(
            "A or C",
            "Answer: C or maybe B",
            "Answer: C? B?",
            "The answer is C and also D.",
            "Answer: either B or C",
        ),
        *(
            "\\boxed{B} or \\boxed{C}",
            "不选C",
            "The answer is not C.",
            "C is wrong.",
            "The answer is a dog",
            "<answer>C",
        ),
        *(
            "Answer: A dog",
            "Answer: A good guess is C",
            "A dog",
            "Vitamin C",
            "C++",
            "c'est la vie",
            "A kidney",
        ),
    ],
)
def test_what_states_no_choice_is_no_choice(text):
    assert choice.extract(text, OPTIONS) is None


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which?\nA. heart\nB. lung", {"A": "heart", "B": "lung"}),
        ("Which?\n(A) heart\n(B) lung\nAnswer with a letter.", {"A": "heart", "B": "lung"}),
        ("Which? A. 3; B. 4; C. 5", {"A": "3", "B": "4", "C": "5"}),
        ("Which?\nＡ．heart\nＢ．lung", {"A": "heart", "B": "lung"}),
        ("Which?\nChoices: A. heart\nB. lung\nAnswer with a letter.", {"A": "heart", "B": "lung"}),
        ("Which?\nA. both B. and C.\nB. none", {"A": "both B. and C.", "B": "none"}),
        ("I saw A. Then I left.", {}),
    ],
)
def test_options_are_read_from_the_question(question, options):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = Prompt(
        "row", ({"role": "system", "content": "A. no\nB. no"}, {"role": "user", "content": content})
    )
    assert choice.options_of(prompt) == options


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("14", "14"),
        ("so far so good\n14", "14"),
        ("The answer is 14.", "14."),
        ("Answer: St. Louis", "St. Louis"),
        ("\\boxed{\\text{Red}}", "Red"),
        ("\\boxed{14\\%}", "14%"),
        ("<answer> New York </answer>", "New York"),
        ("x" * 500, None),
    ],
)
def test_a_short_answer_is_stated_or_the_last_line(text, answer):
    assert short_answer(text) == answer


def test_folding_keeps_what_carries_mathematical_meaning():
    assert fold("（Ｃ）：１２ x² ½ − “a”") == '(C):12 x² ½ - "a"'


@pytest.mark.parametrize("piece", ["\\boxed{", "答案：", "A\u0301\u0316"])
def test_a_megabyte_of_anything_is_read_in_linear_time(piece):
    text = "\\boxed{" + piece * (10**6 // len(piece))
    for extract in (math.extract, math.extract_upstream, lambda text: choice.extract(text, OPTIONS)):
        start = time.process_time()
        extract(text)
        assert time.process_time() - start < 1.5  # about 0.3 s; quadratic work would take minutes
