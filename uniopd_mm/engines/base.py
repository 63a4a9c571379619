"""What every rollout engine promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from uniopd_mm.rollout import Group, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from uniopd_mm.config import SamplingConfig
    from uniopd_mm.processors import VLMProcessor


class Engine(Protocol):
    """Samples answers with the student's weights."""

    matches_trainer: bool
    """True: ``sampler_logprobs`` come from the trainer's own weights and kernels."""

    def sample(
        self,
        groups: list[Group],
        n: int,
        sampling: SamplingConfig,
        seed: tuple[int, ...],
        progress: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """Fill each group with ``n`` rollouts.

        Vision tokens are never sampled; ids are returned as sampled, never re-tokenised.  A rollout depends on the
        weights, ``seed``, its group's slot and its index alone, not on what else is in the batch.  ``progress`` is
        called with the number of rollouts finished so far.
        """
        ...


def encode_groups(
    drawn: Iterable[tuple[int, Prompt, tuple[Image, ...]]], processor: VLMProcessor, weight_version: int = 0
) -> list[Group]:
    """Prompts with opened images -> groups without rollouts; ``drawn`` holds (slot, prompt, images)."""
    return [
        Group(prompt, processor.encode(list(prompt.messages), images), (), images, slot, weight_version)
        for slot, prompt, images in drawn
    ]
