r"""The number that a LaTeX expression stands for, as the MathVision scorers compute it; nothing is ever executed.

Those scorers hand what latex2sympy2 1.9 makes of an answer to ``eval``.  This parser accepts the part of that grammar
which yields a number and keeps its habits, on which published scores rest: what cannot continue an expression is
ignored ("12)" is 12), ``2\frac{1}{2}`` is a product, ``2^3^2`` is 64, ``\sqrt8`` and ``\frac12`` are errors.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

MAX_CHARS = 1000
_MAX_DEPTH = 40
_MAX_BITS = 20_000
"""Largest power or factorial that is worked out."""

Number = int | float

_TOKEN = re.compile(
    r"\s+|(?P<percent>(?:\d+(?:,\d{3})*(?:\.\d+)?|(?:\d+(?:,\d{3})*)?\.\d+)\\%)"
    r"|(?P<number>(?:\d+(?:,\d{3})*)?\.\d+|\d+(?:,\d{3})*)"
    r"|(?P<command>\\(?:displaystyle|lbrace|rbrace|lbrack|rbrack|lgroup|rgroup|lfloor|rfloor|mleft|mright|left|right"
    r"|arc(?:sin|cos|tan)h?|ar(?:sin|cos|tan)h|(?:sin|cos|tan)h?|exp|log|ln|sqrt|frac|binom|times|cdot|div|pi"
    r"|[a-z]+|[{}|]))|(?P<letter>[a-z])|(?P<mark>[-+*/()\[\]{}^:!'|=,;._<>&])",
    re.ASCII,
)
_ASSIGNED = re.compile(r"\s*(?:[a-z]|\\(?:alpha|beta|gamma|delta|theta|phi|omega|lambda|mu|angle))\s*=")
_BLANK = re.compile(r"\\displaystyle|\\q?quad|\\,|[~$]")
_OPENING = {"(": ")", "{": "}", "[": "]", "\\lgroup": "\\rgroup", "\\{": "\\}", "\\lbrace": "\\rbrace"}
_OPENING |= {"\\lbrack": "\\rbrack"}
_PRODUCT = {"*": "*", "\\times": "*", "\\cdot": "*", "/": "/", "\\div": "/", ":": "/"}
_FUNCTIONS = {
    **{f"\\{name}": getattr(math, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp")},
    **{f"\\arc{name}": getattr(math, f"a{name}") for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{f"\\ar{name}": getattr(math, f"a{name}") for name in ("sinh", "cosh", "tanh")},
}
_CALLS = {*_FUNCTIONS, "\\sqrt", "\\log", "e"}
_STARTS_FACTOR = {*_OPENING, "\\frac", "\\binom", "\\pi", "\\lfloor", "\\left", "\\mleft"}


class NotANumber(ValueError):
    """The expression is malformed, or holds a symbol."""


def evaluate(text: str, names: bool = True) -> Number | None:
    r"""Value rounded to two decimals; None = no number.  ``names``: ``\sqrt``, ``\pi``, functions and ``!`` are known."""
    value = exact(text, names)
    return None if value is None else round(value, 2)


def exact(text: str, names: bool = True, whole: bool = False) -> Number | None:
    """``evaluate`` before rounding; ``whole``: the text is the expression alone, no equation and no "12)"."""
    if len(text) > MAX_CHARS:
        return None
    try:
        value = _Parser(_BLANK.sub(" ", re.sub(r"\\[dt]frac", r"\\frac", text)), names).value(whole)
    except (NotANumber, ArithmeticError, ValueError):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None


class _Parser:
    """Recursive descent; juxtaposition binds tighter than ``*`` and ``/``, which bind tighter than ``+`` and ``-``."""

    def __init__(self, text: str, names: bool) -> None:
        self.text, self.names = text, names
        self.at, self.depth = 0, 0
        self.kind: str | None = None
        self.token = ""
        self.advance()

    def advance(self) -> None:
        """Read the next token; ``token`` is "" at the end of the text."""
        while self.at < len(self.text):
            match = _TOKEN.match(self.text, self.at)
            if match is None:
                raise NotANumber(self.text[self.at])
            self.at = match.end()
            if match.lastgroup is not None:
                self.kind, self.token = match.lastgroup, match[0]
                return
        self.kind, self.token = None, ""

    def expect(self, token: str) -> None:
        if self.token != token:
            raise NotANumber(f"{token} missing")
        self.advance()

    def value(self, whole: bool) -> Number:
        """The whole text; a single symbol may stand before an equals sign."""
        if not whole and (assigned := _ASSIGNED.match(self.text)):
            self.at = assigned.end()
            self.advance()
        result = self.sum()
        if self.token and (whole or self.token in ",;=<>&"):
            raise NotANumber("a list or a relation")
        return _plain(result)

    def sum(self) -> Number | Fraction:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise NotANumber("nested too deeply")
        result = self.product()
        while self.token in ("+", "-") and self.token:
            sign = 1 if self.token == "+" else -1
            self.advance()
            result = _plain(result) + sign * _plain(self.product())
        self.depth -= 1
        return result

    def product(self, calls: bool = True) -> Number | Fraction:
        result = self.signed(calls)
        while self.token in _PRODUCT:
            operation = _PRODUCT[self.token]
            self.advance()
            factor = _plain(self.signed(calls))
            result = _plain(result) * factor if operation == "*" else _plain(result) / factor
        return result

    def signed(self, calls: bool) -> Number | Fraction:
        """Factors in a row; ``calls``: also functions, which end the argument of a function before them."""
        sign = 1
        while self.token in ("+", "-") and self.token:
            sign = -sign if self.token == "-" else sign
            self.advance()
        result = self.factor()
        while True:
            if self.token in _CALLS:
                if not calls:
                    break
            elif self.kind not in ("number", "percent", "letter") and self.token not in _STARTS_FACTOR:
                break
            result = _plain(result) * _plain(self.factor())
        symbol = self.kind == "command" and not self.token.startswith(("\\r", "\\}", "\\mright"))
        if self.token == "|" or (symbol and self.token not in _PRODUCT and self.token not in _CALLS):
            raise NotANumber(self.token)
        return sign * result if sign < 0 else result

    def factor(self) -> Number | Fraction:
        """An atom with its powers, factorials and primes (which mean nothing)."""
        result = self.atom()
        while self.token == "^":
            self.advance()
            result = self.power(result)
        while self.token in ("!", "'") and self.token:
            if self.token == "!":
                self.need_names()
                result = _factorial(_plain(result))
            self.advance()
        return result

    def power(self, base: Number | Fraction) -> Number:
        exponent = self.sum_in("{", "}") if self.token == "{" else self.simple()
        if isinstance(exponent, Fraction) and abs(exponent) == Fraction(1, 2):
            self.need_names()  # it is written as a square root
        return power(_plain(base), _plain(exponent))

    def sum_in(self, left: str, right: str) -> Number | Fraction:
        self.expect(left)
        result = self.sum()
        self.expect(right)
        return result

    def simple(self) -> Number | Fraction:
        r"""A number or \pi."""
        token, kind = self.token, self.kind
        if kind == "number":
            self.advance()
            return Fraction(token.replace(",", ""))
        if kind == "percent":
            self.advance()
            return Fraction(token[:-2].replace(",", "")) / 100
        if token == "\\pi":
            self.need_names()
            self.advance()
            return math.pi
        raise NotANumber(token)

    def atom(self) -> Number | Fraction:
        token = self.token
        if token in ("\\left", "\\mleft"):
            self.advance()
            opened = self.token
            if opened not in ("(", "[", "\\{", "{"):
                raise NotANumber(opened)
            self.advance()
            result = self.sum()
            self.expect("\\right" if token == "\\left" else "\\mright")
            self.expect(_OPENING[opened])
            return result
        if token in _OPENING:
            return self.sum_in(token, _OPENING[token])
        if token == "\\frac" or token == "\\binom":
            self.advance()
            upper, lower = self.sum_in("{", "}"), self.sum_in("{", "}")
            if token == "\\binom":
                return _binomial(_plain(upper), _plain(lower))
            return _plain(upper) / _plain(lower)
        if token in _CALLS or token == "\\lfloor":
            self.advance()
            return self.function(token)
        return self.simple()

    def function(self, name: str) -> Number:
        if name == "\\sqrt":
            root = _plain(self.sum_in("[", "]")) if self.token == "[" else 2
            if root == 2:
                self.need_names()
            return power(_plain(self.sum_in("{", "}")), 1 / root)
        self.need_names()
        if name == "e":
            self.expect("^")
            exponent = _plain(self.sum_in("{", "}") if self.token == "{" else self.simple())
            if exponent == 1:
                raise NotANumber("e")
            return math.exp(exponent)
        if name == "\\lfloor":
            result = self.sum()
            self.expect("\\rfloor")
            return math.floor(_plain(result))
        base: Number = 10
        if name == "\\log" and self.token == "_":
            self.advance()
            base = _plain(self.sum_in("{", "}") if self.token == "{" else self.simple())
        exponent: Number | Fraction | None = None
        if self.token == "^":
            self.advance()
            exponent = self.sum_in("{", "}") if self.token == "{" else self.simple()
        argument = _plain(self.argument())
        result = math.log(argument, base) if name == "\\log" else _FUNCTIONS[name](argument)
        if name == "\\exp" and argument == 1:
            raise NotANumber("e")
        return result if exponent is None else power(result, _plain(exponent))

    def argument(self) -> Number | Fraction:
        """What a function is applied to: a parenthesis, or the product that follows."""
        return self.sum_in("(", ")") if self.token == "(" else self.product(calls=False)

    def need_names(self) -> None:
        if not self.names:
            raise NotANumber("a name")


def _plain(value: Number | Fraction) -> Number:
    """Decimals are fractions of integers until used, so 12.0 is the integer 12."""
    if isinstance(value, Fraction):
        return value.numerator if value.denominator == 1 else value.numerator / value.denominator
    return value


def power(base: Number, exponent: Number) -> Number:
    """base ** exponent; :class:`NotANumber` for a complex or a very large one."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _MAX_BITS:
        raise NotANumber("too large")
    result = base**exponent
    if isinstance(result, complex):
        raise NotANumber("complex")
    return result


def _factorial(n: Number) -> int:
    if not isinstance(n, int) or not 0 <= n <= 2000:
        raise NotANumber(f"{n}!")
    return math.factorial(n)


def _binomial(n: Number, k: Number) -> int:
    if not isinstance(n, int) or not isinstance(k, int) or not 0 <= k <= n <= 2000:
        raise NotANumber("binomial")
    return math.comb(n, k)
