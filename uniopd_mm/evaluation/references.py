"""Published numbers, to stand beside a result."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from uniopd_mm.errors import ConfigError
from uniopd_mm.evaluation.tables import align, percent


def require_published(path: Path, model: str) -> None:
    """ConfigError unless there are published numbers of the model."""
    models = list(dict.fromkeys(entry["model"] for entry in _content(path)["numbers"]))
    if Path(model).name.lower() not in map(str.lower, models):
        near = difflib.get_close_matches(model, models, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(models)}"
        raise ConfigError(f"--reference {model}: no published numbers of that model. {hint}")


def _content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def reference_text(
    path: Path, model: str | None, results: Mapping[str, Mapping[str, Any]], means: Mapping[str, float]
) -> str:
    """A table of ours and the published numbers of ``model`` (told by the last part of its name); a hint where only other
    models have any, and nothing where none has.  The mean of a domain stands beside the published one only if whole."""
    content = _content(path)
    ours = {name: result["score"] for name, result in results.items()} | dict(means)
    entries = [entry for entry in content["numbers"] if ours.get(entry["task"]) is not None]
    if not entries:
        return ""
    name = Path(model or "").name.lower()
    matching = [entry for entry in entries if entry["model"].lower() == name]
    if not matching:
        models = ", ".join(dict.fromkeys(entry["model"] for entry in entries))
        return f"Published numbers of these tasks: {models}. To see them beside yours: --reference MODEL"
    columns = list(dict.fromkeys(map(_label, matching)))
    lines = [["", "this run", *columns]]
    for task in dict.fromkeys(entry["task"] for entry in matching):
        published = {_label(entry): f"{entry['score']:.1f}" for entry in matching if entry["task"] == task}
        lines.append([task, percent(ours[task]), *(published.get(column, "-") for column in columns)])
    return f"{matching[0]['model']} in {content['paper']}:\n{align(lines, left=1)}"


def _label(entry: Mapping[str, Any]) -> str:
    """``Uni-OPD, multi-teacher``."""
    return ", ".join(filter(None, [entry["method"], entry.get("setting")]))
