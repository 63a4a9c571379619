"""Chart questions: relaxed accuracy (numbers within 5 %, other answers by equality; arXiv 2203.10244, section 5.1).

``strict`` reads percent signs, units, currencies and thousands separators, and wants years exactly.  ``upstream`` and
``upstream_vlmevalkit`` give the numbers of lmms-eval's and VLMEvalKit's ChartQA scorers, on which published results
rest: they reject "1,200" for "1200" and "14" for "14%", and accept the year 2110 for 2010.
"""

from __future__ import annotations

import re
from fractions import Fraction

from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers import numeric
from uniopd_mm.verifiers.base import MAX_ANSWER_CHARS, Verifier
from uniopd_mm.verifiers.exact import normalize
from uniopd_mm.verifiers.extract import fold, plain, short_answer
from uniopd_mm.verifiers.numeric import Quantity

TOLERANCE = 0.05
_MAX_ITEMS = 64
_ITEM_END = re.compile(r"[,;](?!\d{3})\s*(?:and\s)?")
_YEAR = re.compile(r"(?:1[5-9]|20)\d\d")
_YES_NO = re.compile(r"(yes|no)\b\s?[,.;:!-]", re.IGNORECASE)


def score(answer: str, gold: str, profile: str = "strict") -> float:
    """1 if the answer is right by the profile's relaxed accuracy, else 0."""
    if profile == "strict":
        return float(_strict(plain(fold(answer[:MAX_ANSWER_CHARS])), plain(fold(gold))))
    return float(_upstream(answer.strip() if profile == "upstream_vlmevalkit" else answer, gold))


def _strict(answer: str, gold: str) -> bool:
    if gold.startswith("[") and gold.endswith("]"):
        return _same_items(answer, gold)
    if normalize(answer) == normalize(gold):
        return True
    if normalize(gold) in ("yes", "no"):  # "Yes, because …"
        said, other = _YES_NO.match(answer), "yes" if normalize(gold) == "no" else "not?"
        return (
            said is not None
            and normalize(said[1]) == normalize(gold)
            and not re.search(rf"(?i)\b{other}\b", answer)
        )
    is_year = _YEAR.fullmatch(gold.strip(" .")) is not None
    if is_year:
        answer = re.sub(r"^(?:in\s)?(?:the\s)?(?:year\s)?", "", answer, flags=re.IGNORECASE)
    found, wanted = numeric.parse(numeric.reading(answer)), numeric.parse(gold)
    if found is None or wanted is None:
        return False
    if is_year:
        return found.value == wanted.value and not found.unit and found.scale == 1
    if len({found.unit, wanted.unit} - {"", "%"}) > 1:
        return False
    return any(_close(a, g) for a in _values(found, wanted) for g in _values(wanted, found))


def _values(number: Quantity, other: Quantity) -> set[Fraction]:
    """What it may stand for beside the other: a mark that only one side carries may be part of the axis label."""
    values = {number.value} if other.scale > 1 else {number.value, number.value / number.scale}
    return values | {value / 100 for value in values} if number.unit == "%" != other.unit else values


def _same_items(answer: str, gold: str) -> bool:
    """Lists hold the same items in any order."""
    found, wanted = (_ITEM_END.split(text.strip("[]() "), maxsplit=_MAX_ITEMS) for text in (answer, gold))
    if len(found) < len(wanted):
        found = [part for item in found for part in re.split(r"^and\s|\s(?:and|&)\s", item) if part]
    for item in wanted:
        match = next(
            (i for i, other in enumerate(found) if _strict(other.strip("[]\"' "), item.strip("[]\"' "))), None
        )
        if match is None:
            return False
        found.pop(match)
    return not found


def _close(value: Fraction, gold: Fraction) -> bool:
    return abs(value - gold) <= Fraction(TOLERANCE) * abs(gold)


def _upstream(answer: str, gold: str) -> bool:
    found, wanted = _upstream_number(answer), _upstream_number(gold)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= TOLERANCE
    return answer.lower() == gold.lower()


def _upstream_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


class ChartVerifier(Verifier):
    """Relaxed accuracy."""

    profiles = ("strict", "upstream", "upstream_vlmevalkit")

    def extract(self, prompt: Prompt, text: str) -> str | None:
        return short_answer(text) if self.profile == "strict" else text

    def score(self, answer: str, gold: str, prompt: Prompt | None = None) -> float:
        return score(answer, gold, self.profile)
