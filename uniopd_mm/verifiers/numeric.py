r"""Numbers with units: "12 cm" is 12, "1.2e3" is 1200, "12 mm" is not "12 cm".

Integers are equal exactly, other numbers to one part in a million.  Where one side names no unit the other's is taken for
granted; units of length, mass, time and volume are converted (5000 m is 5 km), other different units are different answers.
"5 %" is the number 5 with the unit %, never 0.05.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers.base import MAX_ANSWER_CHARS, NO_GOLD, Verifier, gold_answers
from uniopd_mm.verifiers.extract import fold, linear_number, plain, sentence, short_answer, stated

RELATIVE = Fraction(1, 10**6)

_UNITS = {
    "cm": "centimeter centimetre centimeters centimetres cms 厘米", "mm": "millimeter millimetre millimeters millimetres 毫米",
    "m": "meter metre meters metres 米", "km": "kilometer kilometre kilometers kilometres kms 千米 公里",
    "in": "inch inches", "ft": "foot feet", "yd": "yard yards", "mi": "mile miles",
    "g": "gram grams 克", "kg": "kilogram kilograms kgs 千克 公斤", "mg": "milligram milligrams", "lb": "lbs pound pounds",
    "oz": "ounce ounces", "l": "liter litre liters litres", "ml": "milliliter millilitre milliliters millilitres",
    "s": "sec secs second seconds 秒", "min": "mins minute minutes 分钟", "h": "hr hrs hour hours 小时", "day": "days d 天",
    "week": "weeks", "month": "months", "year": "years yr yrs 年", "ms": "millisecond milliseconds",
    "°": "deg degree degrees º 度", "rad": "radian radians", "%": "percent pct per-cent",
    "$": "dollar dollars usd", "€": "euro euros eur", "£": "gbp", "¥": "yen yuan rmb 元", "₹": "rupee rupees inr", "cent": "cents ¢",
    "n": "newton newtons", "j": "joule joules", "w": "watt watts", "v": "volt volts", "a": "amp amps ampere amperes",
    "ω": "ohm ohms", "hz": "hertz", "pa": "pascal pascals", "k": "kelvin", "°c": "celsius degc", "°f": "fahrenheit",
    "unit": "units", "item": "items 个 件", "piece": "pieces 块 张", "people": "person persons 人 名",
}  # fmt: skip
_CANONICAL = {name: unit for unit, names in _UNITS.items() for name in (unit, *names.split())}
_SI = {
    "mm": ("m", "1/1000"), "cm": ("m", "1/100"), "m": ("m", "1"), "km": ("m", "1000"), "in": ("m", "0.0254"),
    "ft": ("m", "0.3048"), "yd": ("m", "0.9144"), "mi": ("m", "1609.344"), "mg": ("g", "1/1000"), "g": ("g", "1"),
    "kg": ("g", "1000"), "lb": ("g", "453.59237"), "oz": ("g", "28.349523125"), "ml": ("l", "1/1000"), "l": ("l", "1"),
    "ms": ("s", "1/1000"), "s": ("s", "1"), "min": ("s", "60"), "h": ("s", "3600"), "day": ("s", "86400"),
    "week": ("s", "604800"), "cent": ("$", "1/100"),
}  # fmt: skip
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"k": 10**3, "M": 10**6, "bn": 10**9}
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_COUNTS = {word: str(value) for value, word in enumerate(_WORDS.split())}
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s?(?P<currency>[$€£¥₹]?)\s?"
    r"(?P<value>\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?|\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})"
    r"(?:\s?(?:[eE]|(?:\\times|\\cdot|×|x|\*)\s?10\s?\^)\s?\{?(?P<exponent>[-+]?\d{1,3})\}?)?"
    r"(?:\s?/\s?(?P<over>\d{1,15}(?:\.\d{1,15})?))?"
    r"(?:\s?(?P<scale>(?i:thousand|million|billion|trillion))|(?P<suffix>k|M|bn)(?!\w))?(?P<unit>.{0,60})",
    re.DOTALL,
)
_MIXED = re.compile(
    r"(?P<sign>[-+]?)\s?(?P<whole>\d{1,15})\s(?P<value>\d{1,15})\s?/\s?(?P<over>\d{1,15})(?P<unit>.{0,60})",
    re.DOTALL,
)
_TAIL = re.compile(r"\s(?:long|wide|tall|high|deep|old|in total)$")
_EQUATION = re.compile(
    r"(?:[A-Za-z]{1,20}(?:\s[A-Za-z]{1,20}){0,3}\s?[=:]\s?)?"
    r"(?:[\d\s.,()]{1,30}[+*×/÷-][\d\s.,+*×/÷()-]{1,60}=)?([^=]{1,60})"
)
"""A line that ends in its value: "3 + 9 = 12", "Total: 12"."""
_NO_NOUNS = frozenset((
    "is", "are", "was", "were", "or", "and", "not", "to", "than", "but", "plus", "minus", "times", "if", "so", "because",
    "wrong", "right", "extraneous", "dozen", "squared", "cubed", "hundred",
))  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """A number and its unit."""

    value: Fraction
    unit: str = ""
    """Canonical: ``cm^2``, ``km/h``; "" = none."""
    scale: int = field(default=1, compare=False)
    """The million of "5 million", which the value holds already."""

    @property
    def is_measured(self) -> bool:
        """The unit, if there is one, is a known unit of measurement."""
        return all(part.partition("^")[0] in _UNITS for part in re.split("[/·*]", self.unit) if part)

    def in_base_units(self) -> Quantity:
        """The same quantity in metres, grams, seconds and litres as far as its unit is made of such."""
        value, parts = self.value, re.split("([/·*])", self.unit)
        for i in range(0, len(parts), 2):
            name, _, power = parts[i].partition("^")
            if name in _SI:
                parts[i] = _SI[name][0] + (f"^{power}" if power else "")
                factor = Fraction(_SI[name][1]) ** int(power or 1)
                value = value / factor if i and parts[i - 1] == "/" else value * factor
        return Quantity(value, "".join(parts))


def parse(text: str) -> Quantity | None:
    """The quantity a text is; None when it is more or less than one number with an optional unit."""
    text = plain(fold(text[:MAX_ANSWER_CHARS])).rstrip(". ")
    text = re.sub(r"^(?:[a-zA-Z]\w{0,3}\s?)?(?:=|≈|\\approx)\s?", "", text).replace("{,}", ",")
    text = re.sub(r"\bper cent\b|\bpercentage points?\b", "percent", text)
    text = re.sub(
        r"^(?:minus|negative)\s(?=[\d.])", "-", linear_number(_TAIL.sub("", text)), flags=re.IGNORECASE
    )
    text = re.sub(r"^(?:USD|US\$)\s?(?=\d)", "$", text)
    first, space, rest = text.partition(" ")
    text = _COUNTS.get(first.casefold(), first) + space + rest
    match = _NUMBER.fullmatch(text)
    return (match and _quantity(match)) or ((match := _MIXED.fullmatch(text)) and _quantity(match)) or None


def _quantity(match: re.Match[str]) -> Quantity | None:
    groups = match.groupdict()
    glued = groups["unit"][:1].isalpha()
    unit = _unit(groups["unit"])
    currency = groups.get("currency") or ""
    if unit is None or (currency and unit not in ("", currency)):
        return None
    quantity = Quantity(Fraction(0), unit)
    if glued and not quantity.is_measured:  # "12th", "12x"
        return None
    over = Fraction(groups["over"] or 1)
    exponent = int(groups.get("exponent") or 0)
    if over == 0:
        return None
    value = Fraction(re.sub("[, ]", "", groups["value"]).removesuffix(".")) * Fraction(10) ** exponent / over
    if "whole" in groups:
        if value >= 1:
            return None
        value += int(groups["whole"])
    scale = _SCALES.get((groups.get("scale") or "").casefold() or groups.get("suffix") or "", 1)
    return Quantity((-value if groups["sign"] == "-" else value) * scale, currency or unit, scale)


def _unit(text: str) -> str | None:
    """A canonical unit; None when the text is no unit."""
    text = text.strip().strip("()[]").strip()
    if not text:
        return ""
    if (unit := text.casefold().replace("° ", "°")) in _CANONICAL:
        return _CANONICAL[unit]
    text = re.sub(r"(?:\b(?:square|sq\.?)\s+|平方)(\S+)", r"\1^2", text)
    text = re.sub(r"(?:\bcubic\s+|立方)(\S+)", r"\1^3", text)
    text = text.replace("²", "^2").replace("³", "^3").replace(" per ", "/").replace("{", "").replace("}", "")
    parts = re.split(r"\s*([/·*])\s*", text)
    named = [part if part in "/·*" else _power(part) for part in parts]
    return None if None in named else "".join(part or "" for part in named)


def _power(text: str) -> str | None:
    """One factor of a unit, such as ``cm^2`` or a noun that is counted ("apples")."""
    match = re.fullmatch(r"([A-Za-zΩωµμ%$€£¥ -]{1,30}?|[一-鿿]{1,2})\.?(?:\^(-?[1-9])|([23]))?", text.strip())
    if match is None:
        return None
    name, power = match[1].strip().casefold(), match[2] or match[3]
    if name not in _CANONICAL and (
        power
        or len(name) < 2
        or not name.isascii()
        or len(name.split()) > 3
        or not _NO_NOUNS.isdisjoint(name.split())
    ):
        return None
    return _CANONICAL.get(name, name.removesuffix("s")) + (f"^{power}" if power else "")


def reading(answer: str) -> str:
    """The quantity in an answer that states one: "The length is 12 cm." -> "12 cm"; other answers as they are."""
    if parse(answer):
        return answer
    first = stated(sentence(answer))
    equation = _EQUATION.fullmatch(first)
    return next((text.strip() for text in (first, equation and equation[1]) if text and parse(text)), answer)


def score(answer: str, gold: str) -> float:
    """1 if both are the same quantity, else 0."""
    found, wanted = parse(answer), parse(gold)
    return float(found is not None and wanted is not None and same(found, wanted))


def same(answer: Quantity, gold: Quantity) -> bool:
    """Equal value, and the same unit after conversion where both name one."""
    if answer.unit and gold.unit and answer.unit != gold.unit:
        answer, gold = answer.in_base_units(), gold.in_base_units()
        if answer.unit != gold.unit:
            return False
    if answer.value.denominator == gold.value.denominator == 1:
        return answer.value == gold.value
    return abs(answer.value - gold.value) <= RELATIVE * abs(gold.value)


class NumericVerifier(Verifier):
    """Numbers with units."""

    def extract(self, prompt: Prompt, text: str) -> str | None:
        answer = short_answer(text)
        return answer and reading(answer)

    def score(self, answer: str, gold: str, prompt: Prompt | None = None) -> float:
        return score(answer, gold)

    def check_golds(self, prompts: Sequence[Prompt]) -> list[str | None]:
        return [_gold_problem(gold_answers(prompt)) for prompt in prompts]


def _gold_problem(golds: Sequence[str]) -> str | None:
    if not golds:
        return NO_GOLD
    bad = next((gold for gold in golds if parse(gold) is None), None)
    return None if bad is None else f"gold answer {bad[:200]!r} is not one number with an optional unit"
