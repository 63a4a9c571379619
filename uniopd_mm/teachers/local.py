"""A teacher in the training process: any causal LM or MLLM that ``from_pretrained`` loads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from uniopd_mm.config import TeacherConfig
from uniopd_mm.models import MultimodalLM, response_logprobs, split_groups
from uniopd_mm.rollout import Group
from uniopd_mm.teachers.base import AlignedTeacher, Work
from uniopd_mm.teachers.cache import ScoreCache

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
        cache: ScoreCache | None = None,
        device: torch.device | None = None,
    ) -> None:
        """``device``: where it computes, the weights are there only meanwhile; None = where the weights are."""
        super().__init__(name, settings, model.processor, student, cache)
        self.model, self.device = model, device or model.device
        self.concurrent_rollouts, self.micro_tokens = concurrent_rollouts, micro_tokens

    @torch.no_grad()
    def score(
        self, groups: list[Group], temperature: float = 1.0, progress: Callable[[int], None] | None = None
    ) -> list[Group]:
        """See :class:`uniopd_mm.teachers.base.Teacher`."""
        self.model.trim_images()
        scored: list[Group] = []
        with moved(self.model, self.device):
            for batch in split_groups(groups, self.concurrent_rollouts):
                works = [self.begin(g, temperature) for g in batch]
                self._answer([w for w in works if w.missing()], temperature)
                scored += map(self.finish, works)
                if progress:
                    progress(len(scored))
        return scored

    def _answer(self, works: list[Work], temperature: float) -> None:
        """Fill the missing answers."""
        asked = [(row, i) for row, work in enumerate(works) for i in work.missing()]
        if not asked:
            return
        values = response_logprobs(
            self.model,
            [w.encoded for w in works if w.encoded is not None],
            [row for row, _ in asked],
            [works[row].aligned[i].teacher_ids for row, i in asked],
            temperature,
            self.micro_tokens,
        )
        for (row, i), answer in zip(asked, values, strict=True):
            works[row].answers[i] = answer


@contextlib.contextmanager
def moved(model: MultimodalLM, device: torch.device) -> Iterator[None]:
    """Inside, the weights are on ``device``; what they rest in elsewhere stays as it is and is not copied back."""
    if model.device == device:
        yield
        return
    home = {tensor: tensor.data for tensor in [*model.parameters(), *model.buffers()]}
    try:
        for tensor, data in home.items():
            tensor.data = data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in home.items():
            tensor.data = data
