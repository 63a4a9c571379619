"""What every teacher promises, and what all teachers share: view, template and the way values come back.

T = student tokens, U = teacher tokens of a response; log-probabilities in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from uniopd_mm.alignment import AlignedResponse, Aligner, teacher_messages, text_encoder, vocabulary
from uniopd_mm.config import TeacherConfig
from uniopd_mm.errors import UniOPDError
from uniopd_mm.rollout import Group, Message, Prompt, Rollout

if TYPE_CHECKING:
    from uniopd_mm.processors import EncodedPrompt, VLMProcessor

REASON_CLASSES = ("server", "reply")
"""What the reason of an unscored rollout begins with when its servers are the cause: nobody answered, or the answer
could not be used.  All other reasons are of class ``alignment``."""


class TeacherError(UniOPDError, RuntimeError):
    """A teacher left more rollouts unscored than its settings allow."""


class Teacher(Protocol):
    """Gives log-probabilities of the student's tokens."""

    name: str
    sees_images: bool

    def messages(self, prompt: Prompt) -> tuple[tuple[Message, ...], bool]:
        """The prompt in this teacher's view, and whether the images go with it; AlignmentError when it has none."""
        ...

    def score(
        self, groups: list[Group], temperature: float = 1.0, progress: Callable[[int], None] | None = None
    ) -> list[Group]:
        """Fill ``teacher``, ``teacher_logprobs`` and ``scored`` of every rollout.

        A rollout is either scored token by token, or marked unscored with a reason; there are no sentinel values.
        ``progress`` is called with the number of groups scored so far.
        """
        ...


class AlignedTeacher:
    """A teacher with its own template, processor and view of the image.  Where its numbers come from is the subclass's."""

    def __init__(
        self, name: str, settings: TeacherConfig, processor: VLMProcessor, student: VLMProcessor
    ) -> None:
        self.name, self.settings, self.processor = name, settings, processor
        self.sees_images = processor.sees_images
        self.aligner = Aligner(
            student=vocabulary(student.tokenizer),
            teacher=vocabulary(processor.tokenizer),
            student_stop_ids=student.stop_token_ids(),
            teacher_stop_ids=processor.stop_token_ids(),
            vision_ids=student.vision_token_ids(),
            teacher_vision_ids=processor.vision_token_ids(),
            encode_text=text_encoder(processor.tokenizer),
        )

    def score(
        self, groups: list[Group], temperature: float = 1.0, progress: Callable[[int], None] | None = None
    ) -> list[Group]:
        """See :class:`Teacher`."""
        raise NotImplementedError

    def messages(self, prompt: Prompt) -> tuple[tuple[Message, ...], bool]:
        """See :class:`Teacher`."""
        settings = self.settings
        return teacher_messages(prompt, settings.view, self.sees_images, settings.allow_blind, self.name)

    def encode(self, group: Group) -> EncodedPrompt:
        """The prompt as this teacher sees it: its own template, its own image tokens."""
        messages, use_images = self.messages(group.prompt)
        return self.processor.encode(list(messages), group.images if use_images else ())

    def align(self, group: Group) -> list[AlignedResponse]:
        """What this teacher must score of each rollout; nothing where ``teacher_ids`` is empty."""
        return [self.aligner.align(r.response_ids, r.finish) for r in group.rollouts]

    def fill(self, group: Group, aligned: list[AlignedResponse], answers: Iterator[Tensor | str]) -> Group:
        """The group scored.  ``answers`` gives, for each rollout in order that has ``teacher_ids``, their [U]
        log-probabilities, or the reason why there are none."""
        rollouts = [
            self._fill(rollout, response, next(answers) if len(response.teacher_ids) else "")
            for rollout, response in zip(group.rollouts, aligned, strict=True)
        ]
        return replace(group, rollouts=tuple(rollouts))

    def _fill(self, rollout: Rollout, aligned: AlignedResponse, answer: Tensor | str) -> Rollout:
        if isinstance(answer, str):
            reason = answer or aligned.problem or "no token that the teacher knows"
            n = len(rollout.response_ids)
            teacher_lp, usable = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        else:
            reason = aligned.problem or "no finite teacher log-probability"
            teacher_lp, scored = aligned.to_student(answer, rollout.student_logprobs, self.settings.align)
            usable = scored & torch.isfinite(teacher_lp)
        return replace(
            rollout,
            teacher=self.name,
            teacher_logprobs=torch.where(usable, teacher_lp, 0.0).float(),
            scored=usable,
            unscored_reason="" if bool(usable.any()) else reason,
        )


def is_unscored(rollout: Rollout) -> bool:
    """A teacher was asked and no token of the response is scored."""
    return rollout.scored is not None and not bool(rollout.scored.any())


def reason_class(reason: str) -> str:
    """``server``, ``reply`` or ``alignment``: what kind of thing left a rollout unscored."""
    head = reason.partition(":")[0]
    return head if head in REASON_CLASSES else "alignment"
