r"""HMMT November 2025 (30 problems, some answers LaTeX expressions).

G-OPD's file, which published numbers rest on, has one gold without its backslash: ``sqrt{7}`` is read as the product of
the letters s, q, r, t and 7, so that no right answer can score and 29/30 is the ceiling.  ``strict`` repairs it, ``upstream``
keeps it.
"""

from uniopd_mm.evaluation.benchmark import Source

from ._math import competition

REPAIRED = {r"\frac{sqrt{7} + 1}{2}": r"\frac{\sqrt{7} + 1}{2}"}

BENCHMARK = competition(
    "hmmt_nov25",
    "HMMT Nov 2025",
    sources=(Source("MathArena/hmmt_nov_2025", split="train"),),
    repaired=REPAIRED,
)
