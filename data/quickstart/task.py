"""The "digit strips" task: real handwritten digits side by side, questions about them, and the chains that answer them.

Pure: numpy and the standard library only; no file is read or written here.  The scans are scikit-learn's bundled
``load_digits`` (1,797 scans of 8 x 8 pixels, ink 0..16).  A strip shows two or three scans on a square canvas of
three by three cells, in the middle row: two digits use the outer cells, so "left" and "right" have fixed places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCAN_SIDE = 8
"""Pixels of one scan's side."""
CELLS = 3
"""Cells along one side of the canvas."""
CANVAS_SIDE = SCAN_SIDE * CELLS
"""Side of the canvas in scan pixels: what the models' processor resizes a picture to."""
PICTURE_SCALE = 4
"""Each scan pixel is this many PNG pixels wide, so that people can see something."""
FULL_INK = 16
N_SCANS = 1797
N_TRAIN_SCANS = 1297
"""Scans 0..1296 train, 1297..1796 are held out; the file is ordered by writer, so the writers hardly mix."""

SPLITS: dict[str, range] = {"train": range(N_TRAIN_SCANS), "eval": range(N_TRAIN_SCANS, N_SCANS)}

KINDS: dict[str, str] = {
    "left": "read",
    "middle": "read",
    "right": "read",
    "sum": "arithmetic",
    "difference": "arithmetic",
}
"""Kind of question -> domain."""
DOMAINS = ("read", "arithmetic")

PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("Which digit is on the left?", "What is the left digit?"),
    "middle": ("Which digit is in the middle?", "What is the middle digit?"),
    "right": ("Which digit is on the right?", "What is the right digit?"),
    "sum": ("What is the sum of the digits?", "Add up the digits."),
    "difference": (
        "What is the left digit minus the right digit?",
        "Subtract the right digit from the left digit.",
    ),
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one strip."""

    kind: str
    digits: tuple[int, ...]
    """What the strip shows, left to right; two or three."""
    phrase: int = 0
    """Which of ``PHRASES[kind]`` asks it."""

    @property
    def text(self) -> str:
        return PHRASES[self.kind][self.phrase]

    @property
    def domain(self) -> str:
        return KINDS[self.kind]


def kinds_for(n_digits: int) -> tuple[str, ...]:
    """The kinds of question that a strip of ``n_digits`` digits admits: two digits have no middle."""
    return tuple(kind for kind in KINDS if n_digits == 3 or kind != "middle")


def working(question: Question) -> tuple[str, int]:
    """The visible step between reading and answering, and the answer; the difference is signed, left minus right."""
    digits = question.digits
    left, right = digits[0], digits[-1]
    if question.kind == "sum":
        steps, total = [], left
        for digit in digits[1:]:
            steps.append(f"{total}+{digit}={total + digit}")
            total += digit
        return " ".join(steps), total
    if question.kind == "difference":
        return f"{left}-{right}={left - right}", left - right
    digit = {"left": left, "middle": digits[len(digits) // 2], "right": right}[question.kind]
    return f"{question.kind}={digit}", digit


def answer(question: Question) -> str:
    """The gold answer, e.g. ``8`` or ``-2``."""
    return str(working(question)[1])


def chain(question: Question) -> str:
    """The response that a model is trained to give: the digits read, the working, the boxed answer.

    E.g. ``3 5: 3+5=8 \\boxed{8}``.
    """
    steps, value = working(question)
    return f"{spaced(question.digits)}: {steps} \\boxed{{{value}}}"


def spaced(digits: Sequence[int]) -> str:
    return " ".join(str(d) for d in digits)


def image_text(digits: Sequence[int]) -> str:
    """What a model that sees no images is told instead, e.g. ``digits: 3 5``."""
    return f"digits: {spaced(digits)}"


def boxed_answer(response: str) -> str | None:
    """Content of the last ``\\boxed{...}`` of a response; None without one."""
    _, found, tail = response.rpartition("\\boxed{")
    if not found or "}" not in tail:
        return None
    return tail.partition("}")[0].strip()


def cells(n_digits: int) -> tuple[int, ...]:
    """Column of each digit on the canvas."""
    return (0, 2) if n_digits == 2 else (0, 1, 2)


def canvas(scans: Sequence[np.ndarray]) -> np.ndarray:
    """Two or three scans [8, 8] (ink 0..16) on an empty canvas -> ink [24, 24] in the scans' dtype."""
    ink = np.zeros((CANVAS_SIDE, CANVAS_SIDE), dtype=np.asarray(scans[0]).dtype)
    top = SCAN_SIDE * (CELLS // 2)
    for column, scan in zip(cells(len(scans)), scans, strict=True):
        ink[top : top + SCAN_SIDE, column * SCAN_SIDE : (column + 1) * SCAN_SIDE] = scan
    return ink


def picture(scans: Sequence[np.ndarray]) -> np.ndarray:
    """The strip as people see it: grey levels uint8 [96, 96], black ink on white paper."""
    grey = np.rint(255.0 * (1.0 - canvas(scans) / FULL_INK)).astype(np.uint8)
    return np.kron(grey, np.ones((PICTURE_SCALE, PICTURE_SCALE), dtype=np.uint8))


@dataclass(frozen=True, slots=True)
class Strip:
    """One picture and the questions asked about it."""

    name: str
    """Image path below the data folder."""
    scans: tuple[int, ...]
    """Indices of the scans shown, left to right."""
    questions: tuple[Question, ...]


def draw_question(rng: np.random.Generator, digits: tuple[int, ...], domain: str | None = None) -> Question:
    """A random question about ``digits``, of ``domain`` if given; domains are equally likely, then kinds."""
    domain = domain or DOMAINS[rng.integers(len(DOMAINS))]
    kinds = [kind for kind in kinds_for(len(digits)) if KINDS[kind] == domain]
    kind = kinds[rng.integers(len(kinds))]
    return Question(kind, digits, int(rng.integers(len(PHRASES[kind]))))


def draw_strips(labels: Sequence[int], split: str, n_rows: int, seed: int) -> list[Strip]:
    """``n_rows`` questions on half as many pictures, one of each domain per picture; scans come from ``split`` alone.

    ``labels`` are the digits of all 1,797 scans.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    pool = np.asarray(SPLITS[split])
    strips = []
    for index in range((n_rows + 1) // 2):
        scans = tuple(int(i) for i in rng.choice(pool, size=int(rng.integers(2, 4)), replace=False))
        digits = tuple(int(labels[i]) for i in scans)
        questions = tuple(draw_question(rng, digits, domain) for domain in DOMAINS)
        strips.append(Strip(f"images/{split}_{index:05d}.png", scans, questions[: n_rows - 2 * index]))
    return strips


def rows(strips: Sequence[Strip]) -> list[dict[str, Any]]:
    """The strips' questions as data rows (one JSON object a line of the JSONL files)."""
    return [
        {
            "id": f"{strip.name.removeprefix('images/').removesuffix('.png')}_{question.domain}",
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
            ],
            "images": [strip.name],
            "image_text": [image_text(question.digits)],
            "answer": answer(question),
            "domain": question.domain,
            "verifier": "math",
        }
        for strip in strips
        for question in strip.questions
    ]
