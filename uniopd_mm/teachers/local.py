"""A teacher in the training process: any causal LM or MLLM that ``from_pretrained`` loads.

R rollouts, U teacher tokens of a response, T student tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uniopd_mm.alignment import AlignedResponse, Aligner, teacher_messages, text_encoder, vocabulary
from uniopd_mm.config import TeacherConfig
from uniopd_mm.models import MultimodalLM, response_logprobs, split_groups
from uniopd_mm.rollout import Group, Message, Prompt, Rollout

if TYPE_CHECKING:
    from uniopd_mm.processors import EncodedPrompt, VLMProcessor


class LocalTeacher:
    """Scores groups with its own template, processor and view of the image."""

    def __init__(
        self,
        name: str,
        settings: TeacherConfig,
        model: MultimodalLM,
        student: VLMProcessor,
        concurrent_rollouts: int = 256,
        micro_tokens: int = 8192,
    ) -> None:
        self.name, self.settings, self.model = name, settings, model
        self.processor = model.processor
        self.sees_images = self.processor.sees_images
        self.concurrent_rollouts, self.micro_tokens = concurrent_rollouts, micro_tokens
        self.aligner = Aligner(
            student=vocabulary(student.tokenizer),
            teacher=vocabulary(self.processor.tokenizer),
            student_stop_ids=student.stop_token_ids(),
            teacher_stop_ids=self.processor.stop_token_ids(),
            vision_ids=student.vision_token_ids(),
            teacher_vision_ids=self.processor.vision_token_ids(),
            encode_text=text_encoder(self.processor.tokenizer),
        )

    def messages(self, prompt: Prompt) -> tuple[tuple[Message, ...], bool]:
        """See :class:`uniopd_mm.teachers.base.Teacher`."""
        settings = self.settings
        return teacher_messages(prompt, settings.view, self.sees_images, settings.allow_blind, self.name)

    def encode(self, group: Group) -> EncodedPrompt:
        """The prompt as this teacher sees it: its own template, its own image tokens."""
        messages, use_images = self.messages(group.prompt)
        return self.processor.encode(list(messages), group.images if use_images else ())

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
        aligned = [[self.aligner.align(r.response_ids, r.finish) for r in g.rollouts] for g in groups]
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
        return [
            replace(g, rollouts=tuple(self._fill(r, a, values) for r, a in zip(g.rollouts, row, strict=True)))
            for g, row in zip(groups, aligned, strict=True)
        ]

    def _fill(self, rollout: Rollout, aligned: AlignedResponse, values: Iterator[Tensor]) -> Rollout:
        n = len(rollout.response_ids)
        if not len(aligned.teacher_ids):
            reason = aligned.problem or "no token that the teacher knows"
            nothing = torch.zeros(n, dtype=torch.bool)
            return replace(
                rollout,
                teacher=self.name,
                teacher_logprobs=torch.zeros(n),
                scored=nothing,
                unscored_reason=reason,
            )
        teacher_lp, scored = aligned.to_student(next(values), rollout.student_logprobs, self.settings.align)
        usable = scored & torch.isfinite(teacher_lp)
        return replace(
            rollout,
            teacher=self.name,
            teacher_logprobs=torch.where(usable, teacher_lp, 0.0).float(),
            scored=usable,
            unscored_reason=""
            if bool(usable.any())
            else aligned.problem or "no finite teacher log-probability",
        )
