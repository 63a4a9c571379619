"""What a benchmark is: where its rows are, how one becomes a prompt, how it is asked, and what its number is.

The sixteen definitions are in ``eval/tasks``; each names its source in the comment above it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from uniopd_mm.config import SamplingConfig
from uniopd_mm.rollout import Prompt

Row = Mapping[str, Any]
"""One row as its public data set has it; images still encoded (bytes, or a path)."""
Scores = Sequence[float | None]
"""Of the samples of one row: in [0, 1]; None = unknown (a timeout, a judge that is down)."""
Profile = Literal["strict", "upstream"]
"""strict: our scoring, right where upstream is wrong; upstream: the number of the benchmark's own code."""


@dataclass(frozen=True)
class Source:
    """One place where the rows may be; a benchmark's sources are tried in order."""

    path: str
    """Hub id of the data set."""
    subset: str | None = None
    split: str = "test"
    files: tuple[str, ...] = ()
    """Files of the repository to read as they are (JSONL, Parquet, JSON), for sets that need a loading script."""
    revision: str | None = None
    n_rows: int | None = None
    """Rows of this split, where a benchmark has several."""
    late: tuple[str, ...] = ()
    """Columns of a JSONL file that are too large to hold: a row has ``{"file": ..., "offset": ...}``, where it begins in
    its file, in their place."""


@dataclass(frozen=True)
class Preset:
    """One way to ask: instructions and sampling."""

    sampling: SamplingConfig
    n: int = 1
    """Samples per row."""
    prompt: str = "{question}"
    """The user turn; what the fields are is the benchmark's."""
    system: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template, e.g. ``enable_thinking``; templates that do not know one ignore it."""
    limit: int | None = None
    """Rows, for quick looks; None = all."""


def mean_score(rows: Sequence[Row], scores: Sequence[Scores]) -> dict[str, float]:
    """``score``: mean over samples, then over rows; unknown samples count as 0, as in every benchmark."""
    means = [sum(s or 0.0 for s in row) / len(row) for row in scores if row]
    return {"score": sum(means) / len(means)} if means else {}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; pure data and small functions."""

    name: str
    """As typed: ``chartqa``."""
    title: str
    """As printed: ``ChartQA``."""
    domain: Literal["text_math", "code", "image_math", "image_logic", "chart_document", "quickstart", "own"]
    """The paper's five domains, ours, and rows of one's own."""
    sources: tuple[Source, ...]
    columns: tuple[str, ...]
    """Columns that every row must have."""
    presets: Mapping[str, Preset]
    """``paper`` (the protocol behind published numbers) and ``quick``; both always there."""
    read: Callable[[Row, Preset, Profile], Prompt]
    """A row as a prompt with its gold answer and the verifier of the profile; DataError for a row that cannot be used."""
    n_rows: int | None = None
    """Rows of the whole split; another number is an error unless it is asked for; None = not known for certain."""
    metric: str = "accuracy"
    """Name of the headline number, ``score`` of ``aggregate``, e.g. ``avg@32``, ``ANLS``."""
    aggregate: Callable[[Sequence[Row], Sequence[Scores]], dict[str, float]] = field(default=mean_score)
    """All rows and the scores of their samples -> ``score`` (the headline, a share) and further numbers."""
