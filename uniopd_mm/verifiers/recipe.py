r"""The reward of the OpenMMReasoner recipe, on which the paper's multimodal rewards and several lmms-eval tasks rest.

``uniopd`` and ``lmms_eval`` reproduce it (judge off), false positives included: nine tenths of a gold are taken for the
gold ("1000000000" for 10000000001), a word that starts with the gold's letter for the letter, and in ``lmms_eval`` the
first letter of a gold such as "Blue" for the gold.  ``strict`` asks the same kinds of questions and is right: letters are
read as choices only for a gold that is one letter, numbers with their units, mathematics as mathematics, words exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.verifiers import numeric
from uniopd_mm.verifiers.base import MAX_ANSWER_CHARS, NO_GOLD, Verifier, by_kind, gold_answers
from uniopd_mm.verifiers.choice import ChoiceVerifier
from uniopd_mm.verifiers.exact import ExactVerifier
from uniopd_mm.verifiers.math import MathVerifier
from uniopd_mm.verifiers.math_workers import MathWorkers, Verdict

if TYPE_CHECKING:
    from uniopd_mm.config import VerifierConfig

FORMAT_WEIGHT = 0.1
"""Share of the format in the recipe's total reward; the rest is accuracy."""
_LETTERS = "ABCDEFGH"
_PORTION = 0.9
_PHRASES = (
    "the answer", "answer", "correct answer", "the correct answer", "the best answer", "best answer", "the option is",
    "option is", "the correct option is", "correct option is", "the choice is", "choice is", "the correct choice is",
    "correct choice is", "i choose", "i select", "i pick", "my choice is", "my answer is",
)  # fmt: skip
_FORMS = ("({})", "{}.", "{}:", "{})", "{} ")
_WEAK_FORMS = ("{}-", "{}_", "{}=")
_NUMBER_AT_END = re.compile(r"\b\d+(?:\.\d+)?\Z")
_SYMBOLS = set("=+-*/()[]\\")

Equal = Callable[[str, str], bool]


@dataclass(frozen=True)
class Reward:
    """What the recipe makes of one response."""

    accuracy: float
    """1 or 0."""
    format: float
    """1, 0.8 or 0."""
    answer: str

    @property
    def total(self) -> float:
        return (1.0 - FORMAT_WEIGHT) * self.accuracy + FORMAT_WEIGHT * self.format


def extract(text: str) -> str:
    r"""The first ``<answer>``, else the last balanced ``\boxed{}``, else a number that ends a line; "" = none."""
    tag = _first_tag(text)
    if tag is not None:
        return tag
    if boxed := _last_boxed(text):
        return boxed
    for line in reversed(text.strip().split("\n")):
        line = line.rstrip()
        if match := _NUMBER_AT_END.search(line[:-1].rstrip() if line.endswith(".") else line):
            return match[0]
    return ""


def _first_tag(text: str) -> str | None:
    start = text.find("<answer>")
    end = text.find("</answer>", start + 8) if start >= 0 else -1
    return text[start + 8 : end] if end >= 0 else None


def _last_boxed(text: str) -> str:
    """Content of the balanced box that opens last, which may be empty."""
    opened: list[int | None] = []
    begin, end = 0, 0
    for token in re.finditer(r"\\boxed\{|[{}]", text):
        if token[0] != "}":
            opened.append(token.end() if len(token[0]) > 1 else None)
        elif opened and (start := opened.pop()) is not None and start > begin:
            begin, end = start, token.start()
    return text[begin:end]


def format_score(text: str, profile: str) -> float:
    """1 for thought and answer in their tags, or a box; 0.8 for a calculation that ends in an answer; else 0."""
    blocks = ("think", "analysis") if profile == "lmms_eval" else ("think",)
    if any(_is_tagged(text, name) for name in blocks) or _last_boxed(text):
        return 1.0
    return 0.8 if len(text.strip()) > 50 and not _SYMBOLS.isdisjoint(text) and extract(text) else 0.0


def _is_tagged(text: str, name: str) -> bool:
    """``<name>…</name>…<answer>…</answer>`` and nothing around it."""
    if not (text.startswith(f"<{name}>") and text.endswith("</answer>")):
        return False
    closed = text.find(f"</{name}>", len(name) + 2)
    opened = text.find("<answer>", closed + len(name) + 3) if closed >= 0 else -1
    return 0 <= opened <= len(text) - len("<answer></answer>")


def vote(answer: str) -> str:
    """The letter the recipe reads out of an answer; "" = none."""
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    if not answer.strip():
        return ""
    text = f" {text} "
    core = text.strip()
    if core[:1] in tuple(_LETTERS):
        return core[0]
    if core[-1:] in tuple(_LETTERS):
        return core[-1]
    numbered = {text.rfind(f"{i}. {letter}"): letter for i, letter in enumerate(_LETTERS, start=1)}
    if found := _first(numbered):
        return found
    lower = text.lower()
    starts = [lower.find(phrase) for phrase in _PHRASES if phrase in lower]
    if starts and (match := re.search("[A-H]", text[min(starts) :])):
        return match[0]
    for form in _FORMS:
        if found := _first({text.rfind(form.format(letter)): letter for letter in _LETTERS}):
            return found
    weak = {text.rfind(form.format(letter)): letter for form in _WEAK_FORMS for letter in _LETTERS}
    return _first(weak) or _first({text.rfind(letter): letter for letter in _LETTERS})


def _first(places: dict[int, str]) -> str:
    """The letter at the smallest index that is not -1."""
    found = [place for place in places if place >= 0]
    return places[min(found)] if found else ""


def _tidy(answer: str) -> str:
    return answer.removesuffix(".").strip()


def is_match(answer: str, gold: str, profile: str) -> bool:
    """What the recipe accepts without mathematics: the voted letter, or one string holding nine tenths of the other."""
    letter = vote(gold) if profile == "lmms_eval" else gold
    if letter and letter in tuple(_LETTERS):
        return vote(answer) == letter
    if answer in gold and len(answer) >= _PORTION * len(gold):
        return True
    return (gold in answer and len(gold) >= _PORTION * len(answer)) or answer.strip() == gold.strip()


def reward(text: str, gold: str, profile: str, equal: Equal) -> Reward:
    """The recipe's reward; ``equal(gold, answer)`` compares as mathematics where strings do not match."""
    answer, gold = _tidy(extract(text).strip()), _tidy(gold)
    accuracy = 0.0
    if answer or profile != "uniopd":
        accuracy = float(is_match(answer, gold, profile) or equal(gold, answer))
    return Reward(accuracy, format_score(text, profile), answer)


def strip_reasoning(text: str, tags: Sequence[tuple[str, str]] = (("<think>", "</think>"),)) -> str:
    """A response as lmms-eval shows it to its scorers: without closed blocks, or what follows a lone closing tag."""
    for start, end in tags:
        pieces, at = [], 0
        while (opened := text.find(start, at)) >= 0 and (closed := text.find(end, opened)) >= 0:
            pieces.append(text[at:opened])
            at = closed + len(end)
        text = "".join([*pieces, text[at:]])
        if end in text and start not in text:
            text = text.rsplit(end, 1)[-1]
    return text.strip()


class RecipeVerifier(Verifier):
    """The recipe; the outcome's score is its accuracy, and the reason of an upstream profile names format and total."""

    profiles = ("strict", "uniopd", "lmms_eval")

    def __init__(self, config: VerifierConfig, profile: str | None = None) -> None:
        super().__init__(config, profile)
        self.strict = {
            "choice": ChoiceVerifier(config),
            "numeric": numeric.NumericVerifier(config),
            "math": MathVerifier(config),
            "exact": ExactVerifier(config),
        }
        self.workers = MathWorkers(config.workers, config.timeout_s, boxed=False)
        self._cache: dict[tuple[str, str], Verdict] = {}

    def verify(self, prompt: Prompt, text: str) -> Outcome:
        return self.verify_many([(prompt, text)])[0]

    def verify_many(self, items: Sequence[tuple[Prompt, str]]) -> list[Outcome]:
        if self.profile == "strict":
            judges = {kind: verifier.verify_many for kind, verifier in self.strict.items()}
            return by_kind(items, lambda item: _kind(item[0]), judges)
        self._compare([pair for prompt, text in items for pair in self._open(prompt, text)])
        outcomes = [self._upstream(prompt, text) for prompt, text in items]
        self._cache.clear()
        return outcomes

    def check_golds(self, prompts: Sequence[Prompt]) -> list[str | None]:
        if self.profile != "strict":
            return super().check_golds(prompts)
        return by_kind(prompts, _kind, {kind: verifier.check_golds for kind, verifier in self.strict.items()})

    def close(self) -> None:
        self.workers.close()
        for verifier in self.strict.values():
            verifier.close()

    def _open(self, prompt: Prompt, text: str) -> list[tuple[str, str]]:
        """(gold, answer) pairs that strings do not decide."""
        pairs: list[tuple[str, str]] = []

        def note(gold: str, answer: str) -> bool:
            if max(len(gold), len(answer)) <= MAX_ANSWER_CHARS:
                pairs.append((gold, answer))
            return False

        for gold in gold_answers(prompt):
            reward(text, gold, self.profile, note)
        return pairs

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> None:
        asked = list(dict.fromkeys(pairs))
        self._cache = dict(zip(asked, self.workers.compare(asked), strict=True))

    def _upstream(self, prompt: Prompt, text: str) -> Outcome:
        golds = gold_answers(prompt)
        if not golds:
            return Outcome(None, reason=NO_GOLD)
        unknown: list[str] = []

        def equal(gold: str, answer: str) -> bool:
            verdict = self._cache.get((gold, answer), Verdict(True, False))
            if verdict.equal is None:
                unknown.append(verdict.reason)
            return bool(verdict.equal)

        rewards = [reward(text, gold, self.profile, equal) for gold in golds]
        best = max(rewards, key=lambda reward: reward.accuracy)
        extracted = best.answer[:MAX_ANSWER_CHARS] or None
        if unknown and not best.accuracy:
            return Outcome(None, extracted=extracted, reason=unknown[0])
        reason = f"format {best.format:g}, total {best.total:g}"
        return Outcome(best.accuracy == 1.0, score=best.accuracy, extracted=extracted, reason=reason)


def _kind(prompt: Prompt) -> str:
    """What a gold asks for: a letter, a number (with its unit), mathematics, or words."""
    golds = gold_answers(prompt)
    if golds and all(re.fullmatch("[A-H]", gold) for gold in golds):
        return "choice"
    quantities = [numeric.parse(gold) for gold in golds]
    if golds and all(quantity and quantity.is_measured for quantity in quantities):
        return "numeric"
    is_math = any(re.search(r"[\\^=]|\d\s*[-+*/]\s*\d|^[\[({].*,.*[\])}]$", gold) for gold in golds)
    return "math" if is_math else "exact"
