"""What one evaluation leaves on disk.

``OUT/results.json``            every number, setting and version
``OUT/NAME/samples.jsonl``      answers in the order of the rows
``OUT/NAME/scores.jsonl``       what the verifier said of each, in the same order
``OUT/NAME/settings.json``      what was evaluated and how
``OUT/NAME/samples.html``       answers to look at
``OUT/NAME/state/HASH/``        what an interrupted run goes on from (:mod:`uniopd_mm.evaluation.samples`)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.evaluation.results import Scored, units
from uniopd_mm.evaluation.samples import write_whole
from uniopd_mm.evaluation.tasks import Task
from uniopd_mm.rollout import Prompt

SCHEMA_VERSION = 1
GOLD_CHARS = 2000
"""Golds are cut here in ``scores.jsonl``: the tests of one program can take megabytes."""


def require_writable(out: Path) -> None:
    """Make the folder of a run; ConfigError where nothing can be written into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to {out}: {error.strerror}. Give a folder for the results: --out FOLDER"
        ) from error


def write_results(out: Path, settings: Mapping[str, Any], results: Mapping[str, Any], means: Mapping) -> None:
    """``results.json``."""
    from uniopd_mm.report import collect_versions

    content = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings,
        "versions": collect_versions(),
        "results": results,
        "means": means,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "results.json", json.dumps(content, indent=2) + "\n")


def write_task(
    folder: Path, task: Task, settings: Mapping[str, Any], scored: Sequence[Scored], verifiers: Sequence[str]
) -> None:
    """Samples, scores and settings of one benchmark; ``verifiers`` has the name of each prompt's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "settings.json", json.dumps(settings, indent=2) + "\n")
    write_whole(folder / "samples.jsonl", _lines(asdict(one.sample) for one in scored))
    about = {
        prompt.id: {
            "unit": unit,
            "gold": _cut_gold(prompt),
            "verifier": name,
            "prompt": task.digests.get(prompt.id, ""),
        }
        for prompt, unit, name in zip(task.prompts, units(task.benchmark, task.rows), verifiers, strict=True)
    }
    write_whole(folder / "scores.jsonl", _lines(_score_line(one) | about[one.sample.id] for one in scored))


def read_scores(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of ``scores.jsonl`` by benchmark; ConfigError for a folder without any."""
    found = {path.parent.name: _read_lines(path) for path in sorted(run.glob("*/scores.jsonl"))}
    if not found:
        raise ConfigError(
            f"{run} holds no evaluation (no NAME/scores.jsonl in it). Give the --out folder of eval/run.py."
        )
    return found


def read_settings(folder: Path) -> dict[str, Any] | None:
    """``settings.json`` of one benchmark; None where there is none."""
    path = folder / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _score_line(one: Scored) -> dict[str, Any]:
    return {
        "benchmark": one.sample.benchmark,
        "id": one.sample.id,
        "index": one.sample.index,
        "correct": one.outcome.correct,
        "score": one.score,
        "extracted": one.outcome.extracted,
        "reason": one.outcome.reason,
    }


def _cut_gold(prompt: Prompt) -> str | list[str]:
    return prompt.answer if isinstance(prompt.answer, list) else (prompt.answer or "")[:GOLD_CHARS]


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode(
        "utf-8", "backslashreplace"
    ).decode()  # half a surrogate pair is no text that can be stored


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}:{number} is not JSON ({error}). Score the samples again: --score-only"
            ) from error
    return rows
