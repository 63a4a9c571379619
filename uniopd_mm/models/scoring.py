"""Scoring responses in batches of whole groups.

R rollouts, T response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from uniopd_mm.models.wrapper import MultimodalLM
from uniopd_mm.rollout import Group

if TYPE_CHECKING:
    from uniopd_mm.processors import EncodedPrompt


def split_groups(groups: list[Group], max_rollouts: int) -> Iterator[list[Group]]:
    """Consecutive batches of whole groups with at most ``max_rollouts`` rollouts (at least one group)."""
    batch: list[Group] = []
    for group in groups:
        if batch and sum(len(g.rollouts) for g in [*batch, group]) > max_rollouts:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def group_logprobs(
    model: MultimodalLM,
    groups: list[Group],
    encoded: list[EncodedPrompt],
    temperature: float,
    max_rollouts: int,
    max_tokens: int,
) -> list[torch.Tensor]:
    """[T] of every rollout in order, given its group's prompt in ``encoded``; batches of at most ``max_rollouts``."""
    values: list[torch.Tensor] = []
    prompts = iter(encoded)
    for batch in split_groups(groups, max_rollouts):
        asked = [(prompt, g) for prompt, g in [(next(prompts), g) for g in batch] if g.rollouts]
        if asked:
            values += response_logprobs(
                model,
                [prompt for prompt, _ in asked],
                [row for row, (_, g) in enumerate(asked) for _ in g.rollouts],
                [r.response_ids for _, g in asked for r in g.rollouts],
                temperature,
                max_tokens,
            )
    return values


def response_logprobs(
    model: MultimodalLM,
    encoded: list[EncodedPrompt],
    rows: list[int],
    responses: list[torch.Tensor],
    temperature: float,
    max_tokens: int,
) -> list[torch.Tensor]:
    """log p of each response [T] float32 on the CPU; ``rows[r]`` is the prompt of response r, ``max_tokens`` bounds
    what runs at once."""
    ids_RT, mask_RT = pad_responses(responses, model.processor.pad_token_id)
    device = model.device
    values_RT = model(
        encoded,
        torch.tensor(rows, device=device),
        ids_RT.to(device),
        mask_RT.to(device),
        temperature,
        plan_chunks([len(ids) for ids in responses], max_tokens, device=device),
    ).cpu()
    return [values_RT[r, : len(ids)] for r, ids in enumerate(responses)]


def plan_chunks(
    lengths: list[int], max_tokens: int, at_least: int = 1, device: torch.device | None = None
) -> list[torch.Tensor]:
    """Rollouts that run together: of like length, together at most ``max_tokens`` tokens with padding (or one rollout).

    The longest come last.  ``at_least`` so many chunks, of which the largest are halved if need be; ValueError when
    there are fewer rollouts than that.
    """
    if at_least > len(lengths):
        raise ValueError(f"{len(lengths)} rollouts cannot make {at_least} chunks")
    left = sorted(range(len(lengths)), key=lambda r: -lengths[r])
    chunks: list[list[int]] = []
    while left:
        n = max(1, max_tokens // max(1, lengths[left[0]]))
        chunks.append(left[:n])
        left = left[n:]
    while len(chunks) < at_least:
        i = max(range(len(chunks)), key=lambda c: len(chunks[c]))
        half = len(chunks[i]) // 2
        chunks[i : i + 1] = [chunks[i][:half], chunks[i][half:]]
    return [torch.tensor(sorted(chunk), device=device) for chunk in reversed(chunks)]


def pad_responses(responses: list[torch.Tensor], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [R, T] int64 and mask [R, T] bool."""
    longest = max(len(ids) for ids in responses)
    ids_RT = torch.full((len(responses), longest), pad_id, dtype=torch.long)
    mask_RT = torch.zeros(len(responses), longest, dtype=torch.bool)
    for r, ids in enumerate(responses):
        ids_RT[r, : len(ids)] = ids
        mask_RT[r, : len(ids)] = True
    return ids_RT, mask_RT
