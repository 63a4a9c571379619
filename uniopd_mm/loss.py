"""The clipped policy-gradient loss on calibrated token advantages; micro-batches and ranks add up exactly.

B rollouts, T response positions; log-probabilities in nats, of the t-th sampled token at index t.  Whatever
stands in positions that are not scored (padding, nan, -inf) changes neither loss nor gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uniopd_mm.advantages.token import masked_mean

if TYPE_CHECKING:
    from uniopd_mm.config import LossConfig


def loss_denominators(scored_BT: Tensor, kept_B: Tensor, settings: LossConfig) -> Tensor:
    """[n_rollouts, n_tokens] float64 of these rollouts, to be added up over micro-batches and ranks.

    All sampled rollouts and all their valid tokens, also those of rollouts that were balanced or masked out:
    what is dropped makes the step smaller, not the rest larger.  ``renormalize``: only kept rollouts with a
    valid token, and their tokens.
    """
    n_tokens_B = scored_BT.bool().sum(-1)
    if settings.renormalize:
        kept_B = kept_B.bool() & (n_tokens_B > 0)
        return torch.stack([kept_B.sum(), n_tokens_B[kept_B].sum()]).double()
    return torch.stack([torch.full_like(n_tokens_B.sum(), len(n_tokens_B)), n_tokens_B.sum()]).double()


def policy_loss(
    student_lp_BT: Tensor,
    old_lp_BT: Tensor,
    advantages_BT: Tensor,
    teacher_lp_BT: Tensor,
    scored_BT: Tensor,
    kept_B: Tensor,
    settings: LossConfig,
    denominators: Tensor | Sequence[float],
    sampler_lp_BT: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """These rollouts' part of the loss of the whole update (scalar, with gradient), and its statistics.

    Per token w * max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(student - old) and, without
    gradient, w = min(exp(old - sampler), mismatch_cap); w = 1 without ``sampler_lp_BT``.  ``old``: the
    weights that sampled, scored as the student is; with one update per batch r = 1, gradient -A grad log p.

    ``denominators``: ``loss_denominators`` of the whole update, over all micro-batches and ranks.
    sample_mean: mean over a rollout's valid tokens, summed over rollouts / n_rollouts; token_mean: sum over
    tokens / n_tokens.  The parts of all micro-batches and ranks then sum up to the loss (a framework that
    averages over ranks needs it times the ranks).

    A token whose student and teacher differ by ``gap_mask`` nats or more, or infinitely, has no loss but
    stays a valid token in every denominator, as in the released code of arXiv 2605.03677.

    Statistics, each [sum, count] float64 so that they too add up: gap_masked over trained tokens (valid, of
    kept rollouts); clipped, ratio, over those not gap-masked; mismatch (mean |old - sampler|, nats) and
    mismatch_capped over the same, where there is a sampler.
    """
    scored_BT, kept_B = scored_BT.bool(), kept_B.bool()
    trained_BT = scored_BT & kept_B[:, None]
    live_BT = trained_BT & _within_gap(student_lp_BT, teacher_lp_BT, settings)

    advantage_BT = _only(live_BT, advantages_BT.detach())
    # Masked before exp(): behind it, the gradient of a masked -inf would be 0 * inf = nan.
    ratio_BT = torch.exp(_only(live_BT, student_lp_BT) - _only(live_BT, old_lp_BT.detach()))
    plain_BT = -ratio_BT * advantage_BT
    clipped_BT = -ratio_BT.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantage_BT
    token_BT = torch.maximum(plain_BT, clipped_BT)
    stats = {
        "gap_masked": _sum_and_count(trained_BT & ~live_BT, trained_BT),
        "clipped": _sum_and_count(clipped_BT > plain_BT, live_BT),
        "ratio": _sum_and_count(ratio_BT, live_BT),
    }
    if sampler_lp_BT is not None:
        mismatch_BT = _only(live_BT, old_lp_BT.detach()) - _only(live_BT, sampler_lp_BT.detach())
        stats["mismatch"] = _sum_and_count(mismatch_BT.abs(), live_BT)
        if settings.mismatch_cap is not None:
            weight_BT = mismatch_BT.exp()
            stats["mismatch_capped"] = _sum_and_count(weight_BT > settings.mismatch_cap, live_BT)
            token_BT = token_BT * weight_BT.clamp(max=settings.mismatch_cap)

    n_rollouts, n_tokens = denominators
    if settings.aggregation == "token_mean":
        return masked_mean(token_BT, live_BT, denominator=n_tokens), stats
    per_rollout_B = masked_mean(token_BT, live_BT, dim=-1, denominator=scored_BT.sum(-1))
    return masked_mean(per_rollout_B, kept_B, denominator=n_rollouts), stats


def _within_gap(student_lp_BT: Tensor, teacher_lp_BT: Tensor, settings: LossConfig) -> Tensor:
    """[B, T] bool: student and teacher closer than ``gap_mask``; False where either is nan or infinite."""
    limit = inf if settings.gap_mask is None else settings.gap_mask
    return (student_lp_BT.detach() - teacher_lp_BT.detach()).abs() < limit


def _only(mask_BT: Tensor, values_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, values_BT, torch.zeros_like(values_BT))


def _sum_and_count(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    values_BT = values_BT.detach().double()
    return torch.stack([_only(mask_BT, values_BT).sum(), mask_BT.sum().double()])
