"""One response, token by token: what the student and its teacher think of it, and what is masked and why."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TextIO

from uniopd_mm.preflight.checks import view_of
from uniopd_mm.preflight.findings import shorten
from uniopd_mm.rollout import Group, Rollout
from uniopd_mm.teachers import AlignedTeacher

if TYPE_CHECKING:
    from uniopd_mm.alignment import AlignedResponse
    from uniopd_mm.processors import EncodedPrompt, VLMProcessor


@dataclass(frozen=True)
class TokenRow:
    """One token of the student's; its span may be several tokens on either side."""

    index: int
    token: str
    id: int
    teacher_tokens: list[str]
    """The teacher's tokens of the span; empty where there is none, or at a later token of the same span."""
    student_lp: float
    teacher_lp: float | None
    """This token's share of the span, nats; None = masked."""
    note: str
    """Why it is masked, or that it shares a span."""


@dataclass(frozen=True)
class TokenTable:
    """One scored rollout with what both sides see before it."""

    teacher: str
    prompt: str
    domain: str
    student_prompt: str
    """Where pictures lie in the student's prompt, in words."""
    teacher_prompt: str
    rows: list[TokenRow]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def show(self, file: TextIO | None = None) -> None:
        """Print it."""
        file = file or sys.stdout
        print(f"{self.prompt} ({self.domain}), scored by teacher {self.teacher}", file=file)
        print(f"  student's prompt: {self.student_prompt}", file=file)
        print(f"  teacher's prompt: {self.teacher_prompt}", file=file)
        columns = ("#", "student token", "id", "teacher tokens", "student", "teacher", "A", "note")
        cells = [
            (
                str(row.index),
                repr(row.token),
                str(row.id),
                " ".join(map(repr, row.teacher_tokens)),
                f"{row.student_lp:.3f}",
                "masked" if row.teacher_lp is None else f"{row.teacher_lp:.3f}",
                "" if row.teacher_lp is None else f"{row.teacher_lp - row.student_lp:+.3f}",
                row.note,
            )
            for row in self.rows
        ]
        print_table(columns, cells, right=(0, 2, 4, 5, 6), file=file)


def token_table(group: Group, student: VLMProcessor, teacher: AlignedTeacher) -> TokenTable:
    """The first rollout of a group that ``teacher`` scored."""
    rollout = group.rollouts[0]
    aligned = teacher.aligner.align(rollout.response_ids, rollout.finish)
    return TokenTable(
        teacher=teacher.name,
        prompt=group.prompt.id,
        domain=group.prompt.domain,
        student_prompt=_pictures(group.encoded),
        teacher_prompt=f"{_pictures(teacher.encode(group))} (view {view_of(teacher, group.prompt.domain)})",
        rows=_rows(rollout, aligned, student, teacher),
    )


def _rows(
    rollout: Rollout, aligned: AlignedResponse, student: VLMProcessor, teacher: AlignedTeacher
) -> list[TokenRow]:
    assert rollout.student_logprobs is not None and rollout.scored is not None
    assert rollout.teacher_logprobs is not None
    strings = student.decode_tokens(rollout.response_ids)
    theirs = teacher.processor.decode_tokens(aligned.teacher_ids)
    spans = aligned.spans()
    rows = []
    for t, (token, token_id) in enumerate(zip(strings, rollout.response_ids.tolist(), strict=True)):
        k = int(aligned.student_span[t])
        span = next((s for s in spans if s.s0 <= t < s.s1), None) if k >= 0 else None
        is_scored = bool(rollout.scored[t])
        note = "" if is_scored else why_masked(t, rollout, aligned, teacher)
        if is_scored and span is not None and span.s1 - span.s0 > 1:
            note = f"one span of {span.s1 - span.s0} tokens" if t == span.s0 else "the same span"
        rows.append(
            TokenRow(
                index=t,
                token=token,
                id=token_id,
                teacher_tokens=theirs[span.t0 : span.t1] if span is not None and t == span.s0 else [],
                student_lp=float(rollout.student_logprobs[t]),
                teacher_lp=float(rollout.teacher_logprobs[t]) if is_scored else None,
                note=note,
            )
        )
    return rows


def why_masked(t: int, rollout: Rollout, aligned: AlignedResponse, teacher: AlignedTeacher) -> str:
    """Why token ``t`` of the response has no teacher log-probability."""
    aligner = teacher.aligner
    token = int(rollout.response_ids[t])
    vocab = aligner.student
    if token in aligner.vision_ids:
        return "vision token"
    if not 0 <= token < len(vocab.tokens) or vocab.tokens[token] is None:
        return "an id without a token"
    span = int(aligned.student_span[t])
    if span < 0:
        if token in vocab.special_ids or token in vocab.added.values():
            return "special token that the teacher has not"
        if not aligner.by_id and vocab.pieces[token] is None:
            return "no bytes: the token stands for no text"
        if aligned.problem and not bool((aligned.student_span[t:] >= 0).any()):
            return aligned.problem
        return "no token boundary here that both sides share"
    if rollout.unscored_reason:
        return rollout.unscored_reason
    if teacher.settings.align == "exact" and int((aligned.student_span == span).sum()) > 1:
        return "span of several tokens (align=exact)"
    return "the teacher's value is not finite"


def _pictures(encoded: EncodedPrompt) -> str:
    spans = encoded.image_spans
    n = len(encoded.input_ids)
    where = ", ".join(f"{start}..{end - 1} ({end - start})" for start, end in spans[:8])
    more = f", and {len(spans) - 8} more" if len(spans) > 8 else ""
    if not spans:
        return f"{n} tokens, no picture"
    return f"{n} tokens, {len(spans)} picture{'s' if len(spans) > 1 else ''} at tokens (count) {where}{more}"


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int] = (),
    file: TextIO | None = None,
) -> None:
    """Rows under their column heads, the columns ``right`` flush right: drawn on a terminal, else aligned text."""
    out = file or sys.stdout
    rows = [[shorten(cell, 72) for cell in row] for row in rows]
    if out.isatty() and os.environ.get("TERM") != "dumb" and find_spec("rich") is not None:
        _draw(columns, rows, right, out)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in [columns, *rows]:
        cells = [
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip(), file=out, flush=True)


def _draw(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int], file: TextIO) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        style = "dim" if "masked" in row else ""
        table.add_row(*(Text(cell, style=style) for cell in row))
    Console(file=file, width=shutil.get_terminal_size((100, 24)).columns).print(table)
