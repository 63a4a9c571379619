"""Normalised string equality."""

from __future__ import annotations

import unicodedata

from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers.base import MAX_ANSWER_CHARS, Verifier
from uniopd_mm.verifiers.extract import fold, plain, short_answer

_EDGE = " \t\n,;:\"'`()[]{}。「」"


def normalize(answer: str) -> str:
    """Case, spacing, width of characters, a leading "the", LaTeX text markup and punctuation around do not matter."""
    answer = plain(unicodedata.normalize("NFC", fold(answer[:MAX_ANSWER_CHARS]))).casefold()
    answer = _trim(answer) or answer
    return answer.removeprefix("the ").lstrip() or answer


def _trim(answer: str) -> str:
    """Without punctuation at its ends, but ".5" keeps its point and "5!" its factorial."""
    answer = answer.strip(_EDGE).rstrip(_EDGE + ".")
    words = answer.rstrip("!?" + _EDGE + ".")
    answer = words if words and words[-1].isalpha() else answer
    start = len(answer) - len(answer.lstrip(_EDGE + "."))
    if answer[start : start + 1].isdigit() and answer[:start].endswith("."):
        start -= 1
    return answer[start:]


class ExactVerifier(Verifier):
    """Correct when the normalised answer equals a normalised gold answer."""

    def extract(self, prompt: Prompt, text: str) -> str | None:
        return short_answer(text)

    def score(self, answer: str, gold: str, prompt: Prompt | None = None) -> float:
        return float(normalize(answer) == normalize(gold))
