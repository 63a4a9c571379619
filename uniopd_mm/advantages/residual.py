"""Group-calibrated on-policy distillation (GC-OPD, arXiv 2608.19181): what the verifier says beyond the
teacher.

Within a group, verifier rewards and returns are put on one scale; their difference (the residual) says how
far teacher and verifier disagree on a rollout, and is handed to its tokens, more of it to those the teacher
likes.
"""

from __future__ import annotations

from math import fsum, sqrt

import torch
from torch import Tensor

from uniopd_mm.advantages.groups import group_positions
from uniopd_mm.advantages.token import masked_mean, rollout_return

FLAT = 1e-6
"""A standard deviation below this carries no order (the paper's tau_G and tau_T)."""


def group_calibrated(
    advantages_BT: Tensor,
    scored_BT: Tensor,
    reward_B: Tensor,
    group_index_B: Tensor,
    *,
    beta: float,
    clip: float,
) -> Tensor:
    """A + beta * c * (z(R) - z(G)) [B, T], clipped to +-``clip``; 0 where not scored.

    ``reward_B``: 0 / 1 or graded, nan = unknown.  z: score within the group (population deviation) over
    rollouts that have both reward and return; the residual is 0 for the others and in groups where either
    deviation is flat.  c_t = 1 + tanh(u_t / 2) with u_t the score of A_t within its rollout; 1 in a flat
    rollout.
    """
    scored_BT = scored_BT.bool()
    values_BT = torch.where(scored_BT, advantages_BT, torch.zeros_like(advantages_BT)).double()
    return_B, has_return_B = rollout_return(values_BT, scored_BT)
    residual_B = _residuals(reward_B.double(), return_B, has_return_B, group_index_B)
    centred_BT = values_BT - return_B[:, None]
    deviation_B = masked_mean(centred_BT.square(), scored_BT, dim=-1).sqrt()
    flat_B = (deviation_B < FLAT) | ~has_return_B
    scale_B = torch.where(flat_B, torch.ones_like(deviation_B), deviation_B)
    u_BT = torch.where(flat_B[:, None], torch.zeros_like(centred_BT), centred_BT / scale_B[:, None])
    moved_BT = values_BT + beta * (1.0 + torch.tanh(u_BT / 2)) * residual_B[:, None]
    clipped_BT = moved_BT.clamp(-clip, clip)
    return torch.where(scored_BT, clipped_BT, torch.zeros_like(clipped_BT)).to(advantages_BT.dtype)


def _residuals(reward_B: Tensor, return_B: Tensor, has_return_B: Tensor, group_index_B: Tensor) -> Tensor:
    """z(R) - z(G) of each rollout [B] float64."""
    rewards, returns = reward_B.tolist(), return_B.tolist()
    both = (has_return_B & reward_B.isfinite()).tolist()
    residual_B = torch.zeros_like(return_B)
    for group in group_positions(group_index_B):
        members = [i for i in group if both[i]]
        z_reward = _z_scores([rewards[i] for i in members])
        z_return = _z_scores([returns[i] for i in members])
        if z_reward and z_return:
            gap = [a - b for a, b in zip(z_reward, z_return, strict=True)]
            residual_B[members] = torch.tensor(gap, dtype=residual_B.dtype, device=residual_B.device)
    return residual_B


def _z_scores(values: list[float]) -> list[float]:
    """Scores with the population deviation; [] when that is flat.  fsum: the order of the rollouts does not
    matter."""
    if not values:
        return []
    mean = fsum(values) / len(values)
    deviation = sqrt(fsum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / deviation for v in values] if deviation >= FLAT else []
