"""Document questions: ANLS, the average normalised Levenshtein similarity to the nearest gold answer.

``strict`` measures similarity on normalised strings and calls an answer correct from 0.8 on, and only if it holds the
gold's numbers and each of its words, long ones but for a typo ("2015" is 0.75 similar to 2014, "$5 million" 0.9 to $5 billion).  ``upstream`` and ``upstream_vlmevalkit`` give the scores of
lmms-eval's and VLMEvalKit's scorers; both keep a similarity of 0.5 or more.
"""

from __future__ import annotations

import re
from dataclasses import replace

from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.verifiers.base import DIFFERS, Verifier, gold_answers
from uniopd_mm.verifiers.exact import normalize
from uniopd_mm.verifiers.extract import short_answer

CUTOFF = 0.5
"""Similarities below it score 0."""
_STRICT_CORRECT = 0.8
_LONG_WORD = 5
"""Letters from which on a word may have a typo."""
_IGNORED = frozenset(("the", "a", "an", "of", "mr", "mrs", "ms", "dr", "prof"))
_DISTINCT = frozenset((
    "million", "billion", "trillion", "increase", "decrease", "increased", "decreased", "northern", "southern", "eastern",
    "western", "include", "exclude", "included", "excluded", "internal", "external", "import", "export", "imports", "exports",
))  # fmt: skip
"""Words that resemble others and are none of their typos."""


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that turn one string into the other; O(len(a) * len(b)) time."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def score(answer: str, gold: str, profile: str = "strict") -> float:
    """ANLS of one answer and one gold in [0, 1]; 0 below the cutoff."""
    if profile == "strict":
        return _similarity(_ungrouped(answer), _ungrouped(gold))
    found, wanted = " ".join(answer.strip().lower().split()), " ".join(gold.strip().lower().split())
    # Both scorers divide by the length before spaces are collapsed, in capitals (of which "ß" and "ﬁ" have two).
    return _similarity(found, wanted, longest=max(len(answer.upper()), len(gold.upper())))


def _similarity(a: str, b: str, longest: int | None = None) -> float:
    longest = max(len(a), len(b)) if longest is None else longest
    if longest == 0:
        return 1.0
    # The distance is at least the difference in length, so long answers to short questions cost nothing.
    if 1 - abs(len(a) - len(b)) / longest < CUTOFF:
        return 0.0
    similarity = 1 - levenshtein(a, b) / longest
    return similarity if similarity >= CUTOFF else 0.0


def _ungrouped(text: str) -> str:
    """Normalised, without separators of thousands."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", normalize(text))


def _is_same(answer: str, gold: str) -> bool:
    """Similar, with the same numbers, and word for word the same but for typos in long words."""
    answer, gold = _ungrouped(answer), _ungrouped(gold)
    if _similarity(answer, gold) < _STRICT_CORRECT or _numbers(answer) != _numbers(gold):
        return False
    words = [re.findall(r"[^\W\d_]+", text) for text in (answer, gold)]
    if "".join(words[0]) == "".join(words[1]):  # "USA" and "U.S.A."
        return True
    found, wanted = ([word for word in side if word not in _IGNORED] for side in words)
    if len(found) != len(wanted):
        return False
    return all(a == b or _is_typo(a, b) for a, b in zip(found, wanted, strict=True))


def _is_typo(a: str, b: str) -> bool:
    return (
        max(len(a), len(b)) >= _LONG_WORD
        and _DISTINCT.isdisjoint((a, b))
        and _similarity(a, b) >= _STRICT_CORRECT
    )


def _numbers(text: str) -> list[str]:
    """The numbers in a text; the day 03 is the day 3."""
    return [re.sub(r"^0(?=\d$)", "", number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


class DocumentVerifier(Verifier):
    """ANLS; the outcome's score is graded."""

    profiles = ("strict", "upstream", "upstream_vlmevalkit")
    threshold = CUTOFF

    def extract(self, prompt: Prompt, text: str) -> str | None:
        return short_answer(text) if self.profile == "strict" else text

    def score(self, answer: str, gold: str, prompt: Prompt | None = None) -> float:
        return score(answer, gold, self.profile)

    def verify(self, prompt: Prompt, text: str) -> Outcome:
        outcome = super().verify(prompt, text)
        if self.profile != "strict" or not outcome.correct:
            return outcome
        answer = outcome.extracted or ""
        right = any(_is_same(answer, gold) for gold in gold_answers(prompt))
        return outcome if right else replace(outcome, correct=False, reason=f"{outcome.reason}, {DIFFERS}")
