"""What a stub server knows: a scoring function, how images expand, and the log-probabilities that follow from them.

P = ids of the expanded prompt.  ``logprobs[j]`` is log p(ids[j] | ids before j) in nats, None at j = 0.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

Ids = list[int]
Images = list[Image.Image]
Span = tuple[int, int]
"""Offset and length in the expanded prompt."""


def encode_bytes(text: str) -> Ids:
    """A byte-level vocabulary: ids below 256 are the bytes of UTF-8."""
    return list(text.encode())


def decode_bytes(ids: Ids) -> str:
    """Id by id, so that halves of a character all read as the same replacement; ids from 256 on as ``<id>``."""
    return "".join(bytes([t]).decode(errors="replace") if t < 256 else f"<{t}>" for t in ids)


class Refusal(Exception):
    """An answer with an error status: what the request handler sends instead of a reply."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(str(body))
        self.status, self.body = status, body

    @classmethod
    def openai(cls, status: int, message: str, param: str | None = None) -> Refusal:
        """As vLLM writes its errors."""
        kinds = {403: "PermissionDeniedError", 404: "NotFoundError", 401: "AuthenticationError"}
        kind = kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        return cls(status, {"error": {"message": message, "type": kind, "param": param, "code": status}})


@dataclass
class Weights:
    """What a stub server was told to load."""

    folder: str | None = None
    version: str = "default"


@dataclass(frozen=True)
class Teacher:
    """The model behind a stub server."""

    score: Callable[[Ids, Images], Sequence[float]]
    """(expanded ids, images) -> log p of ids[1:], each given the ids before it."""
    expand: Callable[[Ids, int], Ids | tuple[Ids, Sequence[Span]]] | None = None
    """(collapsed ids, number of images) -> expanded ids, or these and the span of each image."""
    distribution: Callable[[Ids, Images], Sequence[Sequence[float]]] | None = None
    """(expanded ids, images) -> [P-1, V] log p of every id; without it other ids are scored one by one."""
    sample: Callable[[Ids, Images, dict[str, Any]], list[tuple[Ids, list[float]]]] | None = None
    """(expanded ids, images, sampling parameters) -> tokens and log-probabilities of each of the n answers."""
    model: str = "teacher"
    marker: int | None = None
    """The id that stands for one image in collapsed ids; None = found by what ``expand`` multiplies."""
    vocab_size: int | None = None
    max_logprobs: int = 20
    max_model_len: int = 4096
    encode: Callable[[str], Ids] = encode_bytes
    decode: Callable[[Ids], str] = decode_bytes
    lock: threading.Lock = field(default_factory=threading.Lock)
    weights: Weights = field(default_factory=Weights)

    def read(self, collapsed: Ids, images: Images) -> Scored:
        """Expand and score a prompt; without images every id is text, as on the real servers."""
        ids, spans, marker = list(collapsed), [], None
        if images and self.expand is not None:
            expanded = self.expand(list(collapsed), len(images))
            told = isinstance(expanded, tuple)
            ids = list(expanded[0] if told else expanded)
            marker = self.marker if self.marker is not None else _find_marker(collapsed, ids, len(images))
            spans = list(expanded[1]) if told else _find_spans(collapsed, ids, len(images), marker)
        if len(ids) > self.max_model_len:
            raise Refusal.openai(
                400,
                f"This model's maximum context length is {self.max_model_len} tokens. "
                f"However, your prompt has {len(ids)} input tokens.",
                "input_tokens",
            )
        logprobs = self._score(ids, images)
        return Scored(self, images, ids, logprobs, spans, list(range(len(ids))), marker, ids)

    def generate(self, scored: Scored, params: dict[str, Any], count: int) -> list[tuple[Ids, list[float]]]:
        """n answers of at most ``count`` tokens; a stub without ``sample`` writes the id 0 over and over."""
        if self.sample is not None and count > 0:
            with self.lock:
                return self.sample(list(scored.true_ids), scored.images, params)
        filler = [0] * count
        wanted = params.get("logprobs") is not None or bool(params.get("return_logprob"))
        logprobs = [0.0] * count
        if wanted and count > 0:
            logprobs = [
                value or 0.0 for value in self._score([*scored.true_ids, *filler], scored.images)[-count:]
            ]
        return [(filler, logprobs)] * int(params.get("n") or 1)

    def _score(self, ids: Ids, images: Images) -> list[float | None]:
        with self.lock:
            values = [float(value) for value in self.score(list(ids), images)]
        if len(values) != len(ids) - 1:
            raise ValueError(
                f"score returned {len(values)} values for {len(ids)} ids; give one per id after the first."
            )
        return [None, *values]

    def rows(self, ids: Ids, images: Images) -> Sequence[Sequence[float]] | None:
        if self.distribution is None:
            return None
        with self.lock:
            return self.distribution(list(ids), images)


@dataclass(frozen=True)
class Scored:
    """A prompt as a server sees it, perhaps disturbed by a fault."""

    teacher: Teacher
    images: Images
    ids: Ids
    """[P] as reported."""
    logprobs: list[float | None]
    """[P] as reported."""
    spans: list[Span]
    origin: list[int]
    """[P] position in ``true_ids``."""
    marker: int | None
    true_ids: Ids
    """What was really scored."""

    def take(self, keep: list[int], spans: list[Span]) -> Scored:
        """The same with these positions only, in this order."""
        return replace(
            self,
            ids=[self.ids[at] for at in keep],
            logprobs=[self.logprobs[at] for at in keep],
            origin=[self.origin[at] for at in keep],
            spans=spans,
        )

    def is_image(self, position: int) -> bool:
        return any(offset <= position < offset + length for offset, length in self.spans)

    def of(self, position: int, tokens: Ids) -> list[float]:
        """log p of each of ``tokens`` in the place of ids[position], -inf for the padding -1."""
        rows = self.teacher.rows(self.true_ids, self.images)
        return [self._of(position, token, rows) for token in tokens]

    def _of(self, position: int, token: int, rows: Sequence[Sequence[float]] | None) -> float:
        at = self.origin[position]
        if token == self.true_ids[at] or self.is_image(position):
            value = self.logprobs[position]  # at an image the numbers of real servers mean nothing either
            return math.nan if value is None else value
        if token < 0:
            return -math.inf
        if rows is not None:
            return float(rows[at - 1][token])
        if any(token == self.ids[offset + i] for offset, length in self.spans for i in range(length)):
            return -math.inf  # a lone image token would be an image too many for ``score``
        changed = [*self.true_ids[:at], token, *self.true_ids[at + 1 :]]
        value = self.teacher._score(changed, self.images)[at]
        return math.nan if value is None else value

    def top(self, position: int, k: int) -> list[tuple[int, float]]:
        """The k likeliest ids there, best first; none where ``vocab_size`` is not known."""
        values = self.of(position, list(range(self.teacher.vocab_size or 0)))
        return sorted(enumerate(values), key=lambda pair: -pair[1])[:k]


def _find_marker(collapsed: Ids, expanded: Ids, n_images: int) -> int | None:
    found = [t for t in dict.fromkeys(collapsed) if collapsed.count(t) == n_images != expanded.count(t)]
    return found[0] if found else None


def _find_spans(collapsed: Ids, expanded: Ids, n_images: int, marker: int | None) -> list[Span]:
    """Where the images lie, by finding the text between them again."""
    if marker is None or collapsed.count(marker) != n_images:
        raise ValueError(
            f"Which of the {len(collapsed)} ids stand for the {n_images} images cannot be told: give StubServer "
            "marker=, or let expand return (ids, [(offset, length), ...])."
        )
    starts = [at for at, token in enumerate(collapsed) if token == marker]
    texts = [collapsed[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(collapsed)], strict=True)]
    spans, begin = [], starts[0]
    for number, text in enumerate(texts):
        left = len(texts) - number  # images side by side share what is there equally
        room = len(expanded) - sum(map(len, texts[number:])) - begin
        is_last = left == 1
        length = room // left if not text and not is_last else None
        end = begin + length if length else len(expanded) - len(text)
        if text and not is_last:
            end = next(e for e in range(begin + 1, len(expanded)) if expanded[e : e + len(text)] == text)
        spans.append((begin, end - begin))
        begin = end + len(text)
    return spans


def open_image(source: Any) -> Image.Image:
    """A picture out of a data URI, plain base64 or ``{"url": ...}``; ValueError for anything else."""
    if isinstance(source, dict):
        source = source.get("url")
    if not isinstance(source, str):
        raise ValueError(f"an image has to be a base64 string, not {type(source).__name__}")
    try:
        data = base64.b64decode(
            source.partition(",")[2] if source.startswith("data:") else source, validate=True
        )
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except (binascii.Error, OSError) as error:
        raise ValueError(f"cannot identify image: {error}") from error
    return picture


Disturb = Callable[[Scored], Scored]
"""What the fault of this call makes of the scored tokens; the same object where it does not act on them."""
