"""Aggregates over repeated samples of one problem.  Each score is 1 (correct) or 0; unknown outcomes are the caller's
to count, as 0 in a benchmark."""

from __future__ import annotations

import math
from collections.abc import Sequence


def avg_at_k(rows: Sequence[Sequence[float]]) -> float:
    """Mean score over all samples of all problems; 0 for no samples."""
    scores = [score for row in rows for score in row]
    return sum(scores) / len(scores) if scores else 0.0


def cov_at_k(rows: Sequence[Sequence[float]]) -> float:
    """Share of problems with at least one correct sample."""
    return sum(any(score == 1 for score in row) for row in rows) / len(rows) if rows else 0.0


def maj_at_k(rows: Sequence[Sequence[float]]) -> float:
    """Share of problems with more than half of the samples correct (not a vote over the answers themselves)."""
    return sum(sum(row) > len(row) / 2 for row in rows) / len(rows) if rows else 0.0


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate, from c correct of n samples, that at least one of k samples is correct: 1 - C(n-c,k) / C(n,k)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, found n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
