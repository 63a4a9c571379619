r"""DynaMath answers: a number to three decimals, a letter, or words; the gold tells which.

``strict`` reads the answer wherever a response states it, in JSON ("short answer") too; numbers may differ by 0.001,
letters and words not at all.  ``upstream`` is VLMEvalKit's rule without its language model: it wants the JSON, rejects
"1,200" and "1/2", and takes any part of a worded gold, even an empty one, for the gold.  lmms-eval's task is the recipe
(``lmms_eval:reasoning``).
"""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from typing import Literal

from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers import choice, exact, numeric
from uniopd_mm.verifiers.base import MAX_ANSWER_CHARS, Verifier, gold_answers
from uniopd_mm.verifiers.extract import fold, plain, sentence, short_answer, visible
from uniopd_mm.verifiers.latex_number import exact as latex_value
from uniopd_mm.verifiers.math import tidy

AnswerType = Literal["float", "multiple choice", "text"]
TOLERANCE = 0.001
_SLACK = 1e-9
"""3.143 - 3.142 is a little more than 0.001 in binary."""
_MAX_MARKS = 20
_SHORT = re.compile(r'"short answer"\s{0,9}:\s{0,9}(?:"((?:[^"\\]|\\.){0,4000})"|(-?[\d.]{1,40}))')


def answer_type(gold: str) -> AnswerType:
    """What kind of answer a gold is, for rows that do not say so."""
    if re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,3})?", gold.strip(), re.ASCII | re.IGNORECASE):
        return "float"
    return "multiple choice" if re.fullmatch("[A-H]", gold.strip()) else "text"


def score(answer: str, gold: str, profile: str = "upstream", kind: AnswerType | None = None) -> float:
    """1 if the whole response is right by VLMEvalKit's rule, else 0."""
    kind = kind or answer_type(gold)
    text = answer
    if 0 <= text.find("{") < text.rfind("}"):
        text = text[text.find("{") : text.rfind("}") + 1]
    text = text.replace("\\", "")
    found = _parsed(_json_answer(text), kind)
    found = _parsed(text, kind) if found is None else found
    if found is None:  # here the upstream asks a language model
        return float(kind == "multiple choice" and gold in text[:3].upper())
    if not isinstance(found, str):
        return float(abs(found - float(gold)) <= TOLERANCE)
    return float(found == gold if kind == "multiple choice" else found.lower() in gold.lower())


def _json_answer(text: str) -> str | None:
    try:
        answer = json.loads(text, strict=False).get("short answer")
    except (ValueError, AttributeError, RecursionError):
        return None
    return answer if isinstance(answer, str) else None


def _parsed(answer: str | None, kind: AnswerType) -> str | float | None:
    """The answer as its type, None when it is not one."""
    if answer is None or kind == "text":
        return answer
    if kind == "multiple choice":
        if len(answer) == 1:
            return answer.upper()
        letters = [letter for letter in "ABCDE" if letter in answer.upper()]
        return letters[0] if len(letters) == 1 else None
    head = answer.split(" ")[0][:MAX_ANSWER_CHARS]
    try:
        return float(head.split("π")[0]) * math.pi if "π" in head else float(head)
    except ValueError:
        return None


def _stated_in_json(text: str) -> str | None:
    """The last "short answer" of a text that may hold JSON anywhere."""
    at = len(text)
    for _ in range(_MAX_MARKS):
        at = text.rfind('"short answer"', 0, at)
        if at < 0:
            return None
        if match := _SHORT.match(text, at):
            return match[1] if match[1] is not None else match[2]
    return None


def value_of(answer: str) -> float | Fraction | None:
    """The number an answer is: a quantity, an expression, or a multiple of pi."""
    quantity = numeric.parse(answer)
    if quantity is not None:
        return quantity.value
    expression = tidy(answer).replace("π", "\\pi ").replace("\\%", "").lower()
    expression = re.sub(r"^[a-z]\s?=|\^\s?\{?\\circ\}?|\\,|(?<=\d),(?=\d{3})", "", expression)
    expression = re.sub(r"\\text\s?\{[^{}]*\}", "", expression)
    return latex_value(re.sub(r"\s*(?<![\\a-z])[a-z]+(?:\^?[23])?$", "", expression))


class DynaMathVerifier(Verifier):
    """A number to three decimals, a letter, or words."""

    profiles = ("strict", "upstream")

    def extract(self, prompt: Prompt, text: str) -> str | None:
        if self.profile != "strict":
            return text
        shown = visible(text)
        stated = _stated_in_json(shown)
        if all(answer_type(gold) == "multiple choice" for gold in gold_answers(prompt)):
            letters = choice.extract(stated if stated is not None else text, choice.options_of(prompt))
            return ", ".join(sorted(letters)) if letters else None
        answer = plain(stated.replace("\\\\", "\\")) if stated is not None else short_answer(text)
        if answer and value_of(answer) is None and value_of(sentence(answer)) is not None:
            return sentence(answer)
        return answer or None

    def score(self, answer: str, gold: str, prompt: Prompt) -> float:
        if self.profile != "strict":
            return score(answer, gold)
        kind = answer_type(gold)
        if kind == "float":
            value = value_of(fold(answer))
            # Exactly: an answer such as 10^{400} is no float.
            return float(value is not None and abs(Fraction(value) - Fraction(gold)) <= TOLERANCE + _SLACK)
        if kind == "multiple choice":
            return choice.score(answer, gold)
        return float(exact.normalize(answer) == exact.normalize(gold))
