"""How sure a number is: bootstrap intervals, and paired tests of two runs.  Pure; seeded, so that a report is repeatable.

U units: what was drawn independently (a row, or all rows of one problem); R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
_BLOCK = 2**22  # numbers drawn at once


@dataclass(frozen=True)
class Difference:
    """Second run minus first, over what both answered."""

    n: int
    """Units compared."""
    mean: float
    low: float
    high: float
    """95 % interval of the mean."""
    p: float
    """Two-sided: how often a difference this large comes up if the runs are equally good."""
    won: int
    lost: int
    """Units on which the second run is better, and worse."""
    test: str
    """``McNemar`` where every difference is -1, 0 or 1, else ``sign flips``."""


def bootstrap_interval(
    values: ArrayLike, weights: ArrayLike | None = None, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of the (weighted) mean; None for fewer than two units."""
    value_U = np.asarray(values, dtype=float)
    n = len(value_U)
    weight_U = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    if n < 2:
        return None
    random = np.random.default_rng(seed)
    rows = max(1, _BLOCK // n)
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = random.integers(0, n, (min(rows, RESAMPLES - start), n))
        means.append((value_U * weight_U)[drawn].sum(1) / weight_U[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def exact_interval(value: float, n: int) -> tuple[float, float]:
    """95 % interval (Clopper and Pearson 1934) of a share of which all n units are 0, or all 1."""
    rest = 0.025 ** (1 / n)
    return (0.0, 1 - rest) if value == 0 else (rest, 1.0)


def compare(first_U: Sequence[float], second_U: Sequence[float], seed: int = 0) -> Difference:
    """Paired comparison of the same units in two runs; ValueError for none."""
    if len(first_U) != len(second_U) or not len(first_U):
        raise ValueError(f"need pairs to compare, found {len(first_U)} and {len(second_U)} units")
    gain_U = np.asarray(second_U, dtype=float) - np.asarray(first_U, dtype=float)
    won, lost = int((gain_U > 0).sum()), int((gain_U < 0).sum())
    mean = float(gain_U.mean())
    low, high = bootstrap_interval(gain_U, seed=seed) or (mean, mean)
    binary = bool(np.isin(gain_U, (-1.0, 0.0, 1.0)).all())
    p = mcnemar(won, lost) if binary else sign_flip(gain_U, seed)
    return Difference(len(gain_U), mean, low, high, p, won, lost, "McNemar" if binary else "sign flips")


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test: discordant pairs fall either way with equal chance."""
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def sign_flip(gains: ArrayLike, seed: int = 0) -> float:
    """Two-sided p of the mean under random signs; at least 1 / (RESAMPLES + 1), since only so many are drawn."""
    gain_U = np.asarray(gains, dtype=float)
    gain_U = gain_U[gain_U != 0]
    if not len(gain_U):
        return 1.0
    random = np.random.default_rng(seed)
    found = abs(gain_U.sum()) * (1 - 1e-12)
    rows = max(1, _BLOCK // len(gain_U))
    as_large = 0
    for start in range(0, RESAMPLES, rows):
        sign_RU = random.integers(0, 2, (min(rows, RESAMPLES - start), len(gain_U))) * 2 - 1
        as_large += int((abs(sign_RU @ gain_U) >= found).sum())
    return (as_large + 1) / (RESAMPLES + 1)
