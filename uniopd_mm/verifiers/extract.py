r"""What a response answers: the visible text, and the places in it that state an answer.

Everything here runs in time linear in the text, whatever a model wrote.  Answers are looked for in this order, the last
one of a kind winning: ``<answer>`` tag, ``\boxed{}``, "Answer: …" / "答案：…" phrases, then (short answers) a lone line.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Iterator

MAX_CHARS = 250_000
"""Only so many characters at the end of a visible text are searched."""
DELIMITERS = (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$"))
"""What mathematics is written between."""
_CANDIDATE_CHARS = 4000
_MAX_MARKS = 20
_MAX_LINE = 200

_LOOKALIKES = {
    "\u2212": "-",
    "\u2010": "-",
    "\u2011": "-",
    "\u2012": "-",
    "\u2013": "-",
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
}
_MEANINGFUL = ("<super>", "<sub>", "<fraction>")

_REASONING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning|analysis)>|◁(/?)think▷", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BRACES = re.compile(r"\\boxed\s{0,8}\{|\\.|[{}]", re.DOTALL)
_MARK = re.compile(
    r"(?:^[#*_ ]{1,8}(?:final\s)?answer[*_ ]{0,4}$(?=\s{1,4}[^\n]{1,200}\s{0,8}\Z)"
    r"|(?:\b|(?<=_))(?:ans(?:wers?)?|(?:correct|right|best|final)\s{1,4}(?:option|choice|letter)s?)\b(?P<quote>[\"'])?"
    r"[*_]{0,3}(?:\sto\s\w{3,4}\s(?:question|problem))?\s{0,4}"
    r"(?:(?:should|must|would|will)\s{1,4}be\b|is\b|are\b|was\b|=|:)"
    r"|(?:答案】|(?:答案|正确选项|正确答案)\s{0,4}(?:应该是|应为|应是|是|为|:))"
    r"|(?<![不没未别应该])(?:故选|应选|应该选|选择|选)\s{0,2}:?\s{0,2}(?=[(A-Z])|####)"
    r"[\s*_]{0,8}:?[\s*_]{0,8}",
    re.IGNORECASE | re.MULTILINE,
)
_JSON_VALUE = re.compile(
    r"\"((?:[^\"\\]|\\.){0,4000})\"|(\[[^\]\n]{0,400}\]|[^,}\n]{1,400})",
    re.DOTALL,
)
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it|sf|tt|cal)|operatorname|rm|bf|[mf]box)\s{0,4}\{([^{}]*)\}"
)
_BETWEEN_BOXES = re.compile(
    r"[\s$]{0,9}(?:(?:\\text\s?\{)?\s{0,4}\b(and|or)\b\s{0,4}\}?|[,;])(?:\s?\b(and|or)\b)?[\s$]{0,9}",
    re.IGNORECASE,
)
_NOISE = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f]|<\|\w{1,40}\|>|</s>|^[ \t]{0,8}```\w{0,20}[ \t]{0,8}$", re.MULTILINE
)
"""Control characters, the ends of turns that a server left in the text, and code fences."""
_ABOUT = re.compile(
    r"^\s*(?:approximately|approx\.?|about|around|roughly|≈|~|\\approx|\\sim)\s*", re.IGNORECASE
)
_FRACTION = re.compile(
    r"(\d?)\s?(?:\\frac\s?(?:\{(\d{1,15})\}\s?\{(\d{1,15})\}|(\d)\s?(\d))|([½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]))"
)
_SENTENCE_END = re.compile(r"(?:(?<=\w{3})|(?<=[\d)}$*\]%°]))[.!?](?=\s+[A-Z])|。")
_STATED = re.compile(r"(?:[\w',]{1,20}\s){1,15}?(?:is|are|was|were|has|have|equals):?\s([^=]{1,200}?)\.?")
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|~|\s+")
_DEGREE = re.compile(r"\s?\^\s?(?:\\circ\b|\{\s?\\circ\s?\})|\\degree\b")


def fold(text: str) -> str:
    """NFKC, character by character and without what alters mathematics: x² and ½ stay, full-width forms become ASCII."""
    if text.isascii():
        return text
    table = {ord(char): _fold_char(char) for char in set(text) if not char.isascii()}
    return text.translate(table)


def _fold_char(char: str) -> str:
    if char in _LOOKALIKES:
        return _LOOKALIKES[char]
    if unicodedata.category(char) == "Cf":  # writing direction and zero width
        return ""
    if unicodedata.decomposition(char).startswith(_MEANINGFUL):
        return char
    folded = unicodedata.normalize("NFKC", char)
    return folded if len(folded) <= 4 else char  # a single ligature may expand to 18 characters


def visible(text: str) -> str:
    """The folded text outside reasoning blocks."""
    return _NOISE.sub("", outside_reasoning(fold(text))[-MAX_CHARS:])


def outside_reasoning(text: str) -> str:
    """The text outside reasoning blocks.  An unclosed <think> hides all that follows, a lone </think> all before."""
    pieces: list[str] = []
    start, hidden = 0, False
    for tag in _REASONING.finditer(text):
        if tag[1] or tag[2]:
            if not hidden:
                pieces.clear()
            start, hidden = tag.end(), False
        elif not hidden:
            pieces.append(text[start : tag.start()])
            hidden = True
    return "\n".join(pieces if hidden else [*pieces, text[start:]])


def last_boxed(text: str) -> str | None:
    r"""Content of the last balanced, non-empty ``\boxed{…}`` (the innermost of nested ones)."""
    boxes = _boxes(text)
    return text[boxes[-1][1] : boxes[-1][2]].strip() if boxes else None


def stated_box(text: str) -> str | None:
    r"""``last_boxed``; boxes joined by commas, "and" or "or" are one answer, so that a hedge is not its last guess."""
    boxes = _boxes(text)
    if not boxes:
        return None
    answer = text[boxes[-1][1] : boxes[-1][2]].strip()
    for i in range(len(boxes) - 1, max(0, len(boxes) - _MAX_MARKS), -1):
        gap = text[boxes[i - 1][2] + 1 : boxes[i][0]]
        joint = _BETWEEN_BOXES.fullmatch(gap) if len(gap) < _MAX_MARKS + 20 and gap.strip("$ \t\n") else None
        if joint is None:
            break
        word = joint[1] or joint[2]
        answer = f"{text[boxes[i - 1][1] : boxes[i - 1][2]].strip()}{f' {word} ' if word else ', '}{answer}"
    return answer


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Start, content start and content end of each balanced, non-empty box, in order; of nested ones the innermost."""
    first = text.find("\\boxed")
    if first < 0:
        return []
    opened: list[tuple[int, int] | None] = []  # start and content start of each open brace; None = not a box
    boxes: list[tuple[int, int, int]] = []
    for token in _BRACES.finditer(text, first):
        if token[0] == "{":
            opened.append(None)
        elif token[0] == "}":
            box = opened.pop() if opened else None
            if box and (not boxes or box[1] > boxes[-1][1]) and text[box[1] : token.start()].strip():
                boxes.append((*box, token.start()))
        elif token[0][-1] == "{" and len(token[0]) > 2:
            opened.append((token.start(), token.end()))
    return boxes


def last_tag(text: str) -> str | None:
    """Content of the last closed, non-empty <answer>…</answer>."""
    found, start = None, None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            found = text[start : tag.start()].strip() or found
            start = None
    return found


def marked(text: str) -> list[str]:
    """What follows each "Answer:" / "答案：" on its line, and each "answer is" in its sentence; the last one first."""
    answers = []
    for mark in reversed(deque(_MARK.finditer(text), maxlen=_MAX_MARKS)):
        rest = text[mark.end() : mark.end() + _CANDIDATE_CHARS].strip()
        line = rest.split("\n", 1)[0].strip()
        if mark["quote"] and ":" in mark[0] and (value := _JSON_VALUE.match(rest)):
            listed = re.sub(r"[\[\]\"]", "", value[2] or "")
            answers.append((value[1] or listed).replace("\\\\", "\\"))
        else:
            answers.append(line if ":" in mark[0] else sentence(line))
    return [answer for answer in answers if answer]


def candidates(text: str) -> Iterator[str]:
    """Explicitly stated answers of a visible text, most trusted first."""
    tag = last_tag(text)
    for part in (tag, text):
        if part is None:
            continue
        boxed = stated_box(part)
        if boxed is not None:
            yield boxed
        yield from marked(part)
        if part is tag:
            yield part


def lone_line(text: str) -> str | None:
    """The last non-empty line when it is short enough to be an answer by itself."""
    lines = text.rstrip().rsplit("\n", 1)
    line = lines[-1].strip()
    return line if 0 < len(line) <= _MAX_LINE else None


def sentence(answer: str) -> str:
    """An answer cut at the end of its sentence ("204. This is …" -> "204"), but not inside "St. Louis"."""
    return _SENTENCE_END.split(answer, maxsplit=1)[0].strip()


def last_sentence(answer: str) -> str:
    """The last sentence of a line, without its full stop."""
    return _SENTENCE_END.split(answer.rstrip(".!。"))[-1].strip()


def stated(line: str) -> str:
    """What a sentence says that something is: "The length is 12 cm" -> "12 cm"; other lines as they are."""
    match = _STATED.fullmatch(line)
    return match[1] if match else line


def plain(answer: str) -> str:
    r"""An answer without markup: ``\text{}``, bold, dollars around it, LaTeX escapes; \dfrac as \frac, spaces collapsed."""
    answer = _DEGREE.sub("°", answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    for _ in range(4):
        answer, n_unwrapped = _WRAPPER.subn(r"\1", answer)
        if not n_unwrapped:
            break
    answer = _SPACING.sub(" ", answer).replace("**", "").replace("__", "").strip("*` ")
    for left, right in DELIMITERS:
        if len(answer) > len(left + right) and answer.startswith(left) and answer.endswith(right):
            answer = answer[len(left) : -len(right)]
    return re.sub(r"\\([%$&#_{}])", r"\1", answer).strip()


def linear_number(answer: str) -> str:
    r"""A number in one line of ASCII: "about 14" -> "14", "2½" -> "2 1/2", "\frac12" -> "1/2"; other text as it is."""

    def spell(match: re.Match[str]) -> str:
        if match[6]:
            over = unicodedata.normalize("NFKC", match[6]).replace("\u2044", "/")
        else:
            over = f"{match[2] or match[4]}/{match[3] or match[5]}"
        return f"{match[1]} {over}" if match[1] else over

    return _FRACTION.sub(spell, _ABOUT.sub("", answer.strip()))


def short_answer(text: str) -> str | None:
    """The answer of a response to a question that wants a word or a number: stated, else the lone last line."""
    text = visible(text)
    for candidate in candidates(text):
        answer = plain(candidate[:_CANDIDATE_CHARS])
        if answer:
            return answer
    line = lone_line(text)
    return plain(line) or None if line else None
