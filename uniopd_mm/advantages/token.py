"""The token advantage, the return of a rollout, and the one masked mean of the code base.

B rollouts, T response positions; index t of a [B, T] array belongs to the t-th sampled response token.
``scored`` marks the valid tokens: sampled text tokens (no vision token, no padding) that the teacher scored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_advantage(teacher_lp_BT: Tensor, student_lp_BT: Tensor, scored_BT: Tensor) -> Tensor:
    """log p_teacher - log p_student of the sampled token [B, T], detached; 0 where not scored.

    Positive: the teacher approves.  It is the one-sample estimate of the negative reverse KL as it stands: no
    discount, no baseline, no whitening.
    """
    gap_BT = teacher_lp_BT.detach() - student_lp_BT.detach()
    # not `gap * mask`: -inf * 0 is nan
    return torch.where(scored_BT.bool(), gap_BT, torch.zeros_like(gap_BT))


def masked_mean(
    values: Tensor,
    mask: Tensor,
    dim: int | tuple[int, ...] | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Sum of ``values`` where ``mask``, over ``dim`` (None = all), divided by ``denominator``.

    ``denominator`` None = the number of masked-in values; a number or a tensor of the result's shape when the
    mean is over something else (all tokens of the rollout, all rollouts of the update).  The result is 0
    where the denominator is 0.  Neither value nor gradient depends on what stands where ``mask`` is False,
    nan and inf included.
    """
    mask = mask.bool().expand_as(values)
    total = torch.where(mask, values, torch.zeros_like(values)).sum(dim)
    if denominator is None:
        denominator = mask.sum(dim)
    below = torch.as_tensor(denominator, dtype=total.dtype, device=total.device)
    empty = below == 0
    mean = total / torch.where(empty, torch.ones_like(below), below)
    return torch.where(empty, torch.zeros_like(mean), mean)


def rollout_return(advantages_BT: Tensor, scored_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean advantage over each rollout's valid tokens [B] float64, and which rollouts have one [B] bool.

    A rollout without a valid token, or with a mean that is not finite, has no return (0 here) and takes no
    part in any statistic: counted as 0 it would rank above most rollouts, whose return is a little below 0.
    """
    scored_BT = scored_BT.bool()
    values_BT = torch.where(scored_BT, advantages_BT, torch.zeros_like(advantages_BT)).double()
    # A running sum over a leading zero, not sum(): sum() adds in an order that depends on the width, so ranks
    # that pad to different widths would differ in the last bit.
    total_B = torch.nn.functional.pad(values_BT, (1, 0)).cumsum(-1)[:, -1]
    mean_B = total_B / scored_BT.sum(-1).clamp(min=1)
    valid_B = scored_BT.any(-1) & mean_B.isfinite()
    return torch.where(valid_B, mean_B, torch.zeros_like(mean_B)), valid_B


def add_per_rollout(advantages_BT: Tensor, scored_BT: Tensor, offset_B: Tensor) -> Tensor:
    """The advantages with ``offset_B`` (float64) added to every valid token; the dtype stays."""
    shifted_BT = advantages_BT.double() + offset_B[:, None]
    return torch.where(scored_BT.bool(), shifted_BT, torch.zeros_like(shifted_BT)).to(advantages_BT.dtype)
