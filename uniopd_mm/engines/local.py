"""The in-process engine: prefill each prompt once, share its cache among the group, decode, drop finished rows.

R rows (rollouts) in flight, V vocabulary, P prompt tokens (left-padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from uniopd_mm.config import SamplingConfig
from uniopd_mm.models import MultimodalLM
from uniopd_mm.rollout import Group, Rollout

COMPACT_BELOW = 0.75
"""Finished rows leave the batch once fewer than this share of the rows still run (dropping copies the cache)."""


class LocalEngine:
    """Samples with the trainer's own module; weights are always current."""

    matches_trainer = True

    def __init__(self, student: MultimodalLM, concurrent_rollouts: int = 256) -> None:
        self.student = student
        self.concurrent_rollouts = concurrent_rollouts
        processor = student.processor
        n_rows = student.transformer.get_output_embeddings().out_features
        # Rows of the head beyond the tokenizer are padding: they decode to nothing and no teacher knows them.
        padding_rows = range(len(processor.tokenizer), n_rows)
        self.suppressed = torch.tensor(
            sorted({i for i in processor.suppress_token_ids() if i < n_rows} | set(padding_rows)),
            dtype=torch.long,
        )

    @torch.no_grad()
    def sample(
        self,
        groups: list[Group],
        n: int,
        sampling: SamplingConfig,
        seed: tuple[int, ...],
        progress: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """See :class:`uniopd_mm.engines.base.Engine`."""
        per_batch = max(1, self.concurrent_rollouts // n)
        # Prompts of like length together: less padding.  Results do not depend on it.
        order = sorted(range(len(groups)), key=lambda i: len(groups[i].encoded.input_ids))
        done: dict[int, Group] = {}
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            rollouts = self._decode([groups[i] for i in chosen], n, sampling, seed)
            done |= {i: replace(groups[i], rollouts=r) for i, r in zip(chosen, rollouts, strict=True)}
            if progress:
                progress(len(done) * n)
        return [done[i] for i in range(len(groups))]

    def _decode(
        self, groups: list[Group], n: int, sampling: SamplingConfig, seed: tuple[int, ...]
    ) -> list[tuple[Rollout, ...]]:
        student, device, limit = self.student, self.student.device, sampling.max_new_tokens
        stop_ids = torch.tensor(
            [*student.processor.stop_token_ids(), *sampling.stop_token_ids], dtype=torch.long, device=device
        )
        uniform_RT = torch.from_numpy(
            np.stack([_uniforms(seed, g.slot, i, limit) for g in groups for i in range(n)])
        ).to(device)
        n_rows = len(groups) * n
        ids_RT = torch.zeros(n_rows, limit, dtype=torch.long, device=device)
        logprobs_RT = torch.zeros(n_rows, limit, device=device)
        length_R = torch.full((n_rows,), limit, device=device)
        stopped_R = torch.zeros(n_rows, dtype=torch.bool, device=device)

        prefix = student.prefill(student.collate([g.encoded for g in groups]))
        prefix = prefix.select(torch.arange(len(groups), device=device).repeat_interleave(n))
        mask_RL, hidden_RH = prefix.mask_BP, prefix.last_hidden_BH
        row_R = torch.arange(n_rows, device=device)  # the rollout that each row in flight belongs to
        suppressed = self.suppressed.to(device)
        for t in range(limit):
            logits_RV = student.logits(hidden_RH)
            token_R, logprob_R = sample_tokens(logits_RV, uniform_RT[row_R, t], sampling, suppressed)
            running_R = ~stopped_R[row_R]
            ids_RT[row_R[running_R], t] = token_R[running_R]
            logprobs_RT[row_R[running_R], t] = logprob_R[running_R]
            ends_R = running_R & torch.isin(token_R, stop_ids)
            length_R[row_R[ends_R]] = t + 1
            stopped_R[row_R[ends_R]] = True
            keep = torch.nonzero(~stopped_R[row_R])[:, 0]
            if len(keep) == 0 or t + 1 == limit:
                break
            if len(keep) < COMPACT_BELOW * len(row_R):
                prefix, row_R, token_R, mask_RL = (
                    prefix.select(keep),
                    row_R[keep],
                    token_R[keep],
                    mask_RL[keep],
                )
            mask_RL = torch.cat([mask_RL, mask_RL.new_ones(len(row_R), 1)], dim=1)
            hidden_RH = student.decode(prefix, token_R, t, mask_RL)
        return self._collect(
            len(groups), n, ids_RT.cpu(), logprobs_RT.cpu(), length_R.tolist(), stopped_R.tolist()
        )

    def _collect(
        self,
        n_groups: int,
        n: int,
        ids_RT: Tensor,
        logprobs_RT: Tensor,
        lengths: list[int],
        stopped: list[bool],
    ) -> list[tuple[Rollout, ...]]:
        rollouts = [
            Rollout(
                response_ids=ids_RT[r, : lengths[r]].clone(),
                sampler_logprobs=logprobs_RT[r, : lengths[r]].clone(),
                finish="stop" if stopped[r] else "length",
                text=self.student.processor.decode(ids_RT[r, : lengths[r]]),
            )
            for r in range(n_groups * n)
        ]
        return [tuple(rollouts[g * n : (g + 1) * n]) for g in range(n_groups)]


def _uniforms(seed: Sequence[int], slot: int, index: int, n: int) -> np.ndarray:
    """[n] float64 in [0, 1): the random numbers of one rollout, the same whatever batch or rank it runs in."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, slot, index]))).random(n)


def sample_tokens(
    logits_RV: Tensor, uniform_R: Tensor, sampling: SamplingConfig, suppressed: Tensor
) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF, and its log-probability (temperature applied, nothing suppressed or truncated).

    Greedy for temperature 0, with the log-probability at temperature 1.
    """
    logits_RV = logits_RV / (sampling.temperature or 1.0)
    allowed_RV = logits_RV.index_fill(-1, suppressed, -torch.inf)
    if sampling.temperature == 0:
        token_R = allowed_RV.argmax(-1)
    else:
        cdf_RV = truncate(allowed_RV.softmax(-1), sampling).double().cumsum(-1)
        # right=True: the first token whose cumulative probability exceeds the draw, so never one of probability 0.
        draw_R1 = (uniform_R * cdf_RV[:, -1])[:, None]
        token_R = torch.searchsorted(cdf_RV, draw_R1, right=True)[:, 0].clamp(max=cdf_RV.shape[-1] - 1)
    logprob_R = logits_RV.gather(-1, token_R[:, None])[:, 0] - logits_RV.logsumexp(-1)
    return token_R, logprob_R


def truncate(probs_RV: Tensor, sampling: SamplingConfig) -> Tensor:
    """Probabilities with what top-k, min-p and top-p exclude set to 0 (not renormalised)."""
    if sampling.top_k and sampling.top_k < probs_RV.shape[-1]:
        kth_R1 = probs_RV.topk(sampling.top_k, dim=-1).values[:, -1:]
        probs_RV = torch.where(probs_RV >= kth_R1, probs_RV, 0.0)
    if sampling.min_p:
        probs_RV = torch.where(probs_RV >= sampling.min_p * probs_RV.amax(-1, keepdim=True), probs_RV, 0.0)
    if sampling.top_p < 1:
        sorted_RV, index_RV = probs_RV.sort(dim=-1, descending=True)
        total_R1 = sorted_RV.sum(-1, keepdim=True)
        before_RV = sorted_RV.cumsum(-1) - sorted_RV  # mass ahead of each token: the likeliest always stays
        kept_RV = torch.where(before_RV < sampling.top_p * total_R1, sorted_RV, 0.0)
        probs_RV = torch.zeros_like(probs_RV).scatter(-1, index_RV, kept_RV)
    return probs_RV
