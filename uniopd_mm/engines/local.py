"""The in-process engine: run each prompt once, decode its group's responses behind it, drop finished rows.

R rows (rollouts) in flight, T response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from uniopd_mm.config import SamplingConfig
from uniopd_mm.engines.base import answered
from uniopd_mm.engines.sampling import rollout_uniforms, sample_tokens
from uniopd_mm.models import MultimodalLM, context_length, start_decoding
from uniopd_mm.rollout import Group, Rollout

COMPACT_BELOW = 0.75
"""Finished rows leave the batch once fewer than this share of the rows still run (dropping copies the cache)."""
LOOK_EVERY = 8
"""Steps between two looks, on a GPU, at which rows are done."""


class LocalEngine:
    """Samples with the trainer's own module; weights are always current."""

    matches_trainer = True

    def __init__(self, student: MultimodalLM, concurrent_rollouts: int = 256) -> None:
        self.student = student
        self.concurrent_rollouts = concurrent_rollouts
        self.failed: list[str] = []  # nothing fails in process
        self.context = context_length(student.text_config)
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
        finished: Callable[[list[Group]], None] | None = None,
    ) -> list[Group]:
        """See :class:`uniopd_mm.engines.base.Engine`."""
        self.student.trim_images()
        per_batch = max(1, self.concurrent_rollouts // n)
        # Prompts of like length together: less padding.  Results do not depend on it.
        order = sorted(range(len(groups)), key=lambda i: len(groups[i].encoded.input_ids))
        done: dict[int, Group] = {}
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            for ready in self._decode([groups[i] for i in chosen], n, sampling, seed):
                processor = self.student.processor
                fresh = {chosen[g]: answered(processor, groups[chosen[g]], r) for g, r in ready.items()}
                done |= fresh
                if finished:
                    finished(list(fresh.values()))
                if progress:
                    progress(len(done) * n)
        return [done[i] for i in range(len(groups))]

    def _decode(
        self, groups: list[Group], n: int, sampling: SamplingConfig, seed: tuple[int, ...]
    ) -> Iterator[dict[int, tuple[Rollout, ...]]]:
        """Rollouts by position of their group, groups as they get done."""
        student, device, limit = self.student, self.student.device, sampling.max_new_tokens
        stop_ids = torch.tensor(
            [*student.processor.stop_token_ids(), *sampling.stop_token_ids], dtype=torch.long, device=device
        )
        uniform_TR = torch.from_numpy(
            np.stack([rollout_uniforms(seed, g.slot, i, limit) for g in groups for i in range(n)], axis=1)
        ).to(device)
        n_rows = len(groups) * n
        ids_TR = torch.zeros(limit, n_rows, dtype=torch.long, device=device)
        logprobs_TR = torch.zeros(limit, n_rows, device=device)
        stops_TR = torch.zeros(limit, n_rows, dtype=torch.bool, device=device)
        suppressed = self.suppressed.to(device)
        # Asking a GPU which rows are done makes it wait; rows that run on meanwhile are cut off at their stop.
        look_every = 1 if device.type == "cpu" else LOOK_EVERY

        decoding = start_decoding(student, [g.encoded for g in groups], n)
        row_R = torch.arange(n_rows, device=device)  # the rollout that each row in flight belongs to
        running_R = torch.ones(n_rows, dtype=torch.bool, device=device)
        rollout_of_row = np.arange(n_rows)  # row_R, where it can be looked at without waiting for a GPU
        waiting = set(range(len(groups)))
        for t in range(limit):
            logits_RV = student.logits(decoding.hidden_RH)
            token_R, logprob_R = sample_tokens(logits_RV, uniform_TR[t, row_R], sampling, suppressed)
            ids_TR[t, row_R], logprobs_TR[t, row_R] = token_R, logprob_R
            stops_R = torch.isin(token_R, stop_ids)
            stops_TR[t, row_R] = stops_R
            running_R = running_R & ~stops_R
            if t + 1 == limit:
                break
            if t % look_every == 0:
                keep = running_R.cpu().nonzero()[:, 0]  # here a GPU is waited for
                busy = set((rollout_of_row[keep.numpy()] // n).tolist())
                if waiting - busy:
                    ready = sorted(waiting - busy)
                    yield self._collect(ready, n, ids_TR[: t + 1], logprobs_TR[: t + 1], stops_TR[: t + 1])
                    waiting &= busy
                if not waiting:
                    return
                if len(keep) < COMPACT_BELOW * len(row_R):
                    rollout_of_row = rollout_of_row[keep.numpy()]
                    keep = keep.to(device)
                    decoding.keep(keep)
                    row_R, token_R, running_R = row_R[keep], token_R[keep], running_R[keep]
            decoding.feed(token_R)
        yield self._collect(sorted(waiting), n, ids_TR, logprobs_TR, stops_TR)

    def _collect(
        self, groups: list[int], n: int, ids_TR: Tensor, logprobs_TR: Tensor, stops_TR: Tensor
    ) -> dict[int, tuple[Rollout, ...]]:
        """The rollouts of these groups, which have stopped or are at the limit: T tokens."""
        indices = [i for _ in groups for i in range(n)]
        columns = torch.tensor([g * n + i for g in groups for i in range(n)], device=ids_TR.device)
        ids_RT, logprobs_RT = ids_TR[:, columns].T.cpu(), logprobs_TR[:, columns].T.cpu()
        stops_RT = stops_TR[:, columns].T.cpu()
        stopped_R = stops_RT.any(1)
        length_R = torch.where(stopped_R, stops_RT.int().argmax(1) + 1, ids_RT.shape[1])
        rollouts = [
            Rollout(
                response_ids=ids_T[:length].clone(),
                sampler_logprobs=logprobs_T[:length].clone(),
                finish="stop" if stopped else "length",
                index=index,
            )
            for ids_T, logprobs_T, length, stopped, index in zip(
                ids_RT, logprobs_RT, length_R.tolist(), stopped_R.tolist(), indices, strict=True
            )
        ]
        return {g: tuple(rollouts[k * n : (k + 1) * n]) for k, g in enumerate(groups)}
