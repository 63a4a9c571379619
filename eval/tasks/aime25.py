"""AIME 2025 I and II (30 problems).  Answers are integers in some of the published files and text in others."""

from uniopd_mm.evaluation.benchmark import Source

from ._math import competition

BENCHMARK = competition(
    "aime25",
    "AIME 2025",
    sources=(
        Source("simplescaling/aime25_nofigures", split="train"),
        Source("MathArena/aime_2025", split="train"),
    ),
)
