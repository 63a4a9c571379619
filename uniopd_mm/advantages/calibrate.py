"""One entrance to all calibrators: advantages and outcomes in, calibrated advantages and statistics out.

Call it once per step on the batch of *all* ranks (gather first, take your own rows after): it is
deterministic, and its result does not depend on the order of the groups or on the padding.
"""

from __future__ import annotations

from math import fsum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uniopd_mm.advantages.margin import greedy_mask, group_margins, group_mask, shift_offsets
from uniopd_mm.advantages.outcome import outcome_offsets
from uniopd_mm.advantages.position import position_weights
from uniopd_mm.advantages.residual import group_calibrated
from uniopd_mm.advantages.token import add_per_rollout, rollout_return

if TYPE_CHECKING:
    from uniopd_mm.config import CalibrationConfig

TOLD_APART = 1e-6
"""Margins (nats) nearer to 0 than this count as 0: a margin shifted to 0 is 0 +- 1e-8 in float32."""


def calibrate(
    advantages_BT: Tensor,
    scored_BT: Tensor,
    outcome_B: Tensor,
    group_index_B: Tensor,
    settings: CalibrationConfig,
    score_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Calibrated advantages [B, T] (0 where not scored or not kept), kept [B] bool, and statistics.

    ``outcome_B``: 1 correct, 0 incorrect, -1 unknown; give -1 to a rollout that must take no part in the
    margins.  ``group_index_B``: the prompt's slot in the step, the same on all ranks.  ``score_B``: graded
    rewards in [0, 1] for kind gc (nan = unknown); None = the outcomes.

    Statistics (0 where there is nothing to average; *mixed* = has correct and incorrect rollouts with a
    return): n_mixed_groups; margin_before / _after: mean over mixed groups; inverted_share_before / _after:
    share of mixed groups with a margin below 0; return_correct, return_incorrect: mean return before;
    shifted_share, masked_share: share of all rollouts that are kept with other advantages, or not kept;
    lambda_mean: mean lambda of kind shift.  Margins are per group, also with scope global; all in nats.
    """
    scored_BT = scored_BT.bool()
    before_BT = torch.where(scored_BT, advantages_BT, torch.zeros_like(advantages_BT))
    return_B, has_return_B = rollout_return(before_BT, scored_BT)
    class_B = torch.where(
        has_return_B, outcome_B.to(torch.int8), torch.full_like(outcome_B, -1, dtype=torch.int8)
    )

    after_BT, kept_B, lambdas = before_BT, torch.ones_like(has_return_B), []
    if settings.kind == "shift":
        offset_B, lambdas = _shift(return_B, class_B, group_index_B, settings)
        after_BT = add_per_rollout(before_BT, scored_BT, offset_B)
    elif settings.kind == "mask":
        kept_B = _mask(return_B, class_B, group_index_B, settings)
    elif settings.kind == "outcome":
        after_BT = add_per_rollout(before_BT, scored_BT, outcome_offsets(outcome_B, settings.outcome_weight))
    elif settings.kind == "gc":
        known_B = torch.where(outcome_B < 0, torch.nan, outcome_B.double())
        reward_B = known_B if score_B is None else score_B
        after_BT = group_calibrated(
            before_BT,
            scored_BT,
            reward_B,
            group_index_B,
            beta=settings.residual_weight,
            clip=settings.advantage_clip,
        )
    elif settings.kind == "iw":
        weight_BT = position_weights(before_BT, scored_BT, settings.position_weight)
        after_BT = (before_BT.double() * weight_BT).to(before_BT.dtype)

    after_BT = torch.where(kept_B[:, None], after_BT, torch.zeros_like(after_BT))
    stats = _statistics(before_BT, after_BT, scored_BT, class_B, kept_B, group_index_B, settings)
    stats["lambda_mean"] = _mean(lambdas)
    return after_BT, kept_B, stats


def _shift(
    return_B: Tensor, class_B: Tensor, group_index_B: Tensor, settings: CalibrationConfig
) -> tuple[Tensor, list[float]]:
    return shift_offsets(
        return_B,
        class_B,
        group_index_B,
        kind=settings.margin,
        direction=settings.direction,
        delta=settings.delta,
        together=settings.scope == "global",
    )


def _mask(return_B: Tensor, class_B: Tensor, group_index_B: Tensor, settings: CalibrationConfig) -> Tensor:
    if settings.mask == "group":
        return group_mask(return_B, class_B, group_index_B, kind=settings.margin, delta=settings.delta)
    return greedy_mask(
        return_B,
        class_B,
        group_index_B,
        kind=settings.margin,
        delta=settings.delta,
        min_retain=settings.min_retain,
        together=settings.scope == "global",
    )


def _statistics(
    before_BT: Tensor,
    after_BT: Tensor,
    scored_BT: Tensor,
    class_B: Tensor,
    kept_B: Tensor,
    group_index_B: Tensor,
    settings: CalibrationConfig,
) -> dict[str, float]:
    return_B, _ = rollout_return(before_BT, scored_BT)
    return_after_B, _ = rollout_return(after_BT, scored_BT)
    class_after_B = torch.where(kept_B, class_B, torch.full_like(class_B, -1))
    before = group_margins(return_B, class_B, group_index_B, settings.margin)
    after = group_margins(return_after_B, class_after_B, group_index_B, settings.margin)
    changed_B = (after_BT != before_BT).any(-1) & kept_B
    return {
        "n_mixed_groups": float(len(before)),
        "margin_before": _mean(before),
        "margin_after": _mean(after),
        "inverted_share_before": _mean([float(m < -TOLD_APART) for m in before]),
        "inverted_share_after": _mean([float(m < -TOLD_APART) for m in after]),
        "return_correct": _mean(return_B[class_B == 1].tolist()),
        "return_incorrect": _mean(return_B[class_B == 0].tolist()),
        "shifted_share": _mean(changed_B.double().tolist()),
        "masked_share": _mean((~kept_B).double().tolist()),
    }


def _mean(values: list[float]) -> float:
    return fsum(values) / len(values) if values else 0.0
