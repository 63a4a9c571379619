r"""Multiple choice: one letter, a set of letters, or the text of an option.

``strict`` reads the options out of the prompt, so an answer may name an option by letter or by its text; naming several
letters where one is asked is wrong.  The ``upstream_…`` profiles give the numbers of the benchmarks' own scorers.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence

from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers import numeric
from uniopd_mm.verifiers.base import NO_GOLD, Verifier, gold_answers
from uniopd_mm.verifiers.exact import normalize
from uniopd_mm.verifiers.extract import (
    candidates,
    fold,
    last_sentence,
    lone_line,
    marked,
    plain,
    stated,
    visible,
)

_MAX_CHARS = 500
_TAIL_CHARS = 4000
_LETTER = r"[(\[{]?\s?([A-Z])\s?[)\]}]?"
_SINGLE = re.compile(r"[(\[{<]?(?P<letter>[A-Za-z])[)\]}>]?")
_SET = re.compile(
    rf"{_LETTER}[.:]?(?:\s?(?:,|;|/|&|、|\s|and\b|or\b|和|或)\s?(?:and\s|or\s)?{_LETTER}[.:]?){{1,25}}"
)
_LABEL = re.compile(r"(?:[(\[][A-Za-z][)\]]|[A-Z][)\].:、]|[a-z][).](?=\s))[\s.:]*")
_LETTER_TEXT = re.compile(r"[(\[]?(?P<letter>[A-Za-z])[)\]]?[\s.:)\]、,]*(?:-\s)?(?P<text>.+)", re.DOTALL)
_TEXT_LETTER = re.compile(r"(?P<text>.+)\((?P<letter>[A-Z])\)", re.DOTALL)
_LONE_LETTER = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")
_SENTENCE = re.compile(
    rf"(?:{_LETTER}\s?(?:,|/|&|、|and\b|or\b|和|或)\s?){{0,25}}[(\[]?([A-Z])[)\]]?(?![\w'-]|\s?=)", re.ASCII
)
_CORRECTION = re.compile(r"[.…,;?-]+(?:\s?(?:no|wait|actually)\b[\s.…,:;-]*)+")
_NOUN = r"(?:option|choice|letter|figure|solution|answer|选项)"
_LEAD = re.compile(
    rf"^(?:both|{_NOUN}s?)\s?:?\s?(?:{_NOUN}\s?)?(?=[(\[]?(?-i:[A-Z](?![a-z])|[a-z](?![A-Za-z])))",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"[AI]\s+(?!(?:is|and)\b)[a-z]")
"""ASCII words after A or I, which then are words themselves."""
_REASON = re.compile(r",?\s\(?(?:because|since|rather|instead)\b|(?:,\s|\s?\()(?:as|not)\b|,?因为")
_END = re.compile(r"[.!](?=\s+[A-Z])")
_DOUBT = re.compile(r"\b(?:or|not|wrong|incorrect)\b|[?或错不]")
_VERDICT = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|and|clearly|consequently|i\s(?:think|believe|guess)(?:\sthat)?"
    r"|所以|因此|故|综上)[,\s]{0,3}){0,3}"
    r"(?:(?:it(?:'s|\sis|\smust\sbe)|i(?:'d|'ll|\swould|\swill)?\s(?:choose|pick|select|go\swith|say))\s)?"
    rf"(?:the\s)?{_NOUN}?\s?[(\[]?(?P<letter>(?-i:[A-Z]))[)\]]?"
    r"(?:\s(?:is|must\sbe|should\sbe|would\sbe)\s(?:the\s)?(?:correct|right|best)?\s?(?:answer|option|choice|one)?"
    r"|(?:选项)?是?正确(?:的|答案)?)?",
    re.IGNORECASE,
)
"""A line that does nothing but choose: "So I pick (C)", "Option C is correct"."""
_OPTION_LINE = re.compile(
    r"^[ \t]{0,8}(?:(?i:choices|options):[ \t]?)?[(\[]?([A-Z])[)\].:、][ \t]{0,8}(\S[^\n]{0,500})$",
    re.MULTILINE,
)
_OPTION_INLINE = re.compile(r"(?:^|(?<=[\s;,]))\(?([A-Z])[).:]\s?")


def options_of(prompt: Prompt) -> dict[str, str]:
    """Options listed in the prompt, letter -> text: a line each, or inline as in "A. 3; B. 4"."""
    text = fold(user_text(prompt))
    lines = [(m[1], m[2].strip()) for m in _OPTION_LINE.finditer(text)]
    options = _consecutive(lines)
    if options:
        return options
    marks = list(_OPTION_INLINE.finditer(text))
    ends = [m.start() for m in marks[1:]] + [len(text)]
    return _consecutive(
        [(m[1], text[m.end() : end].strip(" ;,\n")) for m, end in zip(marks, ends, strict=False)]
    )


def user_text(prompt: Prompt) -> str:
    """Text of the last user turn."""
    turns = [m.get("content") for m in prompt.messages if m.get("role") == "user"]
    content = turns[-1] if turns else ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content or () if part.get("type") == "text")


def _consecutive(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """The last run of pairs lettered A, B, C, …; {} if it is shorter than two."""
    start = max((i for i, (letter, _) in enumerate(pairs) if letter == "A"), default=len(pairs))
    run = {}
    for (letter, text), expected in zip(pairs[start:], string.ascii_uppercase, strict=False):
        if letter != expected:
            break
        run[letter] = text
    return run if len(run) >= 2 else {}


def parse_letters(answer: str, options: dict[str, str], in_sentence: bool = False) -> frozenset[str] | None:
    """The letters an answer names; None = none, or alternatives.  ``in_sentence``: words may follow ("C because …")."""
    answer = _corrected(plain(answer[:_MAX_CHARS].rstrip(" .。!")).strip("\"'"))
    known = set(options) or set("ABCDEFGH")
    short = _LEAD.sub("", answer)
    for reading in (answer, short, _REASON.split(short)[0]):
        named = _SINGLE.fullmatch(reading) or _VERDICT.fullmatch(reading)
        if named and named["letter"].upper() in known:
            return frozenset(named["letter"].upper())
        if letter := _option_text(reading, options):
            return frozenset(letter)
    if short and list(short) == sorted(set(short)) and known.issuperset(short):  # "ABD"
        return frozenset(short)
    match = _SET.fullmatch(short) or (in_sentence and _SENTENCE.match(short)) or _LABEL.match(short)
    if not match:
        return None
    found, rest = frozenset(_LONE_LETTER.findall(match[0].upper())), short[match.end() :]
    said = match[0] + _END.split(_REASON.split(rest)[0])[0]
    others = known.intersection(_LONE_LETTER.findall(said)) - found
    is_other = _option_text(rest.strip(" .,:)-"), options) not in (None, *found)
    is_doubtful = others or is_other or _DOUBT.search(said) or _ARTICLE.match(short)
    return found if found <= known and not is_doubtful else None


def _corrected(answer: str) -> str:
    """What an answer ends up with: "B... no, wait: C" -> "C"."""
    return _CORRECTION.split(answer)[-1]


def _option_text(answer: str, options: dict[str, str]) -> str | None:
    """The option whose text an answer is, alone or with its letter: "heart", "A. heart", "A heart", "heart (A)"."""
    for pattern in (_LETTER_TEXT, _TEXT_LETTER):
        match = pattern.fullmatch(answer)
        if match and _same_text(match["text"], options.get(match["letter"].upper(), "")):
            return match["letter"].upper()
    same = [letter for letter, text in options.items() if _same_text(answer, text)]
    if not same and (found := numeric.parse(answer)):  # "45 degrees" for "45°"
        quantities = {letter: numeric.parse(text) for letter, text in options.items()}
        same = [letter for letter, option in quantities.items() if option and numeric.same(found, option)]
    return same[0] if len(same) == 1 else None


def _same_text(answer: str, option: str) -> bool:
    """Equal but for form, spaces and articles."""
    found, wanted = (re.sub(r"^(?:a|[Aa]n)\s", "", text) for text in (answer, option))
    return normalize(found).replace(" ", "") == normalize(wanted).replace(" ", "")


def extract(text: str, options: dict[str, str]) -> frozenset[str] | None:
    """Letters chosen by a response; None = no choice found."""
    text = visible(text)
    sentences = set(marked(text))
    for candidate in candidates(text):
        if found := parse_letters(candidate, options, in_sentence=candidate in sentences):
            return found
    for line in _lone_lines(text):
        found = parse_letters(line, options)
        line = _REASON.split(_corrected(plain(line)))[0]
        label = _LABEL.match(line)
        # "A. The heart is wrong because" enumerates; "A. heart" answers.
        rest = line[label.end() :] if label else ""
        if found and (len(found) > 1 or not rest or _is_answer(rest, options, text)):
            return found
    last = last_sentence(plain(lone_line(text) or ""))
    thing = stated(last)  # "The angle is 45°."
    letter = _option_text(thing, options) if 1 < len(thing) < len(last) and not _DOUBT.search(last) else None
    return frozenset(letter) if letter else None


def _lone_lines(text: str) -> Iterator[str]:
    last = lone_line(text) or ""
    first = text.lstrip()[: _MAX_CHARS + 1].split("\n", 1)[0]
    return (line for line in dict.fromkeys((last, first, last_sentence(last))) if 0 < len(line) <= _MAX_CHARS)


def _is_answer(rest: str, options: dict[str, str], text: str) -> bool:
    """A labelled line gives its option's text in a response that does not list the others too."""
    if not options:
        return "\n" not in text.strip()
    is_list = len({match[1] for match in _OPTION_LINE.finditer(text[-_TAIL_CHARS:])}) > 1
    return not is_list and _option_text(rest, options) is not None


def gold_letters(gold: str, options: dict[str, str]) -> frozenset[str] | None:
    """Letters of a gold answer, given as letters or as the text of an option."""
    return parse_letters(fold(gold), options)


def score(answer: str, gold: str, profile: str = "strict") -> float:
    """1 if the answer (letters for ``strict``, the whole response otherwise) is right by the profile, else 0."""
    if profile == "upstream_ai2d":
        return ai2d(ai2d_filter(answer), gold)
    if profile == "upstream_visulogic":
        return float(_visulogic(answer) == gold.strip().upper()[:1])
    if profile == "upstream_visulogic_vlmevalkit":
        return float(_visulogic_vlmevalkit(answer) == gold)
    found, wanted = gold_letters(answer, {}), gold_letters(gold, {})
    if found is None or wanted is None:
        return float(normalize(answer) == normalize(gold))
    return float(found == wanted)


def ai2d_filter(text: str) -> str:
    """What lmms-eval's AI2D takes for the answer: the letter of a leading "X.", else the whole response."""
    match = re.match(r"\s*([A-Z])\.", text)
    return match[1] if match else text


def ai2d(answer: str, gold: str) -> float:
    """1 if lmms-eval's AI2D takes both for the same: case and ASCII punctuation are dropped, spaces are not."""
    found, wanted = (text.lower().translate(_NO_PUNCTUATION) for text in (answer, gold))
    return float(found == wanted)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_VISULOGIC = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"<answer>\s*\(?([A-D])\)?\s*</answer>",
        r"\\boxed\{\s*([A-D])\s*\}",
        r"answer\s*(?:is|:|-)\s*\(?([A-D])\)?\b",
        r"option\s*([A-D])\b",
        r"\(([A-D])\)",
    )
]


def _visulogic(text: str) -> str:
    """lmms-eval's VisuLogic: the last match of the first pattern that matches; else a response of three characters."""
    text = text.strip()
    for pattern in _VISULOGIC:
        if letters := pattern.findall(text):
            return letters[-1].upper()
    first = text[:1].upper()
    return first if len(text) <= 3 and first in set("ABCD") else ""


_VISULOGIC_PHRASES = [
    "answer:",
    *(
        f"{phrase}{colon}"
        for colon in (":", "")
        for phrase in (
            "the final answer is",
            "the answer is option",
            "the answer is",
            "the correct answer is option",
            "the correct answer is",
            "the answer should be",
        )
    ),
]


def _visulogic_vlmevalkit(text: str) -> str:
    """VLMEvalKit's VisuLogic: a boxed letter, else a letter at an end of the response or right after a phrase."""
    boxed = _vlmevalkit_boxed(text).strip()
    if boxed in tuple("ABCD"):
        return boxed
    text = text.replace("<|endoftext|>", "")
    for letter in "ABCD":
        if text.endswith((f" {letter}.", f" ({letter}).")):
            return letter
        if text.startswith((f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")):
            return letter
    rest = text.lower()
    for phrase in _VISULOGIC_PHRASES:
        if phrase in rest:
            rest = rest.split(phrase)[-1].strip().split("\n")[0].split(".")[0]
            if rest.upper() in tuple("ABCD"):
                return rest.upper()
    return text if text in tuple("ABCD") else "Z"


def _vlmevalkit_boxed(text: str) -> str:
    """The last outermost box with markup removed; the whole text when it holds more than a letter, or there is none."""
    starts: list[int] = []
    boxed = None
    for match in re.finditer(r"\\boxed\{|[^\\]\}", text):
        if match[0].endswith("{"):
            starts.append(match.end())
        elif starts:
            start = starts.pop()
            if not starts:
                boxed = text[start : match.start() + 1]
    if not boxed:
        return text
    for markup in ("\\text{", "\\rm{", "\\mathbf{", "$", "}"):
        boxed = boxed.replace(markup, "")
    return text if "letter" in boxed.lower() or "or" in boxed or len(boxed) > 2 else boxed


class ChoiceVerifier(Verifier):
    """Letters, sets of letters, or option texts."""

    profiles = ("strict", "upstream_ai2d", "upstream_visulogic", "upstream_visulogic_vlmevalkit")

    def extract(self, prompt: Prompt, text: str) -> str | None:
        if self.profile != "strict":
            return text
        letters = extract(text, options_of(prompt))
        return ", ".join(sorted(letters)) if letters else None

    def score(self, answer: str, gold: str, prompt: Prompt) -> float:
        if self.profile != "strict":
            return score(answer, gold, self.profile)
        letters = gold_letters(gold, options_of(prompt))
        return score(answer, ", ".join(sorted(letters)) if letters else gold)

    def check_golds(self, prompts: Sequence[Prompt]) -> list[str | None]:
        return [_gold_problem(gold_answers(prompt), options_of(prompt)) for prompt in prompts]


def _gold_problem(golds: Sequence[str], options: dict[str, str]) -> str | None:
    if not golds:
        return NO_GOLD
    bad = next((gold for gold in golds if gold_letters(gold, options) is None), None)
    return None if bad is None else f"gold answer {bad[:200]!r} is neither letters nor the text of an option"
