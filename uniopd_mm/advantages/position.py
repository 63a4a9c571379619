"""Importance-weighted on-policy distillation (IW-OPD, arXiv 2606.22600): early tokens weigh more.

The further a rollout has drifted from what the teacher would write, the less the teacher's opinion of the
next token is worth; the drift is measured by the advantages spent so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uniopd_mm.advantages.token import rollout_return


def position_weights(advantages_BT: Tensor, scored_BT: Tensor, gamma: float) -> Tensor:
    """Factor on each valid token's advantage [B, T] float64: 1 + gamma * (1 - sum_{k<t} |A_k| / sum_k |A_k|).

    1 + gamma at the first valid token, falling towards 1; 1 where not scored and where there is no return.
    """
    scored_BT = scored_BT.bool()
    _, has_return_B = rollout_return(advantages_BT, scored_BT)
    live_BT = scored_BT & has_return_B[:, None]
    size_BT = torch.where(live_BT, advantages_BT, torch.zeros_like(advantages_BT)).double().abs()
    spent_BT = size_BT.cumsum(-1)
    total_B1 = spent_BT[:, -1:]
    share_BT = (spent_BT - size_BT) / torch.where(total_B1 > 0, total_B1, torch.ones_like(total_B1))
    return torch.where(live_BT, 1.0 + gamma * (1.0 - share_BT), torch.ones_like(share_BT))
