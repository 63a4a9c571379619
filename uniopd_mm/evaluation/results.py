"""Samples and their outcomes -> the numbers of one benchmark."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uniopd_mm.evaluation.benchmark import Benchmark, Row, Scores
from uniopd_mm.evaluation.samples import Sample
from uniopd_mm.evaluation.statistics import bootstrap_interval, exact_interval
from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.verifiers.metrics import avg_at_k, maj_at_k, pass_at_k

_SAME = 1e-9  # two ways to sum up the same scores differ by rounding alone


@dataclass(frozen=True)
class Scored:
    """One sample and what the verifier said of it."""

    sample: Sample
    outcome: Outcome

    @property
    def score(self) -> float | None:
        """In [0, 1]; None = unknown."""
        if self.outcome.correct is None:
            return None
        return float(self.outcome.correct) if self.outcome.score is None else self.outcome.score

    @property
    def state(self) -> str:
        """``correct``, ``wrong``, ``unparsed`` (wrong, without an answer) or ``unknown``."""
        if self.outcome.correct is None:
            return "unknown"
        if self.outcome.correct:
            return "correct"
        return "unparsed" if self.outcome.extracted is None else "wrong"


def by_prompt(prompts: Sequence[Prompt], scored: Sequence[Scored]) -> list[list[Scored]]:
    """The samples of each prompt, by index."""
    found: dict[str, list[Scored]] = {prompt.id: [] for prompt in prompts}
    for one in scored:
        found[one.sample.id].append(one)
    return [sorted(found[prompt.id], key=lambda one: one.sample.index) for prompt in prompts]


def units(benchmark: Benchmark, rows: Sequence[Row]) -> list[str]:
    """For each row what it was drawn with: rows that share the data set's own id (variants or steps of one problem)
    are no independent evidence."""
    for column in ("id", "ID"):
        if column in benchmark.columns and len({str(row[column]) for row in rows}) < len(rows):
            return [str(row[column]) for row in rows]
    return [str(number) for number in range(len(rows))]


def summarise_benchmark(
    benchmark: Benchmark, rows: Sequence[Row], prompts: Sequence[Prompt], scored: Sequence[Scored]
) -> dict[str, Any]:
    """All numbers of one benchmark; shares in [0, 1].  ``rows`` and ``prompts`` belong together one to one."""
    grouped = by_prompt(prompts, scored)
    scores = [[one.score for one in some] for some in grouped]
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        numbers = dict(benchmark.aggregate(rows, scores))
    states = Counter(one.state for one in scored)
    answered = [one.sample for one in scored if not one.sample.error]
    n, n_silent = len(scored), sum(not some for some in grouped)
    silent = [f"{n_silent} of {len(rows)} rows have no answer and are in no number"] if n_silent else []
    score = numbers.pop("score", None)
    return {
        "title": benchmark.title,
        "domain": benchmark.domain,
        "metric": benchmark.metric,
        "score": score,
        "interval": _interval(benchmark, rows, scores, score),
        "rows": len(rows),
        "samples": n,
        "samples_per_row": max(map(len, scores), default=0),
        "unknown": states["unknown"] / n if n else None,
        "unparsed": states["unparsed"] / n if n else None,
        "truncated": sum(sample.finish == "length" for sample in answered) / n if n else None,
        "tokens": sum(sample.n_tokens for sample in answered) / len(answered) if answered else None,
        "more": {**repeated(grouped), **numbers},
        "notes": [*silent, *(str(note.message) for note in notes)],
        "unknown_reasons": dict(
            Counter(_reason(one) for one in scored if one.state == "unknown").most_common(5)
        ),
    }


def repeated(grouped: Sequence[Sequence[Scored]]) -> dict[str, float]:
    """avg@n, pass@k (k = 2, 4, ..., n), maj@n (more than half correct) and vote@n (the most frequent answer is right)
    where every prompt has the same n > 1 samples; unknown counts as wrong."""
    sizes = {len(some) for some in grouped}
    n = max(sizes, default=0)
    if len(sizes) != 1 or n < 2:
        return {}
    right = [[float(one.outcome.correct is True) for one in some] for some in grouped]
    counts = [int(sum(row)) for row in right]
    ks = sorted({n, *(2**e for e in range(1, n.bit_length()) if 2**e <= n)})
    return {
        f"avg@{n}": avg_at_k([[one.score or 0.0 for one in some] for some in grouped]),
        **{f"pass@{k}": sum(pass_at_k(n, c, k) for c in counts) / len(counts) for k in ks},
        f"maj@{n}": maj_at_k(right),
        f"vote@{n}": sum(map(_vote, grouped)) / len(grouped),
    }


def means(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean score of each domain with several benchmarks, and over all benchmarks; left out where one has no score."""
    domains: dict[str, list[float | None]] = {}
    for result in results.values():
        domains.setdefault(result["domain"], []).append(result["score"])
    domains["all benchmarks"] = [score for some in domains.values() for score in some]
    found = {}
    for domain, some in domains.items():
        known = [score for score in some if score is not None]
        if len(known) == len(some) > 1:
            found[domain] = sum(known) / len(known)
    return found


def _vote(some: Sequence[Scored]) -> float:
    """1 where the most frequent answer is right, the earliest of equally frequent ones."""
    answers = [one.outcome.extracted for one in some if one.outcome.extracted is not None]
    if not answers:
        return 0.0
    (winner, _), *_ = Counter(answers).most_common(1)
    return next(float(one.outcome.correct is True) for one in some if one.outcome.extracted == winner)


def _interval(
    benchmark: Benchmark, rows: Sequence[Row], scores: Sequence[Scores], score: float | None
) -> tuple[float, float] | None:
    """95 % bootstrap interval of the headline number, where that is the mean over units, or over all their rows; None
    where it is neither (or is no number).  Where all units are right, or all wrong, the exact one of Clopper and Pearson."""
    found = unit_scores(benchmark, rows, scores)
    values, sizes = [value for value, _ in found.values()], [size for _, size in found.values()]
    if score is None or len(values) < 2:
        return None
    if set(values) == {score} and score in (0.0, 1.0):  # resamples of equal values know nothing of others
        return exact_interval(score, len(values))
    for weights in ([1.0] * len(values), sizes):
        mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
        if abs(mean - score) < _SAME:
            return bootstrap_interval(values, weights)
    return None


def unit_scores(
    benchmark: Benchmark, rows: Sequence[Row], scores: Sequence[Scores]
) -> dict[str, tuple[float, int]]:
    """The headline number of each unit alone, and its rows."""
    members: dict[str, list[int]] = {}
    for i, unit in enumerate(units(benchmark, rows)):
        if scores[i]:
            members.setdefault(unit, []).append(i)
    found = {}
    with warnings.catch_warnings(action="ignore"):  # about numbers that need all rows
        for unit, some in members.items():
            numbers = benchmark.aggregate([rows[i] for i in some], [scores[i] for i in some])
            if "score" in numbers:
                found[unit] = numbers["score"], len(some)
    return found


def _reason(one: Scored) -> str:
    return (one.outcome.reason or "no reason given")[:200]
