"""The records that flow through the pipeline: Prompt -> Group of Rollouts.

Each stage returns a copy with more fields filled (``dataclasses.replace``).  T = response tokens, P = prompt tokens;
log-probabilities in nats; index t of every [T] array is the t-th sampled response token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from uniopd_mm.processors import EncodedPrompt

Message = dict[str, Any]
"""One chat turn: ``{"role": "user", "content": str | [{"type": "image"} | {"type": "text", "text": ...}, ...]}``."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the training or evaluation data, checked; images are still unopened sources."""

    id: str
    """Unique within a run, e.g. ``chartqa/812``."""
    messages: tuple[Message, ...]
    """Chat turns; the k-th ``{"type": "image"}`` part stands for ``images[k]``."""
    images: tuple[Any, ...] = ()
    """Each a path, bytes, base64 / data-URI string, PIL image, or a function that gives one of these; opened late by
    ``prompts.open_images``."""
    image_text: tuple[str, ...] | None = None
    """One textual description per image, for teachers that do not see (view ``text``)."""
    answer: str | list[str] | None = None
    domain: str = "default"
    verifier: str | None = None
    """Name of the outcome verifier; None = the domain's default."""
    source: str = ""
    """``file:row`` for error messages."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a verifier says of one response.  ``correct`` None = unknown (timeout, judge down): never the same as wrong."""

    correct: bool | None
    score: float | None = None
    """In [0, 1]; graded metrics (ANLS) keep their value here."""
    extracted: str | None = None
    """The answer found in the response; None = none found."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One student answer and all that is known of it."""

    response_ids: Tensor
    """[T] int64, exactly as sampled (the stop token included when ``finish == "stop"``)."""
    sampler_logprobs: Tensor
    """[T] float32, temperature applied as sampled, before top-p / top-k truncation."""
    finish: Literal["stop", "length", "error"]
    text: str = ""
    """The decoded response without special tokens, behind the ``<think>`` that the prompt opened for it, if it did."""
    index: int = 0
    """Which of the answers asked for it is, from 0; others of its group may be missing.  Its random numbers are its own."""
    student_logprobs: Tensor | None = None
    """[T] float32 of the weights that sampled, scored by the trainer's own forward pass at ``score_temperature``."""
    baseline_logprobs: Tensor | None = None
    """[T] float32, what the teacher's are compared with; None = ``student_logprobs``.  X-OPD mixes in what the student
    thinks when it reads the image as text."""
    outcome: Outcome | None = None
    teacher: str | None = None
    """Who scored it."""
    teacher_logprobs: Tensor | None = None
    """[T] float32; meaningful only where ``scored``."""
    scored: Tensor | None = None
    """[T] bool: teacher_logprobs is meaningful here and the token may be trained on."""
    unscored_reason: str = ""
    """Why no token is scored, when none is."""
    advantages: Tensor | None = None
    """[T] float32; positive: the token should become more likely."""
    kept: bool = True
    """False: balanced or masked out; contributes no loss but stays in the denominators."""


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one prompt.  Groups stay whole from sampling to the update."""

    prompt: Prompt
    encoded: EncodedPrompt
    rollouts: tuple[Rollout, ...]
    images: tuple[Image, ...] = ()
    """The prompt's images, opened once (RGB)."""
    slot: int = 0
    """Position of this group in the global batch of the step: the same on 1 rank and on many."""
    weight_version: int = 0
    """Optimizer steps taken by the weights that sampled."""


def fill(groups: Iterable[Group], name: str, values: Iterable[Any]) -> list[Group]:
    """Copies of the groups with the rollouts' field ``name`` set to ``values``, one for each rollout in order."""
    remaining = iter(values)
    return [
        replace(g, rollouts=tuple(replace(r, **{name: next(remaining)}) for r in g.rollouts)) for g in groups
    ]
