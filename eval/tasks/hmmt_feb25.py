"""HMMT February 2025 (30 problems, about half of the answers LaTeX expressions)."""

from uniopd_mm.evaluation.benchmark import Source

from ._math import competition

BENCHMARK = competition(
    "hmmt_feb25", "HMMT Feb 2025", sources=(Source("MathArena/hmmt_feb_2025", split="train"),)
)
