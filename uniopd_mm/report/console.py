"""What a person at a terminal (or reading a batch job's log) sees of a run; rank 0 only.

On a terminal: one progress bar with time left and the phase that runs now, summaries above it.  Elsewhere:
plain lines without escape codes.  Lines are broken at the terminal's width, 80 columns where there is none.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TextIO

import uniopd_mm
from uniopd_mm.report.metrics import format_metric, name_in

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_WIDTH: Final = 80
_EVAL: Final = "eval/accuracy"
_ETA_STEPS: Final = 50
_SUMMARY_STEPS: Final = 5
_STEP_SUMMARY: Final = {
    "train/gap": "gap {value} nats/token{was}",
    "train/accuracy": "accuracy {value}",
    "train/inverted_share": "inverted {value}",
    "train/entropy": "entropy {value}",
    "rollout/length": "length {value}",
    "rollout/truncated_share": "truncated {value}",
    "train/unknown_share": "unknown {value}",
    "perf/tokens_per_s": "{value} tokens/s",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One row of the final table; ``metric`` decides how the two values are written, None = not measured."""

    label: str
    metric: str
    before: float | None
    after: float | None


class Console:
    """Progress of one run.  A context manager: leaving it takes the progress bar off the terminal.

    ``history`` is what a resumed run logged before, for "was ... at step 1".  Phases are timed on every rank.
    """

    def __init__(
        self,
        rank: int,
        total_steps: int,
        start_step: int = 0,
        *,
        history: Iterable[Mapping[str, Any]] = (),
        file: TextIO | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self.start_step = total_steps, start_step
        self.interval_s = interval_s
        self.current_phase: str | None = None
        self._file = file or sys.stdout
        self._clock = clock
        self._speaks = rank == 0
        self._tty = self._speaks and _can_draw(self._file)
        self.width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if self._tty else PLAIN_WIDTH
        self._progress: Progress | None = None
        self._phases: list[str] = []
        self._times: dict[str, float] = {}
        self._charged_at = self._phase_began = clock()
        self._ends: deque[float] = deque(maxlen=_ETA_STEPS + 1)
        self._printed_at = -float("inf")
        self._first: dict[str, tuple[int, float]] = {}
        for row in history:
            self._remember(int(row["step"]), row)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and show it; an inner phase is not counted twice."""
        self._start()
        self._charge()
        self._phases.append(name)
        self._show_phase()
        try:
            yield
        finally:
            self._charge()
            self._phases.pop()
            self._show_phase()

    def take_times(self) -> dict[str, float]:
        """Wall-clock seconds of each phase since the last call, as metrics ``time/NAME_s``."""
        self._charge()
        times, self._times = self._times, {}
        return {f"time/{name}_s": seconds for name, seconds in times.items()}

    def header(self, *, student: str, teachers: Mapping[str, str], device: str, run: str) -> None:
        """The first lines of a run: who learns from whom, on what, into which folder."""
        names = [
            f"teacher {model}" if len(teachers) == 1 else f"teacher {name}: {model}"
            for name, model in teachers.items()
        ]
        resumed = f" (resumed at step {self.start_step})" if self.start_step else ""
        parts = [
            f"uniopd-mm {uniopd_mm.__version__}",
            f"student {student}",
            *names,
            device,
            f"run {run}{resumed}",
        ]
        self._print(pack(parts, self.width, separator="   "), "bold")

    def check(self, name: str, text: str, ok: bool | None) -> None:
        """The result of one check before training; None = a warning, or not applicable: to be read."""
        word, style = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("note", "yellow")}[ok]
        head = f"check  {word:<7}  {name}: "
        self._print(_wrap(head + text, self.width, indent=16), style)

    def note(self, text: str) -> None:
        """One line in between, e.g. where a checkpoint was written."""
        self._print(_wrap(text, self.width, indent=2))

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Summary of a step, from 1; at most one every ``interval_s`` between the first and the last."""
        self._remember(step, metrics)
        now = self._clock()
        if self._ends:
            self._ends.append(now)
        else:
            self._start()
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)
        if step not in (self.start_step + 1, self.total_steps) and now - self._printed_at < self.interval_s:
            return
        self._printed_at = now
        self._print([*self._progress_lines(step, metrics), *self._metric_lines(step, metrics)])

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Held-out accuracy, overall and per domain, with what it was at the first evaluation."""
        self._remember(step, metrics)
        if len(self._ends) == 1:  # before the first step: no part of the pace that eta_s goes by
            self._ends[0] = self._clock()
        parts = [f"eval at step {step}: accuracy {_show(_EVAL, metrics)}{self._was(step, _EVAL)}"]
        parts += [f"{name} {_show(key, metrics)}" for key, name in _per_domain(metrics)]
        self._print(pack(parts, self.width), "cyan")

    def table(self, rows: Sequence[Change]) -> None:
        """The final table, before -> after, with the difference."""
        cells = [("", "before", "after", "change"), *map(_cells, rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        room = self.width - sum(widths[1:]) - 6
        widths[0] = min(widths[0], max(room, 8))
        lines = [
            "  ".join([_clip(name, widths[0]).ljust(widths[0]), *map(str.rjust, numbers, widths[1:])])
            for name, *numbers in cells
        ]
        self._print([line.rstrip() for line in lines])

    def close(self) -> None:
        """Take the progress bar off; lines may still be printed after it."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._tty = False

    def eta_s(self, step: int) -> float | None:
        """Seconds left at the pace of the last steps, evaluations included; None before the first."""
        if len(self._ends) < 2:
            return None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self.total_steps - step)

    def _start(self) -> None:
        """The clock of the run starts with its first phase, not while models load."""
        if self._ends:
            return
        self._ends.append(self._clock())
        if self._tty:
            self._progress = _progress_bar(self, self._file)
            self._progress.add_task("run", total=self.total_steps, completed=self.start_step)
            self._progress.start()

    def _charge(self) -> None:
        now = self._clock()
        if self._phases:
            self._times[self._phases[-1]] = self._times.get(self._phases[-1], 0.0) + now - self._charged_at
        self._charged_at = now

    def _show_phase(self) -> None:
        self.current_phase = self._phases[-1] if self._phases else None
        self._phase_began = self._charged_at

    def phase_text(self) -> str:
        """The running phase and its seconds so far, e.g. ``sample 9 s``."""
        if self.current_phase is None:
            return ""
        return f"{self.current_phase} {format_duration(self._clock() - self._phase_began)}"

    def _remember(self, step: int, metrics: Mapping[str, Any]) -> None:
        for key in ("train/gap", _EVAL):
            value = _number(metrics, key)
            if value is not None and key not in self._first:
                self._first[key] = (step, value)

    def _was(self, step: int, key: str) -> str:
        first_step, first = self._first.get(key, (step, 0.0))
        return f" (was {format_metric(key, first)} at step {first_step})" if first_step != step else ""

    def _progress_lines(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        eta = self.eta_s(step)
        parts = [f"step {step}/{self.total_steps}", f"{100 * step / self.total_steps:.0f} %"]
        parts += [f"eta {format_duration(eta)}"] if eta is not None and step < self.total_steps else []
        phases = [(name_in("time/NAME_s", key), key) for key in metrics]
        times = [f"{name} {_short(_number(metrics, key) or 0.0)}" for name, key in phases if name]
        return pack([*parts, *([" ".join(times) + " s"] if times else [])], self.width)

    def _metric_lines(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        parts = [
            template.format(value=_show(key, metrics), was=self._was(step, key))
            for key, template in _STEP_SUMMARY.items()
            if (value := _number(metrics, key)) is not None and (value or key != "train/unknown_share")
        ]
        return pack(parts, self.width, first="  ")

    def _print(self, lines: Sequence[str], style: str | None = None) -> None:
        if not self._speaks:
            return
        if self._tty:
            self._rich_print("\n".join(lines), style)
            return
        print("\n".join(lines), file=self._file, flush=True)

    def _rich_print(self, text: str, style: str | None) -> None:
        from rich.console import Console as RichConsole
        from rich.text import Text

        console = (
            self._progress.console
            if self._progress is not None
            else RichConsole(file=self._file, width=self.width)
        )
        console.print(Text(text, style=style or ""), soft_wrap=True)


def summarize(events: Sequence[Mapping[str, Any]]) -> list[Change]:
    """Rows of the final table: first and last evaluation, means of (up to five) first and last steps."""
    evals = [row for row in events if _number(row, _EVAL) is not None]
    first, last = (evals[0], evals[-1]) if evals else ({}, {})
    scores = [(_EVAL, "held-out accuracy"), *((key, f"  {name}") for key, name in _per_domain(last))]
    rows = [Change(label, key, _number(first, key), _number(last, key)) for key, label in scores]
    steps = [row for row in events if "train/loss" in row or "train/gap" in row]
    some = max(1, min(_SUMMARY_STEPS, len(steps) // 2))
    head, tail = steps[:some], steps[-some:]
    labels = {"train/gap": "token gap, nats", "train/inverted_share": "inverted groups"}
    timed = dict.fromkeys(key for row in steps for key in row if name_in("time/NAME_s", key))
    labels |= {key: f"{name_in('time/NAME_s', key)}, per step" for key in timed}
    rows += [Change(label, key, _mean(head, key), _mean(tail, key)) for key, label in labels.items()]
    return [row for row in rows if row.before is not None or row.after is not None]


def pack(
    parts: Iterable[str], width: int, separator: str = "  ", indent: str = "  ", first: str = ""
) -> list[str]:
    """Parts laid side by side, going to a new indented line where the next one would pass ``width``."""
    lines: list[str] = []
    line = first
    for part in parts:
        longer = line + (separator if line.strip() else "") + part
        if len(longer) > width and line.strip():
            lines.append(line)
            longer = indent + part
        line = longer
    return [*lines, line] if line.strip() else lines


def _wrap(text: str, width: int, indent: int) -> list[str]:
    """Paths stay whole, even where they are too long, so that they can be copied."""
    room = " " * indent
    return textwrap.wrap(text, width, subsequent_indent=room, break_long_words=False, break_on_hyphens=False)


def format_duration(seconds: float) -> str:
    """``42 s``, ``3 min 10 s``, ``1 h 52 min``, ``2 d 3 h``."""
    whole = max(0, round(seconds))
    for size, name, small, small_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"


def _progress_bar(console: Console, file: TextIO) -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Remaining(ProgressColumn):
        def render(self, task: Task) -> Text:
            eta = console.eta_s(int(task.completed))
            return Text(f"eta {format_duration(eta)}" if eta is not None else "eta ?", style="cyan")

    class Phase(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(console.phase_text(), style="magenta")

    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:.0f} %"),
        Remaining(),
        Phase(),
        console=RichConsole(file=file, width=console.width),
        transient=True,
        refresh_per_second=4,
    )


def _can_draw(file: TextIO) -> bool:
    return file.isatty() and os.environ.get("TERM") != "dumb" and importlib.util.find_spec("rich") is not None


def _short(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 0.1 else f"{seconds:.2f}"


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return float(value) if value is not None else None


def _show(key: str, metrics: Mapping[str, Any]) -> str:
    value = _number(metrics, key)
    return "?" if value is None else format_metric(key, value)


def _per_domain(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and names of the held-out accuracies per domain, sorted."""
    found = ((key, name_in("eval/NAME/accuracy", key)) for key in sorted(metrics))
    return [(key, name) for key, name in found if name]


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [value for row in rows if (value := _number(row, key)) is not None]
    return sum(values) / len(values) if values else None


def _cells(row: Change) -> tuple[str, str, str, str]:
    before, after = (("-" if v is None else format_metric(row.metric, v)) for v in (row.before, row.after))
    if row.before is None or row.after is None:
        return row.label, before, after, ""
    change = format_metric(row.metric, row.after - row.before).replace("%", "points")
    return row.label, before, after, change if change.startswith("-") else f"+{change}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 2]}.."
