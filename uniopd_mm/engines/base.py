"""What every rollout engine promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from uniopd_mm.errors import DataError, UniOPDError
from uniopd_mm.processors import ProcessorError
from uniopd_mm.processors.thoughts import opened_thought
from uniopd_mm.rollout import Group, Prompt, Rollout

if TYPE_CHECKING:
    from PIL.Image import Image

    from uniopd_mm.config import SamplingConfig
    from uniopd_mm.processors import EncodedPrompt, VLMProcessor


class EngineError(UniOPDError, RuntimeError):
    """Too few rollouts could be sampled, or the weights did not reach a server."""


class Engine(Protocol):
    """Samples answers with the student's weights."""

    matches_trainer: bool
    """True: ``sampler_logprobs`` come from the trainer's own weights and kernels."""
    failed: list[str]
    """Why rollouts of the last :meth:`sample` are missing, one reason for each."""
    context: int | None
    """Tokens that prompt and answer may have together; None = not known."""

    def sample(
        self,
        groups: list[Group],
        n: int,
        sampling: SamplingConfig,
        seed: tuple[int, ...],
        progress: Callable[[int], None] | None = None,
        finished: Callable[[list[Group]], None] | None = None,
    ) -> list[Group]:
        """Fill each group with ``n`` rollouts; the groups in their order.

        Vision tokens are never sampled; ids are returned as sampled, never re-tokenised.  A rollout depends on the
        weights, ``seed``, its group's slot and its index alone, not on what else is in the batch.  ``progress`` is
        called with the number of rollouts finished so far, ``finished`` with groups as soon as all their rollouts are
        there, each group once.  Rollouts that a server failed to sample are left out, and a group that has none with
        them; ``failed`` then says why.
        """
        ...


def encode_prompt(
    processor: VLMProcessor, prompt: Prompt, images: tuple[Image, ...], max_tokens: int | None = None
) -> EncodedPrompt:
    """The prompt as the student takes it; DataError naming its row when it cannot be encoded or is too long.

    A prompt is never truncated: cutting through an image's tokens would leave the rest without their picture.
    """
    try:
        encoded = processor.encode(list(prompt.messages), images)
    except ProcessorError as error:
        raise DataError(f"{prompt.source or prompt.id}: {error}") from error
    if max_tokens is not None and len(encoded.input_ids) > max_tokens:
        raise DataError(
            f"{prompt.source or prompt.id}: {len(encoded.input_ids)} prompt tokens, at most {max_tokens} fit beside the "
            "response. Lower max_pixels or rollout.max_new_tokens, or remove the row."
        )
    return encoded


def encode_groups(
    drawn: Iterable[tuple[int, Prompt, tuple[Image, ...]]], processor: VLMProcessor
) -> list[Group]:
    """(slot, prompt, opened images) -> groups without rollouts."""
    return [
        Group(prompt, encode_prompt(processor, prompt, images), (), images, slot)
        for slot, prompt, images in drawn
    ]


def answered(processor: VLMProcessor, group: Group, rollouts: Iterable[Rollout]) -> Group:
    """The group with its rollouts, each with its text as it reads behind the prompt: the ``<think>`` that the chat
    template opened for it included."""
    opening = opened_thought(processor, group.encoded)
    filled = (replace(r, text=opening + processor.decode(r.response_ids)) for r in rollouts)
    return replace(group, rollouts=tuple(filled))
