"""What the text benchmarks share: chat turns, stable ids, answers that cannot be used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.benchmark import Preset, Row, Scores
from uniopd_mm.rollout import Message

NO_THINKING = {"enable_thinking": False}
"""G-OPD, on which the paper's text numbers rest, switches the thinking of chat templates off."""


def turns(preset: Preset, **fields: str) -> tuple[Message, ...]:
    """The preset's turns with its fields filled in."""
    system = ({"role": "system", "content": preset.system},) if preset.system else ()
    return (*system, {"role": "user", "content": preset.prompt.format(**fields)})


def row_id(name: str, row: Row, *columns: str) -> str:
    """``name/value`` of the first of the columns that the row has, else ``name/digest`` of the row's problem."""
    for column in columns:
        if row.get(column) not in (None, ""):
            return f"{name}/{row[column]}"
    return f"{name}/{hashlib.sha256(text_of(name, row, 'problem').encode()).hexdigest()[:12]}"


def text_of(name: str, row: Row, column: str) -> str:
    """The column's text (numbers as text); :class:`DataError` where there is none."""
    value = row.get(column)
    text = "" if value is None else str(value)
    if not text.strip():
        raise DataError(f"{name}: a row has no '{column}'; its columns: {', '.join(map(str, row))}")
    return text


def zero_filled(scores: Sequence[Scores]) -> list[list[float]]:
    """Scores of the rows that have samples, unknown ones as 0, which is what every published number does."""
    return [[score or 0.0 for score in row] for row in scores if row]
