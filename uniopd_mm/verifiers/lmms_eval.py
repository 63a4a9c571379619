"""What lmms-eval's command line prints for a response: reasoning blocks go first, then the task's own scorer judges.

The ``upstream…`` profiles of the other verifiers are those scorers alone, given the string as it is.  Golds are compared
as they stand in the row, their spaces included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.verifiers import chart, choice, document, mathvision
from uniopd_mm.verifiers.base import NO_GOLD, Verifier, gold_answers, outcome_of
from uniopd_mm.verifiers.recipe import RecipeVerifier, extract, strip_reasoning

if TYPE_CHECKING:
    from uniopd_mm.config import VerifierConfig

TAGS = (("<think>", "</think>"), ("<analysis>", "</analysis>"))
"""What ``--reasoning_tags`` is unless given."""


def response(text: str) -> str:
    """The response that a scorer sees."""
    return strip_reasoning(text, TAGS)


def _ai2d_response(text: str) -> str:
    """The task's filter sees the reasoning too."""
    return response(choice.ai2d_filter(text))


def _reasoned(text: str) -> str:
    return extract(response(text)).strip()


def _mathvision(answer: str, gold: str, prompt: Prompt) -> float:
    return mathvision.score(answer, gold, "upstream", list(choice.options_of(prompt).values()))


_TASKS: dict[str, tuple[Callable[[str], str], Callable[[str, str, Prompt], float], float]] = {
    "ai2d": (_ai2d_response, lambda answer, gold, _: choice.ai2d(answer, gold), 1.0),
    "chartqa": (response, lambda answer, gold, _: chart.score(answer, gold, "upstream"), 1.0),
    "docvqa": (response, lambda answer, gold, _: document.score(answer, gold, "upstream"), document.CUTOFF),
    "docvqa_reasoning": (
        _reasoned,
        lambda answer, gold, _: document.score(answer, gold, "upstream"),
        document.CUTOFF,
    ),
    "mathvision": (response, _mathvision, 1.0),
    "visulogic": (response, lambda answer, gold, _: choice.score(answer, gold, "upstream_visulogic"), 1.0),
}
"""Per task what it takes for the answer, how it scores one gold, and the lowest score that counts as correct here."""


class LmmsEvalVerifier(Verifier):
    """One of lmms-eval's tasks; ``reasoning`` is the recipe that most ``*_reasoning`` tasks use."""

    profiles = ("reasoning", *_TASKS)

    def __init__(self, config: VerifierConfig, profile: str | None = None) -> None:
        super().__init__(config, profile)
        self.recipe = RecipeVerifier(config, "lmms_eval")

    def verify(self, prompt: Prompt, text: str) -> Outcome:
        return self.verify_many([(prompt, text)])[0]

    def verify_many(self, items: Sequence[tuple[Prompt, str]]) -> list[Outcome]:
        if self.profile == "reasoning":
            return self.recipe.verify_many([(prompt, response(text)) for prompt, text in items])
        return [self._judge(prompt, text) for prompt, text in items]

    def close(self) -> None:
        self.recipe.close()

    def _judge(self, prompt: Prompt, text: str) -> Outcome:
        if not gold_answers(prompt):
            return Outcome(None, reason=NO_GOLD)
        golds = prompt.answer if isinstance(prompt.answer, list) else [prompt.answer]
        extract_answer, score, threshold = _TASKS[self.profile]
        answer = extract_answer(text)
        best = max(score(answer, str(gold), prompt) for gold in golds if gold is not None)
        return outcome_of(best, answer, threshold)
