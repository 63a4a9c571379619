r"""Mathematical answers: equality as math-verify judges it, in killable worker processes.

``strict`` looks for the answer in the visible text (see ``extract``), tidies notation that math-verify cannot read,
rejects what it is too lenient with (other units, "5 or 6", "2x = 5" for 5) and compares.  ``upstream`` takes the last
``\boxed{}`` of the whole response as it stands, as the text-math benchmarks do.

A comparison that runs out of time or memory is unknown, though often the answer's fault: nothing tells a bomb from a right
answer in a form that is hard to compare.  It scores nothing, and calibration leaves it out.
"""

from __future__ import annotations

import re
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING

from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.verifiers import numeric
from uniopd_mm.verifiers.base import (
    AGREES,
    DIFFERS,
    MAX_ANSWER_CHARS,
    NO_ANSWER,
    NO_GOLD,
    Verifier,
    gold_answers,
)
from uniopd_mm.verifiers.extract import (
    DELIMITERS,
    candidates,
    fold,
    last_boxed,
    lone_line,
    plain,
    sentence,
    visible,
)
from uniopd_mm.verifiers.math_workers import MathWorkers, Verdict

if TYPE_CHECKING:
    from uniopd_mm.config import VerifierConfig

CACHE_SIZE = 20_000

# math-verify agrees with comparing these as numbers; beyond 15 digits it rounds.
_PLAIN = re.compile(r"-?\d{1,12}(?:\.\d{1,5})?", re.ASCII)
_GROUPED = re.compile(r"-?\d{1,3}(?:(?:\\[,;:! ]|[ _])\d{3})+(?:\.\d+)?", re.ASCII)
_SCIENTIFIC = re.compile(r"(-?\d+(?:\.\d+)?)[eE]([-+]?\d{1,4})", re.ASCII)
_SYMBOLS = {
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "∪": r"\cup ",
    "∅": r"\emptyset ",
}
_RELATION = re.compile(r"\s*(<|>|\\(?:le|ge|leq|geq|lt|gt|leqslant|geqslant)(?![a-zA-Z]))\s*")
_OR = re.compile(
    r"(?:\\quad|\s){0,9}(?:\\(?:text|mbox|mathrm)\s?\{\s?or\s?\}|\\lor\b|\bor\b|\\cup\b)(?:\\quad|\s){0,9}"
)
_WORDS = re.compile(r"[A-Za-z][a-z]|[一-鿿]")
_ONE_SIDED = re.compile(rf"\\(?:neq?|not)(?![a-zA-Z])|{_RELATION.pattern}")
_NAME = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])(?:_\{?\w+\}?)?(?:\^\{-1\})?(?:\(.*?\))?")
_OPERATION = re.compile(r"[\d^|/+*!-]|\\(?:sqrt|[dt]?frac|cdot|times|left)")
_ASSIGNMENTS = re.compile(r"\s*(?:[,;]|\\text\s?\{\s?and\s?\}|\band\b)(?:\\\W|\\quad|\s)*(?=[a-z]\s*=)")
_FUNCTION = re.compile(r"(?<![\\A-Za-z])(ln|log|sin|cos|tan|pi)(?![a-zA-Z])")
_BUILDER = re.compile(
    r"(?:\\left)?\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\s?\{?R\}?\s*)?(?:\\mid|\||:)(.*?)(?:\\right)?\\\}"
)
_BASED = re.compile(r"([0-9A-F]+)_\{?\(?(\d+)\)?\}?")
_COMMAND = re.compile(r"\\[a-zA-Z]+|sqrt")
_ROOT = re.compile(r"√\s?(\d+|[A-Za-z])")
_RAISED = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+)|([₀₁₂₃₄₅₆₇₈₉]+)|([½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])")


def tidy(answer: str) -> str:
    """An answer in notation math-verify reads: x² -> x^{2}, √2, ½, 1 000, 1.03e2; no dollars, no full stop at the end."""
    answer = _bare(fold(answer))
    for left, right in DELIMITERS:
        if len(answer) > len(left + right) and answer.startswith(left) and answer.endswith(right):
            answer = _bare(answer[len(left) : -len(right)])
    answer = answer.removeprefix("\\displaystyle").replace("\\varnothing", "\\emptyset").lstrip()
    if _GROUPED.fullmatch(answer):
        return re.sub(r"\\[,;:! ]|[ _]", "", answer)
    if match := _SCIENTIFIC.fullmatch(answer):
        return rf"{match[1]}\cdot 10^{{{int(match[2])}}}"
    if not answer.isascii():
        answer = _ROOT.sub(r"\\sqrt{\1}", _RAISED.sub(_raised, answer))
        answer = "".join(_SYMBOLS.get(char, char) for char in answer)
    return _sorted_assignments(_as_interval(_FUNCTION.sub(r"\\\1", answer)))


def _sorted_assignments(answer: str) -> str:
    """``y=2, x=1`` as ``x=1, y=2``: math-verify compares its values with those of (1, 2) in order."""
    parts = _ASSIGNMENTS.split(answer)
    is_named = all(re.match(r"[a-z]\s*=", part) for part in parts)
    return ", ".join(sorted(parts)) if is_named and len({part[0] for part in parts}) == len(parts) else answer


def _as_interval(answer: str) -> str:
    r"""Inequalities of one letter as math-verify compares them with intervals: 1 < x -> (1,\infty)."""
    if not _RELATION.search(answer):
        return answer
    answer = _BUILDER.sub(r"\1", answer)
    parts = [_interval(part) for part in _OR.split(answer)]
    return answer if None in parts else " \\cup ".join(part for part in parts if part)


def _interval(inequality: str) -> str | None:
    r"""``a < x``, ``x \ge a`` or ``a < x \le b`` as an interval, an interval as it is; None = neither."""
    parts = _RELATION.split(inequality.strip())
    sides, signs = parts[::2], parts[1::2]
    if not signs:
        return inequality.strip() if inequality.strip()[:1] in ("(", "[") else None
    letters = [i for i, side in enumerate(sides) if re.fullmatch("[a-z]", side)]
    if len(letters) != 1 or not all(sides):
        return None
    ends = {}
    for i, sign in enumerate(signs):
        is_before = i < letters[0]
        bound, is_low = sides[i if is_before else i + 1], (sign[:2] in ("<", "\\l")) == is_before
        ends["low" if is_low else "high"] = (bound, "e" in sign)
    if len(ends) != len(signs):
        return None
    low, closed = ends.get("low", (r"-\infty", False))
    start = f"{'[' if closed else '('}{low}"
    high, closed = ends.get("high", (r"\infty", False))
    return f"{start},{high}{']' if closed else ')'}"


def _bare(answer: str) -> str:
    """Without spaces, asterisks and punctuation that belong to the sentence around it."""
    return answer.strip(" \t\n*").rstrip(" \n*.。,;:\\")


def _raised(match: re.Match[str]) -> str:
    folded = unicodedata.normalize("NFKC", match[0]).replace("\u2212", "-")
    if match[3]:
        return "\\frac{{{}}}{{{}}}".format(*folded.split("\u2044"))
    return f"^{{{folded}}}" if match[1] else f"_{{{folded}}}"


def extract(text: str) -> str | None:
    """The tidied answer a response states, or that it is as a whole; None = none."""
    shown = visible(text)
    for candidate in candidates(shown):
        answer = tidy(sentence(candidate[: 2 * MAX_ANSWER_CHARS]))
        if answer:
            return answer
    line = tidy(shown) if lone_line(shown) == shown.strip() else ""
    return line if line and _is_bare(line) else None


def _is_bare(line: str) -> bool:
    """A number or an expression without words: "5", "x=5", "12 cm", "1 or 2"."""
    if "\\boxed" in line or not re.search(r"\w", line):
        return False
    return not _WORDS.search(_OR.sub(" ", _COMMAND.sub(" ", line))) or numeric.parse(line) is not None


def extract_upstream(text: str) -> str | None:
    r"""Content of the last ``\boxed{…}`` as the text-math benchmarks take it; a ``\fbox`` or ``\boxed 7`` is no answer."""
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith("\\boxed{", start):
        return None
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{") : start + brace.start()]
    return None


def compare_plain(gold: str, answer: str) -> bool | None:
    """Equality of two plain numbers, without math-verify; None = ask it."""
    if _PLAIN.fullmatch(gold) and _PLAIN.fullmatch(answer):
        equal = Decimal(gold) == Decimal(answer)
        # Different decimals may still agree to the places math-verify looks at.
        return equal if equal or ("." not in gold and "." not in answer) else None
    return None


def compare_notation(gold: str, answer: str) -> bool | None:
    r"""What math-verify does not look at: relations, words, bases, other units, the order of points; None = ask it."""
    if _ONE_SIDED.match(answer) and not _ONE_SIDED.search(gold):
        return False
    name, _, value = answer.rpartition("=")
    if "=" not in gold and not re.search("[a-z]", _COMMAND.sub("", gold)) and _is_unsolved(name):
        return False
    if re.search(r"\d\s?:", answer) and _PLAIN.fullmatch(gold):
        return False
    brackets = {("(" in text, "\\{" in text) for text in (answer, gold)}
    if brackets == {(True, False), (False, True)}:  # a tuple is no set
        return False
    based = _BASED.fullmatch(answer), _BASED.fullmatch(gold)
    if based[0]:
        return based[0].groups() == (based[1].groups() if based[1] else (gold, "10"))
    if re.fullmatch("[A-Z]{3,10}", gold) and re.fullmatch("[A-Z]{3,10}", plain(answer)):
        return plain(answer) in (gold, gold[::-1])
    value = plain(value)
    has_words = _WORDS.search(_COMMAND.sub(" ", value)) is not None
    found, wanted = numeric.parse(numeric.reading(value)), numeric.parse(gold)
    if found and wanted and (has_words or (found.unit and wanted.unit)):
        is_unit_known = found.is_measured and wanted.is_measured
        return numeric.same(found if is_unit_known else replace(found, unit=""), wanted)
    return False if wanted and has_words else None  # "42 or 43"


def _is_unsolved(name: str) -> bool:
    r"""Left of "=" stands no name of a value, but "2x", "x^2", "|x|" or "2"; "f(3)", "x_1", "m+n" and "6 \cdot 7" are fine."""
    name = name.split("=")[0].strip()
    names = set(_NAME.findall(name))
    if not names:
        return re.fullmatch(r"[\d\s.]+", name) is not None
    return len(names) == 1 and _OPERATION.search(_NAME.sub("", name)) is not None


class MathVerifier(Verifier):
    """math-verify 0.9 with a hard deadline; a gold that is not mathematics, a timeout or a crash is unknown."""

    profiles = ("strict", "upstream")

    def __init__(self, config: VerifierConfig, profile: str | None = None) -> None:
        super().__init__(config, profile)
        self.workers = MathWorkers(config.workers, config.timeout_s)
        self._cache: OrderedDict[tuple[str, str | None], Verdict] = OrderedDict()

    def extract(self, prompt: Prompt, text: str) -> str | None:
        return extract(text) if self.profile == "strict" else extract_upstream(text)

    def verify(self, prompt: Prompt, text: str) -> Outcome:
        return self.verify_many([(prompt, text)])[0]

    def verify_many(self, items: Sequence[tuple[Prompt, str]]) -> list[Outcome]:
        """Outcomes in order; equal (gold, answer) pairs are compared once, on all workers at the same time."""
        golds = [self._golds(prompt) for prompt, _ in items]
        answers = [
            self.extract(prompt, text) if gold else None
            for gold, (prompt, text) in zip(golds, items, strict=True)
        ]
        pairs = [
            (gold, answer)
            for row, answer in zip(golds, answers, strict=True)
            if answer is not None and len(answer) <= MAX_ANSWER_CHARS
            for gold in row
        ]
        verdicts = self._compare(pairs)
        return [_outcome(row, answer, verdicts) for row, answer in zip(golds, answers, strict=True)]

    def check_golds(self, prompts: Sequence[Prompt]) -> list[str | None]:
        rows = [self._golds(prompt) for prompt in prompts]
        verdicts = self._compare([(gold, None) for row in rows for gold in row])
        return [
            next(
                (
                    _gold_problem(gold, verdicts[gold, None])
                    for gold in row
                    if not verdicts[gold, None].gold_ok
                ),
                None,
            )
            if row
            else NO_GOLD
            for row in rows
        ]

    def close(self) -> None:
        self.workers.close()

    def _golds(self, prompt: Prompt) -> list[str]:
        golds = gold_answers(prompt)
        if self.profile != "strict":
            return golds
        return [tidied for gold in golds if (tidied := tidy(last_boxed(gold) or gold))]

    def _compare(self, pairs: Sequence[tuple[str, str | None]]) -> dict[tuple[str, str | None], Verdict]:
        """Verdict of each distinct pair: from plain equality, the cache, or the workers."""
        verdicts: dict[tuple[str, str | None], Verdict] = {}
        asked = []
        for pair in dict.fromkeys(pairs):
            verdict = self._cheap(*pair)
            if verdict is None:
                asked.append(pair)
            else:
                verdicts[pair] = verdict
        for pair, verdict in zip(asked, self.workers.compare(asked), strict=True):
            verdicts[pair] = verdict
            if verdict.gold_ok is not None:  # a timeout on a busy machine is no lasting truth
                self._cache[pair] = verdict
                if len(self._cache) > CACHE_SIZE:
                    self._cache.popitem(last=False)
        return verdicts

    def _cheap(self, gold: str, answer: str | None) -> Verdict | None:
        if (gold, answer) in self._cache:
            self._cache.move_to_end((gold, answer))
            return self._cache[gold, answer]
        if len(gold) > MAX_ANSWER_CHARS:
            return Verdict(False, None, f"gold answer longer than {MAX_ANSWER_CHARS} characters")
        if answer is None:
            return Verdict(True) if _PLAIN.fullmatch(gold) else None
        if self.profile == "strict" and gold == answer:
            return Verdict(True, True)
        equal = compare_plain(gold, answer)
        if equal is None and self.profile == "strict":
            equal = compare_notation(gold, answer)
        return None if equal is None else Verdict(True, equal)


def _outcome(
    golds: Sequence[str], answer: str | None, verdicts: dict[tuple[str, str | None], Verdict]
) -> Outcome:
    """One outcome from the verdicts on each gold: right if any is, else unknown if any is, else wrong."""
    if not golds:
        return Outcome(None, reason=NO_GOLD)
    if answer is None:
        return Outcome(False, score=0.0, reason=NO_ANSWER)
    if len(answer) > MAX_ANSWER_CHARS:
        reason = f"answer longer than {MAX_ANSWER_CHARS} characters"
        return Outcome(False, score=0.0, extracted=answer[:MAX_ANSWER_CHARS], reason=reason)
    found = [verdicts[gold, answer] for gold in golds]
    if any(verdict.equal for verdict in found):
        return Outcome(True, score=1.0, extracted=answer, reason=AGREES)
    for gold, verdict in zip(golds, found, strict=True):
        if verdict.gold_ok is None:
            return Outcome(None, extracted=answer, reason=verdict.reason)
        if not verdict.gold_ok:
            return Outcome(None, extracted=answer, reason=_gold_problem(gold, verdict))
    return Outcome(False, score=0.0, extracted=answer, reason=DIFFERS)


def _gold_problem(gold: str, verdict: Verdict) -> str:
    because = f" ({verdict.reason})" if verdict.reason else ""
    return f"gold answer {gold[:200]!r} is not readable as mathematics{because}"
