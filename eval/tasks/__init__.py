"""The benchmarks of ``eval/run.py``: one module each, with ``BENCHMARK``, imported when it is first asked for.

A new benchmark is one module here and its name in ``GROUPS``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping

from uniopd_mm.errors import ConfigError
from uniopd_mm.evaluation.benchmark import Benchmark

GROUPS: dict[str, tuple[str, ...]] = {
    "text_math": ("aime24", "aime25", "hmmt_feb25", "hmmt_nov25"),
    "code": ("humaneval_plus", "mbpp_plus", "livecodebench"),
    "image_math": ("mathvision", "dynamath", "wemath"),
    "image_logic": ("logicvista", "visulogic"),
    "chart_document": ("ai2d", "chartqa", "docvqa", "infovqa"),
}
"""The paper's five domains, in its order; usable as a task, as are ``paper`` and ``all``."""
GROUPS["paper"] = GROUPS["all"] = tuple(name for domain in GROUPS.values() for name in domain)

EXTRA = ("quickstart",)
"""Our own, outside every group: their rows are made on this machine, not published."""


def benchmark_names() -> list[str]:
    """Every benchmark, the paper's in its order."""
    return [*GROUPS["paper"], *EXTRA]


def get_benchmark(name: str) -> Benchmark:
    """The definition of one benchmark; :class:`ConfigError` for a name that is none."""
    if name not in benchmark_names():
        raise ConfigError(f"unknown benchmark '{name}'.{_suggest(name, benchmark_names())}")
    return importlib.import_module(f"{__name__}.{name}").BENCHMARK


def task_names(tasks: str) -> list[str]:
    """Benchmarks of a comma-separated list of benchmarks and groups, ``code,chartqa``; each once, in the order given."""
    names: dict[str, None] = {}
    known = [*benchmark_names(), *GROUPS]
    for task in filter(None, (part.strip() for part in tasks.split(","))):
        if task not in known:
            raise ConfigError(f"unknown task '{task}'.{_suggest(task, known)}")
        names |= dict.fromkeys(GROUPS.get(task, (task,)))
    return list(names)


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."


class _Definitions(Mapping[str, Benchmark]):
    """Name -> definition, each module imported at its first look-up."""

    def __getitem__(self, name: str) -> Benchmark:
        if name not in benchmark_names():
            raise KeyError(name)
        return get_benchmark(name)

    def __iter__(self) -> Iterator[str]:
        return iter(benchmark_names())

    def __len__(self) -> int:
        return len(benchmark_names())


BENCHMARKS: Mapping[str, Benchmark] = _Definitions()
