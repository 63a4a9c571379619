"""WeMath answers: one letter.  ``strict`` is the choice verifier; ``upstream`` is the benchmark's own reading of a response.

Upstream looks at the first character after the last "Answer" once ``<>:.`` are gone: "Answer: (C)" and "The answer is C"
are wrong, "Answer: Cat" is C.  Its four dimensions are in ``metrics.wemath_scores``.
"""

from __future__ import annotations

import re

from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers.choice import ChoiceVerifier


def upstream_letter(text: str) -> str | None:
    """The letter A-H that upstream reads; None = none."""
    answer = re.sub("[<>:.]", "", text.rsplit("Answer", 1)[-1].strip()).strip()
    return answer[0] if answer[:1] in tuple("ABCDEFGH") else None


def score(answer: str, gold: str, profile: str = "upstream") -> float:
    """1 if the whole response is right by the upstream profile, else 0."""
    return float(upstream_letter(answer) == gold)


class WeMathVerifier(ChoiceVerifier):
    """One letter."""

    profiles = ("strict", "upstream")

    def score(self, answer: str, gold: str, prompt: Prompt) -> float:
        return super().score(answer, gold, prompt) if self.profile == "strict" else score(answer, gold)
