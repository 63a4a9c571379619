"""What a run leaves behind and shows: run folder, console, curves, trackers and metric names."""

from uniopd_mm.report.console import Change, Console, summarize
from uniopd_mm.report.curves import plot_curves
from uniopd_mm.report.metrics import METRICS, Metric, find_metric
from uniopd_mm.report.records import RunFolder, collect_versions, read_metrics
from uniopd_mm.report.trackers import Trackers

__all__ = [
    "METRICS",
    "Change",
    "Console",
    "Metric",
    "RunFolder",
    "Trackers",
    "collect_versions",
    "find_metric",
    "plot_curves",
    "read_metrics",
    "summarize",
]
