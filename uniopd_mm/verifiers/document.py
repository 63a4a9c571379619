"""Document questions: ANLS, the average normalised Levenshtein similarity to the nearest gold answer.

``strict`` measures similarity on normalised strings, and calls an answer correct that has the gold's numbers and words
in order, long ones but for one missing letter: "2015" is 0.75 similar to 2014, "$5 million" 0.9 to $5 billion, and
neither is correct.  ``upstream`` and ``upstream_vlmevalkit`` give the scores of lmms-eval's and VLMEvalKit's scorers;
both keep a similarity of 0.5 or more.
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
_LONG_WORD = 5
"""Letters from which on a word may miss one."""
_IGNORED = frozenset(("the", "an", "mr", "mrs", "ms"))
_TOKEN = re.compile(r"((?:(?<![\w)])-)?\d+(?:\.\d+)?)|[^\W\d_]+|[%€£¥]")


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that turn one string into the other; O(len(a) * len(b)) time."""
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
    """The same numbers and words in the same order; a long word may miss a letter that is not its first."""
    found, wanted = _tokens(answer), _tokens(gold)
    if "".join(found) == "".join(wanted):  # "USA" and "U.S.A."
        return True
    return len(found) == len(wanted) and all(map(_is_same_word, found, wanted))


def _tokens(text: str) -> list[str]:
    """Numbers between spaces, words, percent and currency signs; the day 03 is the day 3."""
    text = re.sub(r"(?<![\d.])0(?=\d(?!\d))", "", _ungrouped(text))
    return [
        f" {token[1]} " if token[1] else token[0]
        for token in _TOKEN.finditer(text)
        if token[0] not in _IGNORED
    ]


def _is_same_word(a: str, b: str) -> bool:
    if a == b:
        return True
    is_long = max(len(a), len(b)) >= _LONG_WORD and a[0] == b[0] and (a + b).isalpha()
    return is_long and abs(len(a) - len(b)) == 1 == levenshtein(a, b)


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
