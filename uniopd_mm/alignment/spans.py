"""Spans: stretches of the response that whole student tokens and whole teacher tokens both cover.

Offsets are bytes.  T = student tokens, U = teacher tokens, S = spans; log-probabilities in nats.
A token without bytes belongs to the span that follows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

_INVALID = re.compile("([\udc80-\udcff]+)")  # how `surrogateescape` spells bytes that are not UTF-8
_NEGLIGIBLE = 1e-6  # nats; below it the student's own shares are rounding noise


class Span(NamedTuple):
    """Student tokens [s0, s1) and teacher tokens [t0, t1) that hold the same bytes."""

    s0: int
    s1: int
    t0: int
    t1: int


def text_chunks(data: bytes) -> list[tuple[int, str | None]]:
    """The maximal stretches of ``data`` as (byte offset, text); text None: bytes that are not UTF-8."""
    chunks: list[tuple[int, str | None]] = []
    at = 0
    for i, part in enumerate(_INVALID.split(data.decode("utf-8", "surrogateescape"))):
        if part:
            chunks.append((at, None if i % 2 else part))
            at += len(part.encode("utf-8", "surrogateescape"))
    return chunks


def matched_ends(pieces: Sequence[bytes | None], data: bytes) -> tuple[list[int], bool]:
    """End offsets of the leading pieces that spell ``data``, and whether all pieces spell exactly all of it.

    A tokenizer that normalises its input spells something else: the match ends at the first piece that
    differs (None never matches).  One space put before the text has no width: some begin every text so.
    """
    plain = _ends(pieces, data)
    if not pieces or not (pieces[0] or b"").startswith(b" "):
        return plain
    spaced = _ends([(pieces[0] or b"")[1:], *pieces[1:]], data)
    return max(plain, spaced, key=lambda match: (match[1], match[0][-1] if match[0] else 0))


def cuts(ends: Iterable[int], start: int = 0) -> dict[int, int]:
    """Byte offset -> number of tokens before the boundary there; ascending."""
    at = {start: 0}
    for count, end in enumerate(ends, start=1):
        at.setdefault(end, count)  # the first: tokens without bytes come after the boundary
    return at


def byte_spans(student_cuts: dict[int, int], teacher_cuts: dict[int, int]) -> list[Span]:
    """The finest spans: between consecutive offsets where both sides have a token boundary."""
    common = [offset for offset in teacher_cuts if offset in student_cuts]
    return [
        Span(student_cuts[a], student_cuts[b], teacher_cuts[a], teacher_cuts[b]) for a, b in pairwise(common)
    ]


def piece_ends(pieces: Iterable[bytes]) -> list[int]:
    """Cumulative byte offsets of the ends of consecutive pieces."""
    return list(accumulate(len(piece) for piece in pieces))


def share_spans(
    teacher_lp_U: Tensor, student_lp_T: Tensor, teacher_span_U: Tensor, student_span_T: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:
    """Each span's teacher log-probability shared over its student tokens [T], and where it is one [T] bool.

    Shares are proportional to the student's own log-probabilities, equal where those are all about 0.  Span
    -1 is no span.  ``exact``: only spans of a single student token.  A span with a teacher value that is not
    finite is not scored.  0 where not scored.
    """
    import torch

    device, dtype = teacher_lp_U.device, torch.promote_types(teacher_lp_U.dtype, torch.float32)
    teacher_span_U, student_span_T = teacher_span_U.to(device), student_span_T.to(device)
    n = int(torch.cat([teacher_span_U, student_span_T]).max()) + 1 if student_span_T.numel() else 0
    held_U, held_T = teacher_span_U >= 0, student_span_T >= 0
    span = student_span_T[held_T]
    total_S = _sums(teacher_lp_U.detach()[held_U], teacher_span_U[held_U], n)
    own = student_lp_T.detach().to(device)[held_T].double()
    mass_S, count_S = _sums(own, span, n), torch.bincount(span, minlength=n).double()
    even_S = ~mass_S.isfinite() | (mass_S.abs() < _NEGLIGIBLE)
    part = torch.where(even_S[span], 1.0 / count_S[span], own / mass_S[span])

    usable_S = total_S.isfinite() & ((count_S == 1) | (not exact))
    scored_T = held_T.clone()
    scored_T[held_T] = usable_S[span]
    shared_T = torch.zeros_like(held_T, dtype=torch.float64)
    shared_T[held_T] = torch.where(usable_S[span], total_S[span] * part, 0.0)
    return shared_T.to(dtype), scored_T


def _sums(values: Tensor, span: Tensor, n: int) -> Tensor:
    values = values.double()
    return values.new_zeros(n).index_add(0, span, values)


def _ends(pieces: Sequence[bytes | None], data: bytes) -> tuple[list[int], bool]:
    ends: list[int] = []
    at = 0
    for piece in pieces:
        if piece is None or not data.startswith(piece, at):
            break
        at += len(piece)
        ends.append(at)
    return ends, len(ends) == len(pieces) and at == len(data)
