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

Line = Mapping[str, Any]
"""Of ``scores.jsonl``: one answer."""
MAY_DIFFER = (
    "sampled.model",
    "sampled.dtype",
    "sampled.engine",
    "sampled.served",
    "sampled.context",
    "run.limit",
    "run.n",
    "run.source",
    "run.data",
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
    unknown_first: int
    unknown_second: int
    """Answers to the rows compared whose outcome is unknown; they count as wrong."""


def compare_runs(first: Path, second: Path, force: bool = False) -> dict[str, Compared]:
    """Benchmark -> comparison over the rows that both runs have; ConfigError where they were made in different ways, or
    of different questions."""
    one, other = read_scores(first), read_scores(second)
    common = [name for name in one if name in other]
    if not common:
        raise ConfigError(
            f"the runs share no benchmark: {first} has {', '.join(one)}; {second} has {', '.join(other)}"
        )
    problems = []
    for name in common:
        found = setting_differences(first / name, second / name) + row_differences(one[name], other[name])
        problems += [f"  {name}: {line}" for line in found]
    if problems and not force:
        lines = [f"{first} and {second} were made in different ways:", *problems]
        raise ConfigError("\n".join([*lines, "Compare them all the same with: --force"]))
    return {name: _compare(name, one[name], other[name]) for name in common}


def setting_differences(first: Path, second: Path) -> list[str]:
    """Settings, other than the model, that make the scores of two folders hard to compare."""
    found = different(read_settings(first) or {}, read_settings(second) or {})
    return [line for line in found if not line.startswith(MAY_DIFFER)]


def row_differences(one: Sequence[Line], other: Sequence[Line]) -> list[str]:
    """What is not the same about rows that both runs have."""
    first, second = ({line["id"]: line for line in lines} for lines in (one, other))
    common = [(first[id], second[id]) for id in first if id in second]
    # Tests of programs may name the file that they are in, and stand there only in part.
    n_golds = sum(a["gold"] != b["gold"] and not a["verifier"].startswith("code") for a, b in common)
    n_prompts = sum(a.get("prompt") != b.get("prompt") for a, b in common)
    verifiers = {(a["verifier"], b["verifier"]) for a, b in common if a["verifier"] != b["verifier"]}
    found = [f"verifier: {a} -> {b}" for a, b in sorted(verifiers)]
    for number, what in ((n_prompts, "question or picture"), (n_golds, "gold answer")):
        if number:
            found.append(f"another {what} in {number} of {len(common)} rows")
    return found


def _compare(name: str, one: Sequence[Line], other: Sequence[Line]) -> Compared:
    first, second = _row_means(one), _row_means(other)
    ids = dict.fromkeys(id for id in first if id in second)
    if not ids:
        raise ConfigError(f"{name}: the runs have no row in common")
    unit_of = {line["id"]: line["unit"] for line in one}
    members: dict[str, list[str]] = {}
    for id in ids:
        members.setdefault(unit_of[id], []).append(id)
    values = [
        [sum(run[id] for id in some) / len(some) for some in members.values()] for run in (first, second)
    ]
    unknown = [sum(line["correct"] is None and line["id"] in ids for line in run) for run in (one, other)]
    return Compared(
        difference=compare(values[0], values[1]),
        first=sum(values[0]) / len(members),
        second=sum(values[1]) / len(members),
        only_first=len(first) - len(ids),
        only_second=len(second) - len(ids),
        unknown_first=unknown[0],
        unknown_second=unknown[1],
    )


def _row_means(lines: Sequence[Line]) -> dict[str, float]:
    """Mean score of the samples of each row; unknown counts as 0."""
    scores: dict[str, list[float]] = {}
    for line in lines:
        scores.setdefault(line["id"], []).append(line["score"] or 0.0)
    return {id: sum(some) / len(some) for id, some in scores.items()}
