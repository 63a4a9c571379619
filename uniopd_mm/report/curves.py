"""Training curves as one picture: held-out accuracy, token gap, inverted groups, lengths and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from uniopd_mm.report.metrics import name_in
from uniopd_mm.report.records import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by people with any colour vision; black is kept for the overall curve.
COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_STYLES: Final = ("-", "--", ":")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
_BARS: Final = 40
_SMOOTH_FROM: Final = 20
_LEAST_RANGE: Final = 10.0
_PHASES: Final = ("sample", "verify", "score", "update", "eval", "save")

Event = Mapping[str, Any]
Curve = tuple[list[int], list[float]]


def plot_curves(metrics_path: str | Path, png_path: str | Path) -> Path:
    """Draw a metrics.jsonl into a PNG; panels without data say so.  Needs the ``train`` extra."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('curves need matplotlib: pip install "uniopd-mm[train]"') from error
    events = read_metrics(metrics_path)
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure, events)
    png_path = Path(png_path)
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=110)
    return png_path


def curve(events: Sequence[Event], key: str, scale: float = 1.0) -> Curve:
    """Steps and values of one metric; events that lack it or have null are left out."""
    found = [(int(row["step"]), scale * float(row[key])) for row in events if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over ``window`` neighbours, centred; fewer at both ends.  As long as ``values``."""
    half = window // 2
    near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in near]


def phase_seconds(events: Sequence[Event]) -> dict[str, dict[int, float]]:
    """Seconds by phase and step, phases in the order of a step; several events of one step add up."""
    totals: dict[str, dict[int, float]] = {}
    for row in events:
        for key, seconds in row.items():
            phase = name_in("time/NAME_s", key)
            if phase and seconds is not None:
                by_step = totals.setdefault(phase, {})
                by_step[row["step"]] = by_step.get(row["step"], 0.0) + seconds
    order = sorted(totals, key=lambda name: (_PHASES.index(name) if name in _PHASES else len(_PHASES), name))
    return {name: totals[name] for name in order}


def binned(by_step: Mapping[int, float], first: int, last: int, width: int) -> list[float]:
    """Mean over each ``width`` steps from ``first`` to ``last``; 0 where there is nothing."""
    means = []
    for edge in range(first, last + 1, width):
        inside = [by_step[step] for step in range(edge, edge + width) if step in by_step]
        means.append(sum(inside) / len(inside) if inside else 0.0)
    return means


def _draw(figure: Figure, events: Sequence[Event]) -> None:
    axes = figure.subplots(2, 3).ravel()
    _held_out(axes[0], events)
    _training(axes[1], events, "train/gap", "Token gap (0 = the teacher)", "nats per token", COLOURS[0])
    _training(axes[2], events, "train/inverted_share", "Inverted groups", "%", COLOURS[5], scale=100)
    _training(axes[3], events, "rollout/length", "Response length", "tokens", COLOURS[2])
    _training(axes[4], events, "rollout/truncated_share", "Truncated responses", "%", COLOURS[3], scale=100)
    _seconds(axes[5], events)
    last = max((int(row["step"]) for row in events), default=0)
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(-0.02 * last - 0.5, 1.02 * last + 0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[3:]:
        axis.set_xlabel("step")


def _held_out(axis: Axes, events: Sequence[Event]) -> None:
    axis.set_title("Held-out accuracy", loc="left")
    axis.set_ylabel("%")
    keys = sorted({key for row in events for key in row if name_in("eval/NAME/accuracy", key)})
    drawn = False
    for i, key in enumerate(keys):
        steps, values = curve(events, key, 100)
        style = _STYLES[i // len(COLOURS) % len(_STYLES)]
        marker = _MARKERS[i % len(_MARKERS)]
        label = name_in("eval/NAME/accuracy", key)
        axis.plot(
            steps, values, style, marker=marker, ms=4, lw=1.3, color=COLOURS[i % len(COLOURS)], label=label
        )
        drawn = drawn or bool(steps)
    steps, values = curve(events, "eval/accuracy", 100)
    if steps:
        axis.plot(steps, values, "-", marker="o", ms=5, lw=2.5, color="black", label="overall")
    if not steps and not drawn:
        _no_data(axis)
        return
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0)
    low, high = axis.get_ylim()
    if high - low < _LEAST_RANGE:  # or noise of one point looks like a trend
        middle = (low + high) / 2
        axis.set_ylim(max(0.0, middle - _LEAST_RANGE / 2), middle + _LEAST_RANGE / 2)


def _training(
    axis: Axes, events: Sequence[Event], key: str, title: str, unit: str, colour: str, scale: float = 1.0
) -> None:
    """One metric of every step: faint raw values and, where there are many, their running mean."""
    axis.set_title(title, loc="left")
    axis.set_ylabel(unit)
    steps, values = curve(events, key, scale)
    if not steps:
        _no_data(axis)
        return
    many = len(values) >= _SMOOTH_FROM
    marker = "" if many else "o"
    axis.plot(steps, values, color=colour, alpha=0.35 if many else 1.0, lw=1, marker=marker, ms=4)
    if many:
        axis.plot(steps, running_mean(values, max(5, len(values) // 15)), color=colour, lw=2.2)
    least = {"%": 5.0, "tokens": 1.0}.get(unit, 0.05)
    # Zero always shows: for the gap it is the teacher, for the others it makes heights comparable.
    if max(map(abs, values)) < least:
        axis.set_ylim(-least if min(values) < 0 else 0, least)
    else:
        axis.set_ylim(1.08 * min(0.0, *values), 1.08 * max(0.0, *values))


def _seconds(axis: Axes, events: Sequence[Event]) -> None:
    """Phases of every step stacked; phases of some steps (evaluation, saving) as a line of text."""
    axis.set_title("Seconds per step", loc="left")
    axis.set_ylabel("s")
    phases = phase_seconds(events)
    most = max((len(by_step) for by_step in phases.values()), default=0)
    regular = {name: by_step for name, by_step in phases.items() if len(by_step) > most / 2}
    if not regular:
        _no_data(axis)
        return
    steps = sorted({step for by_step in regular.values() for step in by_step})
    width = -(-(steps[-1] - steps[0] + 1) // _BARS)
    centres = [edge + (width - 1) / 2 for edge in range(steps[0], steps[-1] + 1, width)]
    floor = [0.0] * len(centres)
    for i, (name, by_step) in enumerate(regular.items()):
        means = binned(by_step, steps[0], steps[-1], width)
        axis.bar(centres, means, width, bottom=floor, color=COLOURS[i % len(COLOURS)], label=name)
        floor = [a + b for a, b in zip(floor, means, strict=True)]
    axis.set_ylim(0, 1.35 * max(*floor, 1e-3))  # room for the legend above the bars
    rare = [
        f"{name} {sum(by_step.values()) / len(by_step):.0f} s"
        for name, by_step in phases.items()
        if name not in regular
    ]
    title = f"not drawn: {', '.join(rare)}" if rare else None
    axis.legend(fontsize=8, ncols=4, frameon=False, loc="upper center", title=title, title_fontsize=8)


def _no_data(axis: Axes) -> None:
    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="0.5")
    axis.set_yticks([])
