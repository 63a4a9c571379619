"""What every teacher promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from uniopd_mm.rollout import Group, Message, Prompt


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
