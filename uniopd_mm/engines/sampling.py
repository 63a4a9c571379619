"""One token per row from logits: reproducible draws by inverse CDF.

R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from uniopd_mm.config import SamplingConfig

BLOCK = 128
"""Tokens summed up at once; the cumulative sum then runs over blocks, and over the tokens of one block."""


def rollout_uniforms(seed: Sequence[int], slot: int, index: int, n: int) -> np.ndarray:
    """[n] float64 in [0, 1): the random numbers of one rollout, the same whatever batch or rank it runs in."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, slot, index]))).random(n)


def sample_tokens(
    logits_RV: Tensor, uniform_R: Tensor, sampling: SamplingConfig, suppressed: Tensor
) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability (temperature applied, nothing suppressed or truncated).

    Greedy for temperature 0, with the log-probability at temperature 1.
    """
    if sampling.temperature not in (0, 1):
        logits_RV = logits_RV / sampling.temperature
    top_R1 = logits_RV.amax(-1, keepdim=True)
    weight_RV = (logits_RV - top_R1).exp_()
    lse_R = weight_RV.sum(-1).log_() + top_R1[:, 0]
    weight_RV.index_fill_(-1, suppressed, 0.0)
    if sampling.temperature == 0:
        token_R = weight_RV.argmax(-1)
    else:
        token_R = draw(truncate(weight_RV, sampling), uniform_R)
    return token_R, logits_RV.gather(-1, token_R[:, None])[:, 0] - lse_R


def draw(weight_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """[R] the first token whose cumulative weight exceeds ``uniform`` of the total: never one of weight 0."""
    n_rows, n_vocabulary = weight_RV.shape
    blocks_RNB = pad(weight_RV, (0, -n_vocabulary % BLOCK)).view(n_rows, -1, BLOCK)
    cdf_RN = blocks_RNB.sum(-1).double().cumsum(-1)
    goal_R1 = uniform_R[:, None].to(cdf_RN) * cdf_RN[:, -1:]
    block_R1 = _first_above(cdf_RN, goal_R1)
    row_R = torch.arange(n_rows, device=weight_RV.device)
    inside_RB = blocks_RNB[row_R, block_R1[:, 0]].double().cumsum(-1)
    goal_R1 = goal_R1 - pad(cdf_RN, (1, 0)).gather(1, block_R1)
    return (block_R1 * BLOCK + _first_above(inside_RB, goal_R1))[:, 0]


def _first_above(cdf_RN: Tensor, goal_R1: Tensor) -> Tensor:
    """[R, 1] index of the first entry above the goal; a goal that rounding raised to the end counts as just below."""
    below_R1 = cdf_RN[:, -1:].nextafter(cdf_RN.new_zeros(()))
    return torch.searchsorted(cdf_RN, torch.minimum(goal_R1, below_R1), right=True)


def truncate(weight_RV: Tensor, sampling: SamplingConfig) -> Tensor:
    """Weights (probabilities up to a factor) with what top-k, min-p and top-p exclude set to 0."""
    if sampling.top_k and sampling.top_k < weight_RV.shape[-1]:
        kth_R1 = weight_RV.topk(sampling.top_k, dim=-1).values[:, -1:]
        weight_RV = torch.where(weight_RV >= kth_R1, weight_RV, 0.0)
    if sampling.min_p:
        weight_RV = torch.where(
            weight_RV >= sampling.min_p * weight_RV.amax(-1, keepdim=True), weight_RV, 0.0
        )
    if sampling.top_p < 1:
        sorted_RV, index_RV = weight_RV.sort(dim=-1, descending=True)
        total_R1 = sorted_RV.sum(-1, keepdim=True)
        before_RV = sorted_RV.cumsum(-1) - sorted_RV  # mass ahead of each token: the likeliest always stays
        kept_RV = torch.where(before_RV < sampling.top_p * total_R1, sorted_RV, 0.0)
        weight_RV = torch.zeros_like(weight_RV).scatter(-1, index_RV, kept_RV)
    return weight_RV
