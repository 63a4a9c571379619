r"""Numbers with units: "12 cm" is 12, "1.2e3" is 1200, "12 mm" is not "12 cm".

Numbers are equal to one part in a million.  Units are compared, not converted: where one side names none the other's is
taken for granted, and two different ones are different answers.  "5 %" is the number 5 with the unit %, never 0.05.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers.base import MAX_ANSWER_CHARS, NO_GOLD, Verifier, gold_answers
from uniopd_mm.verifiers.extract import fold, plain, sentence, short_answer

RELATIVE = 1e-6

_UNITS = {
    "cm": "centimeter centimetre centimeters centimetres cms", "mm": "millimeter millimetre millimeters millimetres",
    "m": "meter metre meters metres", "km": "kilometer kilometre kilometers kilometres kms",
    "in": "inch inches", "ft": "foot feet", "yd": "yard yards", "mi": "mile miles",
    "g": "gram grams", "kg": "kilogram kilograms kgs", "mg": "milligram milligrams", "lb": "lbs pound pounds",
    "oz": "ounce ounces", "l": "liter litre liters litres", "ml": "milliliter millilitre milliliters millilitres",
    "s": "sec secs second seconds", "min": "mins minute minutes", "h": "hr hrs hour hours", "day": "days d",
    "week": "weeks", "month": "months", "year": "years yr yrs", "ms": "millisecond milliseconds",
    "°": "deg degree degrees ^\\circ ^{\\circ} \\degree º", "rad": "radian radians", "%": "percent pct per-cent",
    "$": "dollar dollars usd", "€": "euro euros eur", "£": "gbp", "¥": "yen yuan rmb", "cent": "cents ¢",
    "n": "newton newtons", "j": "joule joules", "w": "watt watts", "v": "volt volts", "a": "amp amps ampere amperes",
    "ω": "ohm ohms", "hz": "hertz", "pa": "pascal pascals", "k": "kelvin", "°c": "celsius degc", "°f": "fahrenheit",
    "unit": "units", "item": "items", "piece": "pieces", "people": "person persons",
}  # fmt: skip
_CANONICAL = {name: unit for unit, names in _UNITS.items() for name in (unit, *names.split())}
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_COUNTS: dict[str, int] = {
    word: value
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ]
    )
}
_NUMBER = re.compile(
    r"(?P<currency>[$€£¥]?)\s?(?P<sign>[-+]?)\s?(?P<front>[$€£¥]?)\s?"
    r"(?P<value>\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?|\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})"
    r"(?:\s?(?:[eE]|(?:\\times|\\cdot|×|x|\*)\s?10\s?\^)\s?\{?(?P<exponent>[-+]?\d{1,3})\}?)?"
    r"(?:\s?/\s?(?P<over>\d{1,15}(?:\.\d{1,15})?))?"
    r"\s?(?P<scale>thousand|million|billion|trillion)?\s?(?P<unit>.{0,60})",
    re.DOTALL,
)
_FRACTION = re.compile(
    r"(?P<sign>[-+]?)\s?\\[dt]?frac\s?\{(?P<value>\d{1,15})\}\s?\{(?P<over>\d{1,15})\}(?P<unit>.{0,60})",
    re.DOTALL,
)
_NO_NOUNS = frozenset((
    "is", "are", "was", "were", "or", "and", "not", "to", "than", "but", "plus", "minus", "times", "if", "so", "because",
    "wrong", "right",
))  # fmt: skip
_UNIT = re.compile(r"[a-zA-Z°º%$€£¥¢Ωωµμ²³^{}\\/·*\d\s().-]*")


@dataclass(frozen=True)
class Quantity:
    """A number and its unit."""

    value: float
    unit: str = ""
    """Canonical: ``cm^2``, ``km/h``; "" = none."""

    @property
    def is_measured(self) -> bool:
        """The unit, if there is one, is a known unit of measurement."""
        return all(part.partition("^")[0] in _UNITS for part in re.split("[/·*]", self.unit) if part)


def parse(text: str) -> Quantity | None:
    """The quantity a text is; None when it is more or less than one number with an optional unit."""
    text = plain(fold(text[:MAX_ANSWER_CHARS])).strip().rstrip(".").strip()
    text = re.sub(r"^[a-zA-Z]\w{0,3}\s?(?:=|≈|\\approx)\s?", "", text).replace("−", "-").replace("\\%", "%")
    text = text.replace("\\$", "$").replace("{,}", ",").replace("\\!", "")
    if text.casefold() in _COUNTS:
        return Quantity(_COUNTS[text.casefold()])
    match = _FRACTION.fullmatch(text) or _NUMBER.fullmatch(text)
    return _quantity(match) if match else None


def _quantity(match: re.Match[str]) -> Quantity | None:
    groups = match.groupdict()
    unit = _unit(groups["unit"])
    currency = groups.get("currency") or groups.get("front") or ""
    if unit is None or (currency and unit not in ("", currency)):
        return None
    over = float(groups["over"] or 1)
    if over == 0:
        return None
    digits = re.sub("[, ]", "", groups["value"])
    value = (
        float(f"{digits}e{groups.get('exponent') or 0}") / over * _SCALES.get(groups.get("scale") or "", 1.0)
    )
    if not math.isfinite(value):
        return None
    return Quantity(-value if groups["sign"] == "-" else value, currency or unit)


def _unit(text: str) -> str | None:
    """A canonical unit; None when the text is no unit."""
    text = text.strip().strip("()").strip()
    if not text:
        return ""
    if text.casefold() in _CANONICAL:
        return _CANONICAL[text.casefold()]
    if not _UNIT.fullmatch(text):
        return None
    text = re.sub(r"\b(square|sq\.?|cubic)\s+(\S+)", lambda m: f"{m[2]}^{3 if m[1][0] == 'c' else 2}", text)
    text = text.replace("²", "^2").replace("³", "^3").replace(" per ", "/").replace("{", "").replace("}", "")
    if "°" in text or "º" in text or "\\" in text:
        return _CANONICAL.get(text.replace(" ", "").casefold().replace("^\\circ", "°").replace("º", "°"))
    parts = re.split(r"\s*([/·*])\s*", text)
    named = [part if part in "/·*" else _power(part) for part in parts]
    return None if None in named else "".join(part or "" for part in named)


def _power(text: str) -> str | None:
    """One factor of a unit, such as ``cm^2`` or a noun that is counted ("apples")."""
    match = re.fullmatch(r"([A-Za-zΩωµμ%$€£¥ -]{1,30}?)\.?(?:\^?(-?[1-9]))?", text.strip())
    if match is None:
        return None
    name = match[1].strip().casefold()
    if name not in _CANONICAL and (
        match[2] or len(name.split()) > 3 or not _NO_NOUNS.isdisjoint(name.split())
    ):
        return None
    return _CANONICAL.get(name, name.removesuffix("s")) + (f"^{match[2]}" if match[2] else "")


def score(answer: str, gold: str) -> float:
    """1 if both are the same quantity, else 0."""
    found, wanted = parse(answer), parse(gold)
    return float(found is not None and wanted is not None and same(found, wanted))


def same(answer: Quantity, gold: Quantity) -> bool:
    """Equal value, and no other unit."""
    if answer.unit and gold.unit and answer.unit != gold.unit:
        return False
    return abs(answer.value - gold.value) <= RELATIVE * abs(gold.value)


class NumericVerifier(Verifier):
    """Numbers with units."""

    def extract(self, prompt: Prompt, text: str) -> str | None:
        answer = short_answer(text)
        if answer is None or parse(answer):
            return answer
        first = sentence(answer)
        return first if parse(first) else answer

    def score(self, answer: str, gold: str, prompt: Prompt | None = None) -> float:
        return score(answer, gold)

    def check_golds(self, prompts: Sequence[Prompt]) -> list[str | None]:
        return [_gold_problem(gold_answers(prompt)) for prompt in prompts]


def _gold_problem(golds: Sequence[str]) -> str | None:
    if not golds:
        return NO_GOLD
    bad = next((gold for gold in golds if parse(gold) is None), None)
    return None if bad is None else f"gold answer {bad[:200]!r} is not one number with an optional unit"
