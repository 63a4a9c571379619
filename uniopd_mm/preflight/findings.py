"""What a check says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from uniopd_mm.errors import UniOPDError

Topic = Literal["data", "models", "templates", "alignment", "sampling", "grounding"]
"""What checks are grouped by, in the order they are shown in."""


@dataclass(frozen=True)
class Finding:
    """One check; ``ok`` None = a warning, or it does not apply here: to be read, but no reason to stop."""

    name: str
    text: str
    ok: bool | None
    topic: Topic = "models"


class PreflightError(UniOPDError, RuntimeError):
    """A check failed; training would go wrong."""


def require_ok(findings: Sequence[Finding]) -> None:
    """Raise with every failed check."""
    failed = [f"{f.name}: {f.text}" for f in findings if f.ok is False]
    if failed:
        raise PreflightError("\n  ".join(["checks before training failed:", *failed]))


def shorten(text: str, length: int = 60) -> str:
    """One line of at most ``length`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 2]}.."
