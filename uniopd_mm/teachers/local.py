"""A teacher in the training process: any causal LM or MLLM that ``from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uniopd_mm.config import TeacherConfig
from uniopd_mm.models import MultimodalLM, response_logprobs, split_groups
from uniopd_mm.rollout import Group
from uniopd_mm.teachers.base import AlignedTeacher

if TYPE_CHECKING:
    from uniopd_mm.processors import VLMProcessor


class LocalTeacher(AlignedTeacher):
    """Scores groups with weights in this process."""

    def __init__(
        self,
        name: str,
        settings: TeacherConfig,
        model: MultimodalLM,
        student: VLMProcessor,
        concurrent_rollouts: int = 256,
        micro_tokens: int = 8192,
    ) -> None:
        super().__init__(name, settings, model.processor, student)
        self.model = model
        self.concurrent_rollouts, self.micro_tokens = concurrent_rollouts, micro_tokens

    @torch.no_grad()
    def score(
        self, groups: list[Group], temperature: float = 1.0, progress: Callable[[int], None] | None = None
    ) -> list[Group]:
        """See :class:`uniopd_mm.teachers.base.Teacher`."""
        self.model.trim_images()
        scored: list[Group] = []
        for batch in split_groups(groups, self.concurrent_rollouts):
            scored += self._score_batch(batch, temperature)
            if progress:
                progress(len(scored))
        return scored

    def _score_batch(self, groups: list[Group], temperature: float) -> list[Group]:
        aligned = [self.align(g) for g in groups]
        flat = [(i, a.teacher_ids) for i, row in enumerate(aligned) for a in row if len(a.teacher_ids)]
        values: Iterator[Tensor] = iter(())
        if flat:
            rows, responses = zip(*flat, strict=True)
            encoded = [self.encode(g) for g in groups]
            values = iter(
                response_logprobs(
                    self.model, encoded, list(rows), list(responses), temperature, self.micro_tokens
                )
            )
        return [self.fill(g, row, values) for g, row in zip(groups, aligned, strict=True)]
