"""Tokens: two vocabularies, and which of a teacher's tokens score which of the student's.

The teacher scores the student's *response*.  With equal vocabularies ids go over one to one; with different
ones the response is written again in the teacher's tokens and both are laid side by side by their bytes
(``spans``).  Vision tokens never go over.

T = student tokens, U = teacher tokens, V = ids of a vocabulary; log-probabilities in nats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from uniopd_mm.alignment.spans import (
    Span,
    byte_spans,
    cuts,
    matched_ends,
    piece_ends,
    share_spans,
    text_chunks,
)
from uniopd_mm.errors import AlignmentError

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["auto", "span", "exact"]

_TEXT, _LEFT_OUT = -1, -2  # where a student token goes when not to one teacher id; ids are never negative
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_PROBE = "The answer: 2 + 3 = 5, déjà vu."


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What the alignment knows of a tokenizer.  Built by :func:`vocabulary`."""

    tokens: tuple[str | None, ...]
    """[V] the vocabulary string of each id; None = an id without a token."""
    pieces: tuple[bytes | None, ...]
    """[V] the bytes each id stands for; None = a special token, or bytes unknown."""
    special_ids: frozenset[int]
    """Ids that are never text: end of turn, padding, placeholders."""
    added: dict[str, int]
    """Tokens beside the trained vocabulary, special or literal text such as ``<think>``: string -> id."""
    drops_first_space: bool = False
    """Decoding leaves out a space at the very beginning (SentencePiece with a dummy prefix)."""
    unreadable: str = ""
    """Why the bytes are unknown; such a vocabulary can only be aligned with an equal one."""


def vocabulary(tokenizer: Any) -> Vocabulary:
    """The facts of a transformers tokenizer: byte-level BPE, or SentencePiece-like (``▁``, ``<0x0A>``)."""
    ids = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
    for token, index in ids.items():
        tokens[index] = token
    marks = tokenizer.added_tokens_decoder
    special = frozenset(tokenizer.all_special_ids) | {index for index, mark in marks.items() if mark.special}
    ordinary = [t for i, t in enumerate(tokens) if t is not None and i not in marks and i not in special]
    added = {token: i for i, token in enumerate(tokens) if token is not None and (i in marks or i in special)}
    make = partial(Vocabulary, tokens=tuple(tokens), special_ids=special, added=added)

    to_bytes = _reader(ordinary)
    if to_bytes is None:
        reason = "its tokens are spelled neither in the byte-level alphabet nor with ▁ for spaces"
        return make(pieces=(None,) * len(tokens), unreadable=reason)
    pieces = [
        None if t is None or i in special else _literal(t, to_bytes) if i in marks else to_bytes(t)
        for i, t in enumerate(tokens)
    ]
    problem = _misread(tokenizer, pieces)
    if problem:
        return make(pieces=(None,) * len(tokens), unreadable=problem)
    return make(pieces=tuple(pieces), drops_first_space=_drops_first_space(tokenizer, tokens, pieces))


def text_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Plain text to ids for :class:`Aligner`: adds nothing; special tokens spelled in the text stay text."""
    return partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)


def same_vocabulary(student: Vocabulary, teacher: Vocabulary) -> bool:
    """Whether ids mean the same on both sides; further special or added tokens on one side do not matter."""
    return not difference(student, teacher)


def difference(student: Vocabulary, teacher: Vocabulary) -> str:
    """How two vocabularies differ, for messages; empty if ids mean the same on both sides."""
    shared = list(zip(student.tokens, teacher.tokens, strict=False))
    if student.tokens[: len(shared)] != teacher.tokens[: len(shared)]:
        unequal = [i for i, (a, b) in enumerate(shared) if a != b and a is not None and b is not None]
        if unequal:
            i = unequal[0]
            return (
                f"{len(unequal)} of {len(shared)} shared ids stand for different tokens, first id {i}: "
                f"{shared[i][0]!r} in the student, {shared[i][1]!r} in the teacher"
            )
    for name, mine, other in (("student", student, teacher), ("teacher", teacher, student)):
        lacking = [i for i, t in enumerate(mine.tokens) if t is not None and _token(other, i) is None]
        extra = [i for i in lacking if mine.tokens[i] not in mine.added]
        if extra:
            i = extra[0]
            return f"{len(extra)} ordinary tokens only the {name} has, first id {i}: {mine.tokens[i]!r}"
    return ""


@dataclass(frozen=True, eq=False)
class AlignedResponse:
    """What the teacher must score of one response, and how its values come back to the student's tokens."""

    teacher_ids: Tensor
    """[U] int64, the response in the teacher's tokens; empty if nothing can be scored."""
    student_span: Tensor
    """[T] int64 span of each student token; -1 = unscored."""
    teacher_span: Tensor
    """[U] int64 span of each teacher token; -1 = context only, its value is not used."""
    ordinary: Tensor
    """[T] bool: text, neither special nor vision."""
    problem: str = ""
    """Why the response could not be followed to its end; empty if it could."""

    def to_student(
        self, teacher_lp_U: Tensor, student_lp_T: Tensor, mode: Mode = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Teacher log-probabilities on the student's tokens [T], and where they are meaningful [T] bool.

        Index u of ``teacher_lp_U`` holds log p(teacher_ids[u] | before).  ``exact``: only spans of one
        student token; otherwise a span's sum is shared in proportion to the student's own log-probabilities.
        """
        for name, values, ids in (
            ("teacher", teacher_lp_U, self.teacher_span),
            ("student", student_lp_T, self.student_span),
        ):
            if values.shape != ids.shape:
                raise AlignmentError(
                    f"the response has {len(ids)} {name} tokens but got {name} log-probabilities of shape "
                    f"{tuple(values.shape)}. Pass one value per token of the response, without the prompt."
                )
        return share_spans(
            teacher_lp_U, student_lp_T, self.teacher_span, self.student_span, exact=mode == "exact"
        )

    def coverage(self, mode: Mode = "auto") -> float:
        """Share of ordinary student tokens that are scored, in [0, 1]; 1 if there are none."""
        scored = self.student_span >= 0
        if mode == "exact":
            sizes = self.student_span[scored].bincount(minlength=1)
            scored = scored & (sizes[self.student_span.clamp(min=0)] == 1)
        n = int(self.ordinary.sum())
        return int((scored & self.ordinary).sum()) / n if n else 1.0

    def spans(self) -> list[Span]:
        """The scored spans in order."""
        student, teacher = _ranges(self.student_span.tolist()), _ranges(self.teacher_span.tolist())
        return [Span(*student[k], *teacher[k]) for k in sorted(student)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Aligner:
    """Lays responses of one student onto the tokens of one teacher."""

    student: Vocabulary
    teacher: Vocabulary
    student_stop_ids: Sequence[int]
    """The end-of-turn token first."""
    teacher_stop_ids: Sequence[int]
    """The end-of-turn token first."""
    vision_ids: AbstractSet[int] = frozenset()
    """The student's vision tokens: never scored and never shown to the teacher."""
    teacher_vision_ids: AbstractSet[int] = frozenset()
    """The teacher's vision tokens: never in ``teacher_ids``, where each would want an image."""
    encode_text: Callable[[str], Sequence[int]] | None = None
    """Text to teacher ids as :func:`text_encoder` does it; needed for different vocabularies."""

    def __post_init__(self) -> None:
        if self.by_id:
            return
        what = f"The vocabularies differ ({difference(self.student, self.teacher)})"
        for name, side in (("student", self.student), ("teacher", self.teacher)):
            if side.unreadable:
                raise AlignmentError(
                    f"{what}, so responses are aligned by their bytes, but the {name}'s tokens cannot be "
                    f"read as bytes: {side.unreadable}. Choose a pair with equal vocabularies or models with "
                    "byte-level or SentencePiece tokenizers."
                )
        if self.encode_text is None:
            raise AlignmentError(f"{what}: pass encode_text=text_encoder(teacher_tokenizer).")

    @cached_property
    def by_id(self) -> bool:
        """Equal vocabularies: ids go over as they are."""
        return same_vocabulary(self.student, self.teacher)

    def align(self, response_ids: Tensor | Sequence[int], finish: str) -> AlignedResponse:
        """The response in the teacher's tokens; ``finish`` "stop": its last token may be the end of turn."""
        import torch

        ids = torch.as_tensor(response_ids, dtype=torch.int64).tolist()
        goes = [self._goes_to(token) for token in ids]
        if finish == "stop" and ids and self._may_end_turn(ids[-1]):
            goes[-1] = self._end_of_turn(ids[-1])

        teacher_ids: list[int] = []
        spans: list[Span] = []
        problem = ""
        for is_text, group in groupby(range(len(ids)), key=lambda t: goes[t] == _TEXT):
            at = list(group)
            if not is_text:
                for t in at:
                    if goes[t] != _LEFT_OUT:
                        spans.append(Span(t, t + 1, len(teacher_ids), len(teacher_ids) + 1))
                        teacher_ids.append(goes[t])
                continue
            run_ids, run_spans, problem = self._align_text(ids[at[0] : at[-1] + 1], at[0] == 0)
            spans += [_moved(span, at[0], len(teacher_ids)) for span in run_spans]
            teacher_ids += run_ids
            if problem:  # what follows would be scored after a different text
                break
        return self._response(ids, teacher_ids, spans, problem)

    def _goes_to(self, token: int) -> int:
        """The teacher id a student token maps to, or ``_TEXT`` (by its bytes), or ``_LEFT_OUT``."""
        string = _token(self.student, token)
        if string is None or token in self.vision_ids:
            return _LEFT_OUT
        twin = token if self.by_id and _token(self.teacher, token) is not None else None
        if not self.by_id and string in self.student.added:
            twin = self.teacher.added.get(string)
        if twin is not None:
            return _LEFT_OUT if twin in self.teacher_vision_ids else twin
        return _LEFT_OUT if self.by_id or self.student.pieces[token] is None else _TEXT

    def _may_end_turn(self, token: int) -> bool:
        """A stop token that is a mark; a stop word of ordinary text stays text."""
        is_mark = _token(self.student, token) in self.student.added
        return token in self.student_stop_ids and (is_mark or token == self.student_stop_ids[0])

    def _end_of_turn(self, token: int) -> int:
        """The student's end of turn goes to the teacher's, whatever their strings.

        A further stop token keeps its own meaning where the teacher stops at it too.
        """
        own = self._goes_to(token)
        if token != self.student_stop_ids[0] and own in self.teacher_stop_ids:
            return own
        return self.teacher_stop_ids[0] if self.teacher_stop_ids else _LEFT_OUT

    def _align_text(self, ids: list[int], first: bool) -> tuple[list[int], list[Span], str]:
        """A run of text: teacher ids, spans within the run, where the teacher's text departs from it."""
        encode = self.encode_text
        assert encode is not None
        pieces = [self.student.pieces[token] or b"" for token in ids]
        if first and self.student.drops_first_space:
            pieces[0] = pieces[0].removeprefix(b" ")
        data = b"".join(pieces)
        student_cuts = cuts(piece_ends(pieces))
        teacher_ids: list[int] = []
        spans: list[Span] = []
        for start, text in text_chunks(data):
            if text is None:
                # The teacher reads a replacement character, as a person would; it scores nothing.
                teacher_ids += [token for token in encode("\ufffd") if self._teacher_piece(token) is not None]
                continue
            wanted = text.encode()
            found = encode(text)
            ends, whole = matched_ends([self._teacher_piece(token) for token in found], wanted)
            common = byte_spans(student_cuts, cuts((start + end for end in ends), start))
            spans += [_moved(span, 0, len(teacher_ids)) for span in common]
            teacher_ids += found  # what lies behind the last span is cut off in the end
            if not whole:
                end = ends[-1] if ends else 0
                left = wanted[end : end + 24].decode(errors="replace")
                return teacher_ids, spans, f"the teacher's tokenizer changes the text from {left!r} on"
        return teacher_ids, spans, ""

    def _teacher_piece(self, token: int) -> bytes | None:
        if token in self.teacher_vision_ids or not 0 <= token < len(self.teacher.pieces):
            return None
        return self.teacher.pieces[token]

    def _response(
        self, ids: list[int], teacher_ids: list[int], spans: list[Span], problem: str
    ) -> AlignedResponse:
        import torch

        last = max((span.t1 for span in spans), default=0)
        del teacher_ids[last:]  # nothing behind the last span is worth scoring
        student_span, teacher_span = [-1] * len(ids), [-1] * len(teacher_ids)
        for k, (s0, s1, t0, t1) in enumerate(spans):
            student_span[s0:s1] = [k] * (s1 - s0)
            teacher_span[t0:t1] = [k] * (t1 - t0)
        hidden = self.student.special_ids | self.vision_ids
        ordinary = [token not in hidden and _token(self.student, token) is not None for token in ids]
        return AlignedResponse(
            teacher_ids=torch.tensor(teacher_ids, dtype=torch.int64),
            student_span=torch.tensor(student_span, dtype=torch.int64),
            teacher_span=torch.tensor(teacher_span, dtype=torch.int64),
            ordinary=torch.tensor(ordinary, dtype=torch.bool),
            problem=problem,
        )


def _token(vocab: Vocabulary, index: int) -> str | None:
    return vocab.tokens[index] if 0 <= index < len(vocab.tokens) else None


def _moved(span: Span, student: int, teacher: int) -> Span:
    return Span(span.s0 + student, span.s1 + student, span.t0 + teacher, span.t1 + teacher)


def _ranges(labels: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Label -> [first, last + 1) of its positions; -1 is no label."""
    found: dict[int, tuple[int, int]] = {}
    for i, label in enumerate(labels):
        if label >= 0:
            found[label] = (found.get(label, (i, i))[0], i + 1)
    return found


def _reader(ordinary: list[str]) -> Callable[[str], bytes | None] | None:
    """How this vocabulary spells bytes; None if in no known way."""
    alphabet = _byte_alphabet()

    def from_alphabet(token: str) -> bytes | None:
        return bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else None

    if sum(from_alphabet(token) is None for token in ordinary) <= len(ordinary) // 100:
        return from_alphabet  # a few vocabularies hold some literal tokens as well; their bytes stay unknown
    if any("▁" in token for token in ordinary):
        return _sentencepiece_bytes
    return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, as character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _literal(token: str, to_bytes: Callable[[str], bytes | None]) -> bytes:
    """The bytes of an added text token: spelled as it is, except that SentencePiece's ▁ stays a space."""
    return _sentencepiece_bytes(token) if to_bytes is _sentencepiece_bytes else token.encode()


def _misread(tokenizer: Any, pieces: Sequence[bytes | None]) -> str:
    """How the bytes of a probe sentence differ from what the tokenizer decodes; empty if they agree."""
    ids = [i for i in tokenizer.encode(_PROBE, add_special_tokens=False) if pieces[i] is not None]
    ours = b"".join(pieces[i] or b"" for i in ids).decode(errors="replace").lstrip(" ")
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False).lstrip(" ")
    return "" if ours == decoded else f"the bytes of its tokens read {ours!r} where it decodes {decoded!r}"


def _drops_first_space(tokenizer: Any, tokens: Sequence[str | None], pieces: Sequence[bytes | None]) -> bool:
    """Found by decoding a token that begins with ▁."""
    spaced = (
        i for i, t in enumerate(tokens) if pieces[i] is not None and t and re.fullmatch("▁[A-Za-z]+", t)
    )
    index = next(spaced, None)
    return index is not None and not tokenizer.decode([index], clean_up_tokenization_spaces=False).startswith(
        " "
    )
