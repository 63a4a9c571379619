"""The outcome control: a constant added reward, to tell what margin calibration does beyond it."""

from __future__ import annotations

import torch
from torch import Tensor


def outcome_offsets(outcome_B: Tensor, weight: float) -> Tensor:
    """weight * (2R - 1) per rollout [B] float64, nats per token: + correct, - incorrect, 0 unknown.

    Natural margins are close to 0 (about 0.01), so a margin shift to delta acts much like this with weight
    delta / 2.
    """
    sign_B = 2.0 * outcome_B.double() - 1.0
    return torch.where(outcome_B < 0, torch.zeros_like(sign_B), weight * sign_B)
