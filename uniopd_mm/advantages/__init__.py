"""Token advantages and their calibration: pure functions, tensors in and tensors out.

Legend of the shape suffixes: B rollouts, T response positions.  Advantages and returns are in nats; positive
means the token (the rollout) should become more likely.  An outcome is 1 correct, 0 incorrect, -1 unknown.
"""

from uniopd_mm.advantages.calibrate import calibrate
from uniopd_mm.advantages.groups import group_positions
from uniopd_mm.advantages.margin import greedy_mask, group_margins, group_mask, margin, shift_offsets
from uniopd_mm.advantages.outcome import outcome_offsets
from uniopd_mm.advantages.position import position_weights
from uniopd_mm.advantages.residual import group_calibrated
from uniopd_mm.advantages.token import add_per_rollout, masked_mean, rollout_return, token_advantage

__all__ = [
    "add_per_rollout",
    "calibrate",
    "greedy_mask",
    "group_calibrated",
    "group_margins",
    "group_mask",
    "group_positions",
    "margin",
    "masked_mean",
    "outcome_offsets",
    "position_weights",
    "rollout_return",
    "shift_offsets",
    "token_advantage",
]
