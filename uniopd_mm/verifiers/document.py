"""Document questions: ANLS, the average normalised Levenshtein similarity to the nearest gold answer.

``strict`` measures similarity on normalised strings and calls an answer correct from 0.8 on, and only if it holds the
gold's numbers ("2015" is 0.75 similar to "2014").  ``upstream`` and ``upstream_vlmevalkit`` give the scores of
lmms-eval's and VLMEvalKit's scorers; both keep a similarity of 0.5 or more.
"""

from __future__ import annotations

import re

from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.verifiers.base import Verifier, gold_answers
from uniopd_mm.verifiers.exact import normalize
from uniopd_mm.verifiers.extract import short_answer

CUTOFF = 0.5
"""Similarities below it score 0."""
_STRICT_CORRECT = 0.8


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
        return _similarity(normalize(answer), normalize(gold))
    found, wanted = " ".join(answer.strip().lower().split()), " ".join(gold.strip().lower().split())
    if profile == "upstream_vlmevalkit":
        return _similarity(found, wanted)
    # lmms-eval divides by the length before spaces are collapsed.
    return _similarity(found, wanted, longest=max(len(answer), len(gold)))


def _similarity(a: str, b: str, longest: int | None = None) -> float:
    longest = max(len(a), len(b)) if longest is None else longest
    if longest == 0:
        return 1.0
    # The distance is at least the difference in length, so long answers to short questions cost nothing.
    if 1 - abs(len(a) - len(b)) / longest < CUTOFF:
        return 0.0
    similarity = 1 - levenshtein(a, b) / longest
    return similarity if similarity >= CUTOFF else 0.0


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))


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
        right = any(
            self.score(answer, gold) >= _STRICT_CORRECT
            and _numbers(normalize(answer)) == _numbers(normalize(gold))
            for gold in gold_answers(prompt)
        )
        return Outcome(right, score=outcome.score, extracted=outcome.extracted)
