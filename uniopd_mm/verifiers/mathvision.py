r"""MathVision answers: the letter of an option, the option's value, or an expression.

``strict`` judges questions with options as choices and the others as mathematics.  The other profiles give the numbers
of published scorers, without ever executing an answer: ``upstream`` (lmms-eval) reads the whole response with a ladder
of phrases and compares values to two decimals; ``upstream_073`` is its release 0.7.3, in which roots, pi and functions
are unknown names; ``upstream_vlmevalkit`` takes an extracted answer, letters by VLMEvalKit's inference, numbers to 1e-6 (roots, pi and
functions are unknown names there too).
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.verifiers.base import NO_GOLD, Verifier, by_kind, gold_answers, outcome_of
from uniopd_mm.verifiers.choice import ChoiceVerifier, options_of
from uniopd_mm.verifiers.extract import last_boxed
from uniopd_mm.verifiers.latex_number import MAX_CHARS, Number, evaluate, exact, power
from uniopd_mm.verifiers.math import MathVerifier

if TYPE_CHECKING:
    from uniopd_mm.config import VerifierConfig

LETTERS = "ABCDEFGHIJ"
_PHRASES = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_TOLERANCE = 1e-6


def score(answer: str, gold: str, profile: str = "upstream", options: Sequence[str] = ()) -> float:
    """1 if the response is right by an upstream profile, else 0; ``options`` are those of the question, A first."""
    if profile == "upstream_vlmevalkit":
        return float(_vlmevalkit(answer, gold, options))
    names = profile == "upstream"
    found = _ladder(answer.strip())
    golds = [gold]
    if options and gold in tuple(LETTERS) and LETTERS.index(gold) < len(options):
        golds.append(options[LETTERS.index(gold)])
    return float(any(_same(wanted, found, names) for wanted in golds))


def _ladder(response: str) -> str:
    """The answer lmms-eval finds in a response, cleaned."""
    for letter in "ABCDE":
        if response.endswith((f" {letter}.", f" ({letter}).")) or response.startswith(
            (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        ):
            response = letter
    last = response.rsplit("is ", 1)[-1].rstrip(".")
    if _is_float(last):
        response = last
    if "oxed{" not in response:
        for phrase in _PHRASES:
            for form in (phrase, phrase.replace("the", "The")):
                found = form in response
                response = response.rsplit(form, 1)[-1].strip()
                if found:
                    response = response.split("\n")[0].split(". ")[0]
    elif response.count("oxed{") > 1:
        response = "\\boxed{" + response.rsplit("oxed{", 1)[-1]
    answer = _strip(_clean(response))
    for letter in "abcde":
        answer = answer.replace(f"({letter})", letter)
    for letter in "abcde":
        answer = answer.replace(f"{{{letter}}}", letter)
    return answer.rstrip(".").lstrip(":").strip()


def _is_float(text: str) -> bool:
    try:
        float(text[:MAX_CHARS])
    except ValueError:
        return False
    return len(text) <= MAX_CHARS


_DROPPED_FIRST = (
    (" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", ""), ("\\text", ""),
    ("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""),
    ("{m}^3", ""), ("m^3", ""), ("{units}", ""), ("units", ""), ("{km}", ""), ("km", ""),
)  # fmt: skip
_DROPPED_NEXT = (
    ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", ""), ("\\%", ""), ("{.", "{0."),
)  # fmt: skip


def _clean(response: str) -> str:
    """From the first box to the last brace, else everything; then what follows the last "=" without markup and units."""
    text = response.lower().replace("{}", "")
    start, end = text.find("oxed{"), text.rfind("}")
    if start >= 0 and end >= start + 5:
        text = text[start + 5 : end]
    closed, opened = text.find("}"), text.find("{")
    if closed != -1 and (opened == -1 or closed < opened):
        text = text[:closed]
    text = text.rsplit("=", 1)[-1].rsplit("\\approx", 1)[-1]
    for old, new in _DROPPED_FIRST:
        text = text.replace(old, new)
    return text


def _strip(text: str) -> str:
    for old, new in _DROPPED_NEXT:
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    for mark in ("=", "\\approx"):
        if text.count(mark) == 1:
            text = text.split(mark)[1]
    if "\\sqrt" in text:
        text = re.sub(r"\\sqrt([^{])", lambda m: f"\\sqrt{{{m[1]}}}", text, flags=re.DOTALL)
    if "sqrt" in text:
        text = _brace_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    slash = re.fullmatch(r"(-?(?:0|[1-9]\d*))/(-?(?:0|[1-9]\d*))", text, re.ASCII)
    return f"\\frac{{{slash[1]}}}{{{slash[2]}}}" if slash else text


def _brace_fractions(text: str) -> str:
    r"""``\frac12`` -> ``\frac{1}{2}``; unchanged when one of the fractions is cut short."""
    head, *parts = text.split("\\frac")
    done = [head]
    for part in parts:
        if part.startswith("{"):
            done.append(part)
        elif len(part) < 2:
            return text
        else:
            done.append(f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"))
    return "\\frac".join(done)


def _same(a: str, b: str, names: bool) -> bool:
    """Equality as lmms-eval decides it: as strings, as tuples, or as numbers to two decimals."""
    a, b = a.lower(), b.lower()
    if not a.replace(" ", "") or not b.replace(" ", ""):
        return False
    if a.strip() == b.strip():
        return True
    if len(a) > MAX_CHARS or len(b) > MAX_CHARS:
        return False
    a, b = _tuple(a, names), _tuple(b, names)
    if a == b:
        return True
    value = evaluate(a, names)
    return value is not None and value == evaluate(b, names)


def _tuple(text: str, names: bool) -> str:
    """Each item of ``(…)`` or ``[…]`` to two decimals; the text itself when one of them is no number."""
    items = text[1:-1].split(",")
    if len(items) < 2 or (text[0], text[-1]) not in (("(", ")"), ("[", "]")):
        return text
    values: list[Number | str | None] = [
        item if "infty" in item or item in ("a", "-a") else evaluate(item, names) for item in items
    ]
    if None in values:
        return text
    return text[0] + ",".join(str(value) for value in values) + text[-1]


def _vlmevalkit(answer: str, gold: str, options: Sequence[str]) -> bool:
    if not options:
        return _equal(answer, gold)
    return _equal(str(infer_choice(answer, dict(zip(LETTERS, options, strict=False)))), gold)


_ARITHMETIC = re.compile(r"[-+*/().\d\s_e]+", re.ASCII)
_SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: power,
}  # fmt: skip
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def infer_choice(answer: str, options: dict[str, str]) -> str | None:
    """The letter VLMEvalKit infers: the only one among the last five words, else the only option whose text occurs."""
    if "Failed to obtain answer via API" not in answer:
        if any(refusal in answer for refusal in _REFUSALS):
            return "Z"
        words = answer.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
        found = [letter for letter in options if letter in words]
        if len(found) == 1 and words.index(found[0]) > len(words) - 5:
            return found[0]
        if not found and "Z" in words:
            return "Z"
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return None
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


_WRAPPED = re.compile(
    r"\\(?:boxed|fbox|mbox|text(?:bf|it|rm)?|math(?:rm|bf|sf|it|tt))\s{0,9}(?:\{([^{}]*)\}|(?=[-.\d]))"
)
_UNREAD = re.compile(r"\^\s?(?:\\circ|\{\s?\\circ\s?\})|\\[()$;: !]|[\"']|\{,\}")
_MIXED = re.compile(r"(-?)(\d+)(\\[dt]?frac\{\d+\}\{\d+\})", re.ASCII)


def _equal(answer: str, gold: str) -> bool:
    """VLMEvalKit's equality: as strings, else as numbers to 1e-6, both of them Python or both LaTeX."""
    answer, gold = answer.lower().strip(), gold.lower().strip()
    if answer == gold:
        return True
    values = [(_python(text), _latex(text)) for text in (answer, gold)]
    if _bare(answer) == "a" and values[1] != (None, None):
        return True  # upstream evaluates it where the gold's value is called a
    return any(_near(a, b) for a, b in zip(*values, strict=True))


def _near(a: Number | None, b: Number | None) -> bool:
    try:
        return a is not None and b is not None and abs(a - b) < _TOLERANCE
    except OverflowError:  # an integer beyond floats
        return False


def _python(text: str) -> Number | None:
    """The value of Python arithmetic, "1.2e3" or "1/2"; None = it is none, or too large."""
    if len(text) > MAX_CHARS or not _ARITHMETIC.fullmatch(text):
        return None
    try:
        return _python_value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None


def _python_value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_python_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_python_value(node.left), _python_value(node.right))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _latex(text: str) -> Number | None:
    """The number that latex2sympy2_extended makes of an expression without roots, functions or letters."""
    text = _MIXED.sub(r"\1(\2+\3)", re.sub(r"(?<!\\)%", r"\\%", re.sub(r"\s+(?=\\?%)", "", _bare(text))))
    if text.startswith(("{", "\\{")) or text.endswith((".", "~")):
        return None
    return exact(text, names=False, whole=True)


def _bare(text: str) -> str:
    """The box, or the text (several boxes make a set), without markup that the parser does not see."""
    boxed = last_boxed(text) if text.count("\\boxed") == 1 else None
    text = (boxed or text)[: MAX_CHARS + 1]
    for _ in range(4):
        text, n_wrapped = _WRAPPED.subn(r"\1", text)
        if not n_wrapped:
            break
    return _UNREAD.sub("", text).replace("\u2212", "-").strip()


def _kind(prompt: Prompt) -> str:
    """A gold that is a letter belongs to a question with options, whether they can be read from the prompt or not."""
    golds = gold_answers(prompt)
    return "choice" if golds and all(re.fullmatch("[A-J]", gold) for gold in golds) else "math"


class MathVisionVerifier(Verifier):
    """Choice where the prompt lists options, mathematics elsewhere."""

    profiles = ("strict", "upstream", "upstream_073", "upstream_vlmevalkit")

    def __init__(self, config: VerifierConfig, profile: str | None = None) -> None:
        super().__init__(config, profile)
        self.choice, self.math = ChoiceVerifier(config), MathVerifier(config)

    def verify(self, prompt: Prompt, text: str) -> Outcome:
        return self.verify_many([(prompt, text)])[0]

    def verify_many(self, items: Sequence[tuple[Prompt, str]]) -> list[Outcome]:
        if self.profile != "strict":
            return [self._upstream(prompt, text) for prompt, text in items]
        judges = {"choice": self.choice.verify_many, "math": self.math.verify_many}
        return by_kind(items, lambda item: _kind(item[0]), judges)

    def check_golds(self, prompts: Sequence[Prompt]) -> list[str | None]:
        if self.profile != "strict":
            return super().check_golds(prompts)
        return by_kind(prompts, _kind, {"choice": self.choice.check_golds, "math": self.math.check_golds})

    def close(self) -> None:
        self.math.close()

    def _upstream(self, prompt: Prompt, text: str) -> Outcome:
        golds = gold_answers(prompt)
        if not golds:
            return Outcome(None, reason=NO_GOLD)
        options = list(options_of(prompt).values())
        best = max(score(text, gold, self.profile, options) for gold in golds)
        return outcome_of(best, _ladder(text.strip()))
