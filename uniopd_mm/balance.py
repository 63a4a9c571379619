"""Online, correctness-aware balancing: train on correct and incorrect rollouts in a wanted proportion.

B rollouts.  An outcome is 1 correct, 0 incorrect, -1 unknown; unknown ones are neither counted nor dropped.
"""

from __future__ import annotations

import hashlib
from math import floor, isinf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uniopd_mm.advantages.groups import group_positions

if TYPE_CHECKING:
    from uniopd_mm.config import BalanceConfig


def balance(
    outcome_B: Tensor, group_index_B: Tensor, keys_B: Tensor, settings: BalanceConfig, seed: int, step: int
) -> Tensor:
    """kept [B] bool: a random subset of the class that is too large is dropped, per group or over the batch.

    ``keys_B``: int64 names of the rollouts (slot * N + i), the same on any number of ranks; whom chance picks
    depends on (seed, step, key) and on nothing else.  A group's decision needs only its own rollouts; scope
    batch needs the rollouts of all ranks.  Raises ValueError where keys repeat.
    """
    outcomes, keys = outcome_B.tolist(), keys_B.tolist()
    if len(set(keys)) != len(keys):
        raise ValueError(
            f"balance: {len(keys)} rollouts have only {len(set(keys))} different keys; pass slot * n + i."
        )
    kept_B = torch.ones(len(keys), dtype=torch.bool, device=outcome_B.device)
    if settings.ratio is None:
        return kept_B
    for group in group_positions(group_index_B, together=settings.scope == "batch"):
        by_chance = sorted(group, key=lambda i: _priority(seed, step, keys[i]))
        correct = [i for i in by_chance if outcomes[i] == 1]
        incorrect = [i for i in by_chance if outcomes[i] == 0]
        n_correct, n_incorrect = kept_counts(len(correct), len(incorrect), settings.ratio)
        kept_B[correct[n_correct:] + incorrect[n_incorrect:]] = False
    return kept_B


def kept_counts(n_correct: int, n_incorrect: int, ratio: float) -> tuple[int, int]:
    """How many of each class stay so that correct : incorrect is ``ratio``.

    The scarce class stays whole; of the other stays the largest number that does not exceed its share
    (rounded down, at least 1).  Ratio 0 keeps no correct rollout and inf no incorrect one, whatever else the
    group holds; at any other ratio a group without both classes stays as it is.
    """
    if ratio == 0:
        return 0, n_incorrect
    if isinf(ratio):
        return n_correct, 0
    if not n_correct or not n_incorrect:
        return n_correct, n_incorrect
    if n_correct > n_incorrect * ratio:
        return min(n_correct, _share(n_incorrect * ratio)), n_incorrect
    return n_correct, min(n_incorrect, _share(n_correct / ratio))


def _share(n: float) -> int:
    """Rounded down, at least 1; 1e-9 because 100 * 0.29 is 28.999999999999996."""
    return max(1, floor(n + 1e-9))


def _priority(seed: int, step: int, key: int) -> bytes:
    """A random number that names its rollout: the same on every machine, rank and Python."""
    return hashlib.blake2b(f"balance/{seed}/{step}/{key}".encode(), digest_size=8).digest()
