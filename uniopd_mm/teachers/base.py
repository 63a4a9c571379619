"""What every teacher promises, and what all teachers share: view, template and the way values come back.

T = student tokens, U = teacher tokens of a response; log-probabilities in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from uniopd_mm.alignment import AlignedResponse, Aligner, teacher_messages, text_encoder, vocabulary
from uniopd_mm.config import TeacherConfig
from uniopd_mm.errors import ConfigError, UniOPDError
from uniopd_mm.rollout import Group, Message, Prompt, Rollout
from uniopd_mm.teachers.cache import ScoreCache, question_keys

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

    def start(self, groups: list[Group]) -> None:
        """Begin with groups that :meth:`score` will be asked for soon, where that can go on beside other work."""
        ...

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


@dataclass
class Work:
    """One group on its way through a teacher."""

    group: Group
    aligned: list[AlignedResponse]
    """What this teacher must score of each rollout."""
    answers: list[Tensor | str | None]
    """For each rollout its [U] log-probabilities, or the reason why there are none; None = still to be asked for."""
    encoded: EncodedPrompt | None = None
    """The prompt as this teacher sees it; None when there is nothing to score."""
    keys: dict[int, bytes] = field(default_factory=dict)
    """Under which the score cache, if there is one, will file the answers that it did not know."""

    def missing(self) -> list[int]:
        """Rollouts still to be asked for."""
        return [i for i, answer in enumerate(self.answers) if answer is None]


class AlignedTeacher:
    """A teacher with its own template, processor and view of the image.  Where its numbers come from is the subclass's."""

    def __init__(
        self,
        name: str,
        settings: TeacherConfig,
        processor: VLMProcessor,
        student: VLMProcessor,
        cache: ScoreCache | None = None,
    ) -> None:
        self.name, self.settings, self.processor, self.cache = name, settings, processor, cache
        self.sees_images = processor.sees_images
        views = settings.view.values() if isinstance(settings.view, dict) else [settings.view]
        if settings.in_modal_weight and "text" not in views and (None not in views or self.sees_images):
            raise ConfigError(
                f"teachers.{name}.in_modal_weight={settings.in_modal_weight} has a meaning only where the view is text. "
                f"Type teachers.{name}.view=text, or teachers.{name}.in_modal_weight=0."
            )
        self.aligner = Aligner(
            student=vocabulary(student.tokenizer),
            teacher=vocabulary(processor.tokenizer),
            student_stop_ids=student.stop_token_ids(),
            teacher_stop_ids=processor.stop_token_ids(),
            vision_ids=student.vision_token_ids(),
            teacher_vision_ids=processor.vision_token_ids(),
            encode_text=text_encoder(processor.tokenizer),
        )

    def start(self, groups: list[Group]) -> None:
        """See :class:`Teacher`; nothing by default."""

    def score(
        self, groups: list[Group], temperature: float = 1.0, progress: Callable[[int], None] | None = None
    ) -> list[Group]:
        """See :class:`Teacher`."""
        raise NotImplementedError

    def messages(self, prompt: Prompt) -> tuple[tuple[Message, ...], bool]:
        """See :class:`Teacher`."""
        settings = self.settings
        view = settings.view_of(prompt.domain)
        return teacher_messages(prompt, view, self.sees_images, settings.allow_blind, self.name)

    def encode(self, group: Group) -> EncodedPrompt:
        """The prompt as this teacher sees it: its own template, its own image tokens."""
        messages, use_images = self.messages(group.prompt)
        return self.processor.encode(list(messages), group.images if use_images else ())

    def begin(self, group: Group, temperature: float = 1.0) -> Work:
        """Align a group's responses, and answer what the score cache knows."""
        aligned = [self.aligner.align(r.response_ids, r.finish) for r in group.rollouts]
        work = Work(group, aligned, [None if len(a.teacher_ids) else "" for a in aligned])
        if not work.missing():
            return work
        work.encoded = self.encode(group)
        if self.cache is not None:
            self._look_up(work, self.cache, temperature)
        return work

    def _look_up(self, work: Work, cache: ScoreCache, temperature: float) -> None:
        missing = work.missing()
        asked = [work.aligned[i].teacher_ids for i in missing]
        assert work.encoded is not None
        images = work.group.images if work.encoded.image_spans else ()
        for i, key, ids in zip(
            missing, question_keys(work.encoded, images, asked, temperature), asked, strict=True
        ):
            work.answers[i] = cache.get(key, len(ids))
            if work.answers[i] is None:
                work.keys[i] = key

    def finish(self, work: Work) -> Group:
        """The group scored with the answers, which the score cache keeps."""
        if self.cache is not None:
            answered = ((key, work.answers[i]) for i, key in work.keys.items())
            self.cache.put((key, answer) for key, answer in answered if isinstance(answer, Tensor))
        rows = zip(work.group.rollouts, work.aligned, work.answers, strict=True)
        return replace(work.group, rollouts=tuple(self._fill(*row) for row in rows))

    def _fill(self, rollout: Rollout, aligned: AlignedResponse, answer: Tensor | str | None) -> Rollout:
        if not isinstance(answer, Tensor):
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
