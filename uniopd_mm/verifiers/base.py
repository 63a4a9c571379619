"""What a verifier is, and the registry that finds one by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

from uniopd_mm.errors import ConfigError, UniOPDError
from uniopd_mm.rollout import Outcome, Prompt

if TYPE_CHECKING:
    from uniopd_mm.config import VerifierConfig

MAX_ANSWER_CHARS = 2000
"""An extracted answer longer than this is not an answer."""

NO_ANSWER = "no answer found"
NO_GOLD = "no gold answer"
AGREES = "agrees with the gold"
DIFFERS = "differs from the gold"

Item = TypeVar("Item")
Result = TypeVar("Result")


class VerifierError(UniOPDError, RuntimeError):
    """A verifier that cannot run here at all (a missing package, a worker that does not start)."""


class Verifier:
    """Judges one response against the gold answer(s) of its prompt.

    Subclasses give ``extract`` and ``score`` (or override ``verify``).  Model output never makes ``verify`` raise, and
    what could not be decided (timeout, judge down, no gold) is ``correct=None``, never incorrect.  With several golds
    the best one counts.
    """

    profiles: ClassVar[tuple[str, ...]] = ("strict",)
    """Scoring profiles; ``name:profile`` in the settings picks one, the first is the default."""
    threshold: ClassVar[float] = 1.0
    """Lowest score that counts as correct."""

    def __init__(self, config: VerifierConfig, profile: str | None = None) -> None:
        self.config = config
        self.profile = profile or self.profiles[0]
        if self.profile not in self.profiles:
            raise ConfigError(
                f"{type(self).__name__} has no profile '{self.profile}'.{_suggest(self.profile, self.profiles)}"
            )

    def extract(self, prompt: Prompt, text: str) -> str | None:
        """The answer given in a response; None = it gives none."""
        raise NotImplementedError

    def score(self, answer: str, gold: str, prompt: Prompt) -> float:
        """Score in [0, 1] of one answer against one gold answer."""
        raise NotImplementedError

    def verify(self, prompt: Prompt, text: str) -> Outcome:
        """Outcome of one response."""
        problem = self.check_gold(prompt)
        if problem is not None:
            return Outcome(None, reason=problem)
        answer = self.extract(prompt, text)
        if answer is None:
            return Outcome(False, score=0.0, reason=NO_ANSWER)
        score = max(self.score(answer, gold, prompt) for gold in gold_answers(prompt))
        return outcome_of(score, answer, self.threshold)

    def verify_many(self, items: Sequence[tuple[Prompt, str]]) -> list[Outcome]:
        """Outcomes of many responses, in order; override where they can be judged side by side."""
        return [self.verify(prompt, text) for prompt, text in items]

    def check_golds(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """For each prompt why its gold answer cannot be used; None = it can."""
        return [None if gold_answers(prompt) else NO_GOLD for prompt in prompts]

    def check_gold(self, prompt: Prompt) -> str | None:
        """``check_golds`` of one prompt."""
        return self.check_golds([prompt])[0]

    def close(self) -> None:
        """Free what the verifier holds (worker processes, connections); it may be used again afterwards."""


def outcome_of(score: float, answer: str, threshold: float = 1.0) -> Outcome:
    """Outcome of an answer with a score in [0, 1]."""
    right = score >= threshold
    reason = (AGREES if right else DIFFERS) if score in (0.0, 1.0) else f"similarity {score:.2f}"
    return Outcome(right, score=score, extracted=answer[:MAX_ANSWER_CHARS], reason=reason)


def by_kind(
    items: Sequence[Item],
    kind_of: Callable[[Item], str],
    judges: Mapping[str, Callable[[list[Item]], Sequence[Result]]],
) -> list[Result]:
    """Results in the order of the items, each from the judge of its kind; every judge sees all of its items at once."""
    rows: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        rows.setdefault(kind_of(item), []).append(i)
    results: dict[int, Result] = {}
    for kind, indices in rows.items():
        results |= zip(indices, judges[kind]([items[i] for i in indices]), strict=True)
    return [results[i] for i in range(len(items))]


def gold_answers(prompt: Prompt) -> list[str]:
    """The non-empty gold answers of a prompt, each acceptable on its own."""
    answers = prompt.answer if isinstance(prompt.answer, list) else [prompt.answer]
    return [text for answer in answers if answer is not None and (text := str(answer).strip())]


_BUILTIN = {
    "math": "uniopd_mm.verifiers.math:MathVerifier",
    "choice": "uniopd_mm.verifiers.choice:ChoiceVerifier",
    "chart": "uniopd_mm.verifiers.chart:ChartVerifier",
    "document": "uniopd_mm.verifiers.document:DocumentVerifier",
    "exact": "uniopd_mm.verifiers.exact:ExactVerifier",
    "code": "uniopd_mm.verifiers.code:CodeVerifier",
    "numeric": "uniopd_mm.verifiers.numeric:NumericVerifier",
    "mathvision": "uniopd_mm.verifiers.mathvision:MathVisionVerifier",
    "dynamath": "uniopd_mm.verifiers.dynamath:DynaMathVerifier",
    "wemath": "uniopd_mm.verifiers.wemath:WeMathVerifier",
    "logicvista": "uniopd_mm.verifiers.logicvista:LogicVistaVerifier",
    "recipe": "uniopd_mm.verifiers.recipe:RecipeVerifier",
    "lmms_eval": "uniopd_mm.verifiers.lmms_eval:LmmsEvalVerifier",
    "judge": "uniopd_mm.verifiers.judge:JudgeVerifier",
}
_REGISTERED: dict[str, type[Verifier]] = {}

V = TypeVar("V", bound=type[Verifier])


def register_verifier(name: str) -> Callable[[V], V]:
    """Class decorator: make a :class:`Verifier` available as ``verifier: name`` in rows and settings."""

    def register(cls: V) -> V:
        known = _REGISTERED.get(name)
        same = known is not None and (known.__module__, known.__qualname__) == (
            cls.__module__,
            cls.__qualname__,
        )
        if name in _BUILTIN or (known is not None and not same) or ":" in name:
            raise ConfigError(
                f"verifier name '{name}' is taken or has a ':'; register {cls.__name__} under another"
            )
        _REGISTERED[name] = cls
        return cls

    return register


def verifier_names() -> list[str]:
    """Every name that ``verifier:`` may have, scoring profiles (``chart:upstream``) included."""
    names = []
    for base in [*_BUILTIN, *_REGISTERED]:
        names += [base, *(f"{base}:{profile}" for profile in _verifier_class(base).profiles)]
    return names


def get_verifier(name: str, config: VerifierConfig | None = None) -> Verifier:
    """A new verifier by name, ``math``, or by name and scoring profile, ``chart:upstream``; close it after use."""
    from uniopd_mm.config import VerifierConfig

    base, _, profile = name.partition(":")
    return _verifier_class(base)(config or VerifierConfig(), profile or None)


def _verifier_class(name: str) -> type[Verifier]:
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _BUILTIN:
        raise ConfigError(f"Unknown verifier '{name}'.{_suggest(name, [*_BUILTIN, *_REGISTERED])}")
    module, _, attribute = _BUILTIN[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."
