"""LogicVista answers: a set of letters.

``strict`` wants exactly the gold's letters, in any order.  ``upstream`` (VLMEvalKit) lets a language model name the
letters and compares what it says letter by letter: anything but capitals is no answer, "AA" is not A.  The profile
takes our extraction in that model's place ("Z" where there is none).
"""

from __future__ import annotations

from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers.choice import ChoiceVerifier, extract, options_of

NO_CHOICE = "Z"


def score(answer: str, gold: str, profile: str = "upstream") -> float:
    """1 if the letters that a judge extracted ("AB") are those of the gold ("A, B"), else 0."""
    if not (answer.isalpha() and answer.isupper()):
        return 0.0
    return float("".join(sorted(answer.lower())) == "".join(sorted(gold.lower().split(", "))))


class LogicVistaVerifier(ChoiceVerifier):
    """A set of letters."""

    profiles = ("strict", "upstream")

    def extract(self, prompt: Prompt, text: str) -> str | None:
        if self.profile == "strict":
            return super().extract(prompt, text)
        return "".join(sorted(extract(text, options_of(prompt)) or NO_CHOICE))

    def score(self, answer: str, gold: str, prompt: Prompt) -> float:
        return super().score(answer, gold, prompt) if self.profile == "strict" else score(answer, gold)
