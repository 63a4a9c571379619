"""Results as text for a terminal: aligned columns, one benchmark a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uniopd_mm.evaluation.statistics import Difference
from uniopd_mm.report.console import pack


def result_table(results: Mapping[str, Mapping[str, Any]], means: Mapping[str, float]) -> str:
    """Scores with their 95 % interval and what to distrust them by, further numbers below each."""
    head = ["benchmark", "metric", "score", "95 %", "rows x n", "unknown", "unparsed", "cut off", "tokens"]
    lines = [head]
    for result in results.values():
        metric = result["metric"].replace("@k", f"@{result['samples_per_row']}")
        line = [
            result["title"],
            metric,
            percent(result["score"]),
            interval(result["interval"]),
            f"{result['rows']} x {result['samples_per_row']}",
            *(percent(result[key]) for key in ("unknown", "unparsed", "truncated")),
            "-" if result["tokens"] is None else f"{result['tokens']:.0f}",
        ]
        lines.append(line)
    lines += [[f"mean of {name.replace('_', ' ')}", "", percent(value)] for name, value in means.items()]
    shown = align(lines, left=2).split("\n")
    more = [_more(result["more"], len(shown[0])) for result in results.values()]
    below = dict(enumerate(more, start=1))
    return "\n".join(text for i, line in enumerate(shown) for text in [line, *below.get(i, [])])


def _more(numbers: Mapping[str, float], width: int) -> list[str]:
    """Further numbers of one benchmark side by side."""
    parts = [f"{name} {percent(value)}" for name, value in numbers.items()]
    return pack(parts, width, indent="    ", first="    ")


def comparison_table(differences: Mapping[str, Difference], names: Mapping[str, tuple[float, float]]) -> str:
    """Second run minus first, benchmark by benchmark; ``names`` has the mean scores of both."""
    lines = [["benchmark", "first", "second", "change", "95 %", "p", "won", "lost", "of", "test"]]
    for name, found in differences.items():
        first, second = names[name]
        lines.append(
            [
                name,
                percent(first),
                percent(second),
                f"{100 * found.mean:+.1f}",
                f"{100 * found.low:+.1f} .. {100 * found.high:+.1f}",
                f"{found.p:.2g}" if found.p >= 1e-4 else "< 0.0001",
                str(found.won),
                str(found.lost),
                str(found.n),
                found.test,
            ]
        )
    return align(lines, left=1)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def interval(pair: Sequence[float] | None) -> str:
    return "-" if pair is None else f"{100 * pair[0]:.1f}-{100 * pair[1]:.1f}"


def align(lines: Sequence[Sequence[str]], left: int) -> str:
    """Columns as wide as their widest cell; the first ``left`` of them flush left."""
    widths = [
        max(len(line[c]) for line in lines if c < len(line)) for c in range(max(len(line) for line in lines))
    ]
    texts = []
    for line in lines:
        cells = [
            cell.ljust(width) if c < left else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)
