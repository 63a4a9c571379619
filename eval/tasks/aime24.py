"""AIME 2024 I and II (30 problems, integers 0-999).  G-OPD's ``data/aime24`` has the same columns: id, problem, answer."""

from uniopd_mm.evaluation.benchmark import Source

from ._math import competition

BENCHMARK = competition(
    "aime24",
    "AIME 2024",
    sources=(
        Source("simplescaling/aime24_nofigures", split="train"),
        Source("HuggingFaceH4/aime_2024", split="train"),
    ),
)
