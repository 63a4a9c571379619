"""Two runs on the same rows: which one is better, and can it be chance?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniopd_mm.errors import ConfigError
from uniopd_mm.evaluation.folder import read_scores, read_settings
from uniopd_mm.evaluation.samples import different
from uniopd_mm.evaluation.statistics import Difference, compare

MAY_DIFFER = (
    "sampled.model",
    "sampled.dtype",
    "sampled.engine",
    "sampled.context",
    "run.limit",
    "run.n",
    "run.source",
    "run.preset",
)
"""What two runs are compared in, what does not change a single answer, and names for what is compared in full."""


@dataclass(frozen=True)
class Compared:
    """Two runs on one benchmark."""

    difference: Difference
    first: float
    second: float
    """Mean scores over what both answered."""
    only_first: int
    only_second: int
    """Rows that only one of them has."""


def compare_runs(first: Path, second: Path, force: bool = False) -> dict[str, Compared]:
    """Benchmark -> comparison over the rows that both runs have; ConfigError where they were made in different ways."""
    one, other = read_scores(first), read_scores(second)
    common = [name for name in one if name in other]
    if not common:
        raise ConfigError(
            f"the runs share no benchmark: {first} has {', '.join(one)}; {second} has {', '.join(other)}"
        )
    problems = []
    for name in common:
        problems += [f"  {name}: {line}" for line in setting_differences(first / name, second / name)]
    if problems and not force:
        lines = [f"{first} and {second} were made in different ways:", *problems]
        raise ConfigError("\n".join([*lines, "Compare them all the same with: --force"]))
    return {name: _compare(name, one[name], other[name]) for name in common}


def setting_differences(first: Path, second: Path) -> list[str]:
    """Settings, other than the model, that make the scores of two folders hard to compare."""
    found = different(read_settings(first) or {}, read_settings(second) or {})
    return [line for line in found if not line.startswith(MAY_DIFFER)]


def _compare(name: str, one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> Compared:
    first, second = _row_means(one), _row_means(other)
    ids = [id for id in first if id in second]
    if not ids:
        raise ConfigError(f"{name}: the runs have no row in common")
    unit_of = {line["id"]: line["unit"] for line in one}
    members: dict[str, list[str]] = {}
    for id in ids:
        members.setdefault(unit_of[id], []).append(id)
    values = [
        [sum(run[id] for id in some) / len(some) for some in members.values()] for run in (first, second)
    ]
    return Compared(
        difference=compare(values[0], values[1]),
        first=sum(values[0]) / len(members),
        second=sum(values[1]) / len(members),
        only_first=len(first) - len(ids),
        only_second=len(second) - len(ids),
    )


def _row_means(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean score of the samples of each row; unknown counts as 0."""
    scores: dict[str, list[float]] = {}
    for line in lines:
        scores.setdefault(line["id"], []).append(line["score"] or 0.0)
    return {id: sum(some) / len(some) for id, some in scores.items()}
