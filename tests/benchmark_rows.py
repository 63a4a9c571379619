"""Rows of the public benchmark fixtures, as rows and as prompts."""

from __future__ import annotations

from pathlib import Path

from tasks import get_benchmark

from uniopd_mm.evaluation.loading import load_rows

FIXTURES = Path(__file__).parent / "fixtures" / "benchmarks"


def rows_of(name: str, source: Path = FIXTURES, **settings):
    return load_rows(get_benchmark(name), source, check_count=False, **settings)


def prompts_of(
    name: str, source: Path = FIXTURES, preset: str = "paper", profile: str = "strict", **settings
):
    benchmark = get_benchmark(name)
    return [
        benchmark.read(row, benchmark.presets[preset], profile) for row in rows_of(name, source, **settings)
    ]


def fenced(code: str) -> str:
    return f"Here it is.\n```python\n{code}\n```\nDone."
