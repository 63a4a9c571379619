"""Progress of a long count with the time left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from uniopd_mm.report.console import format_duration

if TYPE_CHECKING:
    from rich.progress import Progress

FIRST_S = 5.0
"""Before the first line where no bar can be drawn: an early word of how long it will take."""
INTERVAL_S = 30.0
"""Between two further lines."""


class ProgressLine:
    """Call it with (done, total); a context manager, one for each thing counted."""

    def __init__(
        self,
        name: str,
        unit: str = "answers",
        shown: bool = True,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``shown`` False: says nothing (ranks other than the first)."""
        self.name, self.unit, self.shown = name, unit, shown
        self.file, self.clock = file or sys.stderr, clock
        self.started = clock()
        self.said: float | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if not self.shown or not total:
            return
        left = f"{self.unit}  eta {self.left(done, total)}"
        if self._bar is None and _can_draw(self.file):
            self._bar = _bar(self.file)
            self._bar.add_task(self.name, total=total, left=left)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, left=left)
        elif done and (self._is_due() or (done == total and self.said is not None)):
            self.said = self.clock()
            print(f"{self.name}: {done}/{total} {left}", file=self.file, flush=True)

    def _is_due(self) -> bool:
        if self.said is None:
            return self.clock() - self.started >= FIRST_S
        return self.clock() - self.said >= INTERVAL_S

    def left(self, done: int, total: int) -> str:
        """Time left at the pace so far, for people; ``?`` before the first."""
        if not done:
            return "?"
        return format_duration((self.clock() - self.started) / done * (total - done))


def _can_draw(file: TextIO) -> bool:
    return file.isatty() and os.environ.get("TERM") != "dumb" and importlib.util.find_spec("rich") is not None


def _bar(file: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[left]}"),
        console=Console(file=file),
        transient=True,
        refresh_per_second=4,
    )
