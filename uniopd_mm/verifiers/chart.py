"""Chart questions: relaxed accuracy (numbers within 5 %, other answers by equality; arXiv 2203.10244, section 5.1).

``strict`` reads percent signs, units, currencies and thousands separators, and wants years exactly.  ``upstream`` and
``upstream_vlmevalkit`` give the numbers of lmms-eval's and VLMEvalKit's ChartQA scorers, on which published results
rest: they reject "1,200" for "1200" and "14" for "14%", and accept the year 2110 for 2010.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers.base import MAX_ANSWER_CHARS, Verifier
from uniopd_mm.verifiers.exact import normalize
from uniopd_mm.verifiers.extract import fold, linear_number, plain, short_answer

TOLERANCE = 0.05
_MAX_ITEMS = 64
_ITEM_END = re.compile(r"[,;]\s+(?:and\s)?|,(?!\d{3})")

_COUNTS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
    "eighteen|nineteen|twenty"
)
_WORDS = {word: str(value) for value, word in enumerate(_COUNTS.split("|"))}
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s?[$€£¥₹]?\s?(?P<value>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?P<exp>e[-+]?\d{1,2})?"
    r"(?:\s?/\s?(?P<over>\d+(?:\.\d+)?))?"
    r"\s?(?P<percent>%|percent\b|per cent\b|percentage points?\b)?\s?(?:(?P<scale>thousand|million|billion|trillion)s?)?"
    r"(?P<unit>[^\d,/%]{0,40})"
)
_YEAR = re.compile(r"(?:1[5-9]|20)\d\d")
_YES_NO = re.compile(r"(yes|no)\b\s?[,.;:!-]", re.IGNORECASE)


@dataclass(frozen=True)
class _Number:
    value: float
    percent: bool
    scale: float

    def readings(self, other: _Number) -> set[float]:
        """Values it may stand for beside ``other``: a mark that only one side carries may be part of the axis label."""
        values = (
            {self.value * self.scale}
            if self.scale == 1 or other.scale != 1
            else {self.value, self.value * self.scale}
        )
        return values | {value / 100 for value in values} if self.percent and not other.percent else values


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
        said = set(re.findall(r"\b(?:yes|no|not)\b", answer.casefold()))
        return _YES_NO.match(answer) is not None and said == {normalize(gold)}
    is_year = _YEAR.fullmatch(gold.strip(" .")) is not None
    if is_year:
        answer = re.sub(r"^(?:in\s)?(?:the\s)?(?:year\s)?", "", answer, flags=re.IGNORECASE)
    found, wanted = _number(answer), _number(gold)
    if found is None or wanted is None:
        return False
    if is_year:
        return (
            found.value == wanted.value
            and not found.percent
            and found.scale == 1
            and not answer[4:5].isalpha()
        )
    return any(_close(a, g) for a in found.readings(wanted) for g in wanted.readings(found))


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


def _close(value: float, gold: float) -> bool:
    return value == gold if gold == 0 else abs(value - gold) / abs(gold) <= TOLERANCE


def _number(text: str) -> _Number | None:
    text = linear_number(text.strip().rstrip(".").casefold())
    match = _NUMBER.fullmatch(_WORDS.get(text, text))
    if match is None:
        return None
    value = float(match["value"].replace(",", "") + (match["exp"] or ""))
    over = float(match["over"] or 1)
    if over == 0:
        return None
    value = (-value if match["sign"] == "-" else value) / over
    return _Number(value, match["percent"] is not None, _SCALES.get(match["scale"], 1.0))


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
