"""Aggregates over repeated samples of one problem.  Each score is 1 (correct) or 0; unknown outcomes are the caller's
to count, as 0 in a benchmark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True)
class WeMathScores:
    """WeMath's four dimensions as counts of problems; ``loose`` forgives a wrong step unless all steps are wrong."""

    problems: int
    inadequate_generalization: int
    """All steps right, the whole wrong."""
    insufficient_knowledge: int
    """A step wrong, the whole wrong."""
    complete_mastery: int
    complete_mastery_loose: int
    rote_memorization: int
    """The whole right, a step wrong (loose: all steps wrong)."""
    rote_memorization_loose: int

    def score(self, loose: bool = False) -> float:
        """Share of problems, an inadequate generalization counting half."""
        rote = self.rote_memorization_loose if loose else self.rote_memorization
        lost = 0.5 * self.inadequate_generalization + self.insufficient_knowledge + rote
        return (self.problems - lost) / self.problems if self.problems else 0.0

    def rote_rate(self, loose: bool = False) -> float:
        """Share of the problems whose whole is right that are rote; 0 when none is (upstream divides by zero)."""
        rote = self.rote_memorization_loose if loose else self.rote_memorization
        mastered = self.complete_mastery_loose if loose else self.complete_mastery
        return rote / (rote + mastered) if rote + mastered else 0.0

    def as_metrics(self) -> dict[str, float]:
        """Shares: ``score`` (strict), ``score_loose``, and the rates of the dimensions."""
        n = self.problems or 1
        return {
            "score": self.score(),
            "score_loose": self.score(loose=True),
            "insufficient_knowledge": self.insufficient_knowledge / n,
            "inadequate_generalization": self.inadequate_generalization / n,
            "complete_mastery": self.complete_mastery / n,
            "complete_mastery_loose": self.complete_mastery_loose / n,
            "rote_memorization": self.rote_rate(),
            "rote_memorization_loose": self.rote_rate(loose=True),
        }


def wemath_scores(problems: Iterable[tuple[Sequence[bool], bool]]) -> WeMathScores:
    """The dimensions of (which steps are right, whether the whole is right), one pair per problem.

    Upstream divides by 525 whatever was asked; here it is the number of problems.
    """
    rows = [(tuple(steps), whole) for steps, whole in problems]
    right = [steps for steps, whole in rows if whole]
    wrong = [steps for steps, whole in rows if not whole]
    return WeMathScores(
        problems=len(rows),
        inadequate_generalization=sum(all(steps) for steps in wrong),
        insufficient_knowledge=sum(not all(steps) for steps in wrong),
        complete_mastery=sum(all(steps) for steps in right),
        complete_mastery_loose=sum(any(steps) for steps in right),
        rote_memorization=sum(not all(steps) for steps in right),
        rote_memorization_loose=sum(not any(steps) for steps in right),
    )


def dynamath_worst_average(seeds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """``average`` and ``worst``: mean over seed questions of the mean and of the minimum over their variants."""
    rows = [scores for scores in seeds.values() if scores]
    if not rows:
        return {"average": 0.0, "worst": 0.0}
    return {
        "average": sum(sum(scores) / len(scores) for scores in rows) / len(rows),
        "worst": sum(min(scores) for scores in rows) / len(rows),
    }
