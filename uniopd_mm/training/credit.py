"""From scored rollouts to advantages: balance, calibrate, write back.

The statistics run over the whole batch: every rank gathers what the pure functions need (one number per token, no
logits), computes the same result, and takes its own rollouts out of it.  1 rank and many give the same numbers by
construction.  B rollouts of the global batch, T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uniopd_mm.advantages import calibrate, token_advantage
from uniopd_mm.balance import balance
from uniopd_mm.config import TrainConfig
from uniopd_mm.distributed import World
from uniopd_mm.errors import UniOPDError
from uniopd_mm.rollout import Group, Outcome


@dataclass(frozen=True)
class _Row:
    """What the statistics need of one rollout."""

    slot: int
    index: int
    advantage: Tensor  # [T] float32
    scored: Tensor  # [T] bool
    outcome: int


def assign_advantages(
    groups: list[Group], config: TrainConfig, world: World, step: int
) -> tuple[list[Group], dict[str, float]]:
    """Fill ``advantages`` and ``kept`` of every rollout; statistics of the global batch, the same on every rank."""
    rows = world.gather([_row(g, i) for g in groups for i in range(len(g.rollouts))])
    if not rows:
        raise UniOPDError("no rollout of this step was sampled")
    rows.sort(key=lambda row: (row.slot, row.index))
    advantage_BT, scored_BT = _pad(rows)
    outcome_B = torch.tensor([row.outcome for row in rows], dtype=torch.int8)
    slot_B = torch.tensor([row.slot for row in rows])
    _require_known(outcome_B, config.verifier.max_unknown_share)
    outcome_B[~scored_BT.any(-1)] = -1  # what no teacher scored takes no part in anything
    key_B = _keys(rows, config.rollout.n)
    balanced_B = balance(outcome_B, slot_B, key_B, config.balance, config.seed, step)
    measured_BT = scored_BT
    if not config.balance.margin_before_balance:
        measured_BT = scored_BT & balanced_B[:, None]
    calibrated_BT, unmasked_B, stats = calibrate(
        advantage_BT, measured_BT, outcome_B, slot_B, config.calibration
    )
    kept_B = balanced_B & unmasked_B

    place = {(row.slot, row.index): b for b, row in enumerate(rows)}
    result = []
    for group in groups:
        rollouts = []
        for i, rollout in enumerate(group.rollouts):
            b = place[group.slot, i]
            n, kept = len(rollout.response_ids), bool(kept_B[b])
            advantages = calibrated_BT[b, :n].float() if kept else torch.zeros(n)
            rollouts.append(replace(rollout, advantages=advantages, kept=kept))
        result.append(replace(group, rollouts=tuple(rollouts)))
    stats["balanced_out_share"] = 1.0 - float(balanced_B.float().mean())
    stats["kept_share"] = float(kept_B.float().mean())
    return result, stats


def _keys(rows: list[_Row], n: int) -> Tensor:
    """[B] int64 names of the rollouts for the dice of balancing: slot and position among the group's scored ones, so
    that an unscored rollout changes nothing for the others."""
    n = max(n, *(row.index + 1 for row in rows))
    n_scored: dict[int, int] = {}
    keys = []
    for row in rows:
        position = n + row.index
        if bool(row.scored.any()):
            position = n_scored.get(row.slot, 0)
            n_scored[row.slot] = position + 1
        keys.append(2 * n * row.slot + position)
    return torch.tensor(keys)


def outcome_code(outcome: Outcome | None) -> int:
    """1 correct, 0 incorrect, -1 unknown."""
    return -1 if outcome is None or outcome.correct is None else int(outcome.correct)


def _row(group: Group, index: int) -> _Row:
    rollout = group.rollouts[index]
    n = len(rollout.response_ids)
    scored = rollout.scored if rollout.scored is not None else torch.zeros(n, dtype=torch.bool)
    teacher_lp = rollout.teacher_logprobs if rollout.teacher_logprobs is not None else torch.zeros(n)
    baseline = rollout.student_logprobs if rollout.baseline_logprobs is None else rollout.baseline_logprobs
    advantage = token_advantage(teacher_lp, baseline, scored)
    return _Row(group.slot, index, advantage, scored, outcome_code(rollout.outcome))


def _pad(rows: list[_Row]) -> tuple[Tensor, Tensor]:
    longest = max(len(row.advantage) for row in rows)
    advantage_BT = torch.zeros(len(rows), longest)
    scored_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        advantage_BT[b, : len(row.advantage)] = row.advantage
        scored_BT[b, : len(row.scored)] = row.scored
    return advantage_BT, scored_BT


def _require_known(outcome_B: Tensor, limit: float) -> None:
    share = float((outcome_B < 0).float().mean())
    if share > limit:
        raise UniOPDError(
            f"{share:.0%} of this step's outcomes are unknown (verifier.max_unknown_share={limit}). "
            "See outcome.reason in rollouts/step_*.jsonl; a slow verifier needs a larger verifier.timeout_s."
        )
