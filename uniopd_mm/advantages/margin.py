"""Outcome-guided margin calibration (arXiv 2605.03677): every correct rollout of a prompt should have a
return at least ``delta`` above every incorrect one.

All functions work on returns [B] (nats per token) and classes [B]: 1 correct, 0 incorrect, -1 takes no part
(unknown outcome, or no return).  Groups are decided one by one; with ``together`` the whole batch is one
group.  A group that lacks correct or incorrect rollouts is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import Literal

import torch
from torch import Tensor

from uniopd_mm.advantages.groups import group_positions

MarginKind = Literal["mean", "minmax"]
Direction = Literal["lift", "lower", "spread"]

ROUNDING = 1e-12
"""Margins (nats) closer than this are equal; float64 means of the same returns differ by about 1e-16."""


def margin(correct: Sequence[float], incorrect: Sequence[float], kind: MarginKind) -> float:
    """mean: mean correct - mean incorrect return; minmax: worst correct - best incorrect.

    Negative: the teacher prefers the incorrect rollouts.
    """
    if kind == "mean":  # fsum rounds once, so the order of the rollouts does not matter
        return fsum(correct) / len(correct) - fsum(incorrect) / len(incorrect)
    return min(correct) - max(incorrect)


def group_margins(
    return_B: Tensor, class_B: Tensor, group_index_B: Tensor, kind: MarginKind, together: bool = False
) -> list[float]:
    """The margin of every group that has both classes, groups by rising index."""
    returns, mixed = return_B.tolist(), _mixed_groups(class_B, group_index_B, together)
    return [margin([returns[i] for i in good], [returns[i] for i in bad], kind) for good, bad, _ in mixed]


def shift_offsets(
    return_B: Tensor,
    class_B: Tensor,
    group_index_B: Tensor,
    *,
    kind: MarginKind,
    direction: Direction,
    delta: float,
    together: bool = False,
) -> tuple[Tensor, list[float]]:
    """What to add to every valid token of each rollout [B] float64, and the lambda of each mixed group.

    lambda = max(0, delta - margin).  lift: +lambda on correct; lower: -lambda on incorrect; spread: half of
    each.  Afterwards the margin is at least ``delta``, and exactly ``delta`` where anything was shifted.
    """
    up, down = {"lift": (1.0, 0.0), "lower": (0.0, -1.0), "spread": (0.5, -0.5)}[direction]
    returns = return_B.tolist()
    offset_B = torch.zeros(len(returns), dtype=torch.float64, device=return_B.device)
    lambdas = []
    for good, bad, _ in _mixed_groups(class_B, group_index_B, together):
        lam = max(0.0, delta - margin([returns[i] for i in good], [returns[i] for i in bad], kind))
        offset_B[good] = up * lam
        offset_B[bad] = down * lam
        lambdas.append(lam)
    return offset_B, lambdas


def greedy_mask(
    return_B: Tensor,
    class_B: Tensor,
    group_index_B: Tensor,
    *,
    kind: MarginKind,
    delta: float,
    min_retain: float,
    together: bool = False,
) -> Tensor:
    """kept [B] bool: drop worst correct or best incorrect rollouts until the margin is ``delta``.

    Of the two candidates goes the one that leaves the larger margin, the correct one if they are equal; it
    stops where neither makes the margin larger.  Each class keeps ``max(1, int(n * min_retain))``.  Between
    equal returns the rollout that comes first (group index, then position) is dropped first.
    """
    returns = return_B.tolist()
    kept_B = torch.ones(len(returns), dtype=torch.bool, device=return_B.device)
    for good, bad, _ in _mixed_groups(class_B, group_index_B, together):
        worst_first = sorted(good, key=lambda i: returns[i])  # sorted() is stable: ties stay in group order
        best_first = sorted(bad, key=lambda i: -returns[i])
        n_good, n_bad = _greedy_counts(
            [returns[i] for i in worst_first], [returns[i] for i in best_first], kind, delta, min_retain
        )
        kept_B[worst_first[:n_good] + best_first[:n_bad]] = False
    return kept_B


def group_mask(
    return_B: Tensor,
    class_B: Tensor,
    group_index_B: Tensor,
    *,
    kind: MarginKind,
    delta: float,
) -> Tensor:
    """kept [B] bool: a group stays only if its margin is at least ``delta`` (Eq. 10 of the paper).

    Its rollouts of unknown outcome go with it.
    """
    returns = return_B.tolist()
    kept_B = torch.ones(len(returns), dtype=torch.bool, device=return_B.device)
    for good, bad, group in _mixed_groups(class_B, group_index_B, together=False):
        if margin([returns[i] for i in good], [returns[i] for i in bad], kind) < delta - ROUNDING:
            kept_B[group] = False
    return kept_B


def _mixed_groups(
    class_B: Tensor, group_index_B: Tensor, together: bool
) -> list[tuple[list[int], list[int], list[int]]]:
    """Positions of the correct, the incorrect and all rollouts of every group that has both classes."""
    classes = class_B.tolist()
    mixed = []
    for group in group_positions(group_index_B, together):
        good = [i for i in group if classes[i] == 1]
        bad = [i for i in group if classes[i] == 0]
        if good and bad:
            mixed.append((good, bad, group))
    return mixed


def _greedy_counts(
    correct: list[float], incorrect: list[float], kind: MarginKind, delta: float, min_retain: float
) -> tuple[int, int]:
    """How many to drop from the front of ``correct`` (ascending) and of ``incorrect`` (descending)."""
    # Only front elements are ever dropped, so a class is described by how many went: level[i] is its mean (or
    # its worst / best member) without the first i, and the margin is a difference of two levels.
    good_level = _tail_means(correct) if kind == "mean" else correct
    bad_level = _tail_means(incorrect) if kind == "mean" else incorrect
    most_good = len(correct) - max(1, int(len(correct) * min_retain))
    most_bad = len(incorrect) - max(1, int(len(incorrect) * min_retain))
    i = j = 0
    while (now := good_level[i] - bad_level[j]) < delta - ROUNDING:
        without_good = good_level[i + 1] - bad_level[j] if i < most_good else now
        without_bad = good_level[i] - bad_level[j + 1] if j < most_bad else now
        if max(without_good, without_bad) <= now + ROUNDING:
            break
        if without_bad > without_good + ROUNDING:
            j += 1
        else:
            i += 1
    return i, j


def _tail_means(values: list[float]) -> list[float]:
    """Mean of ``values[i:]`` for every i."""
    means, total = [], 0.0
    for n, value in enumerate(reversed(values), start=1):
        total += value
        means.append(total / n)
    return means[::-1]
