"""What is measured: four sizes of work, and what each is asked to reach against the peer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One optimizer step: ``prompts`` prompts with one image each, ``n`` rollouts of ``response`` tokens per prompt."""

    size: str
    """Key of ``models.SIZES``."""
    image_tokens: int
    prompts: int
    n: int
    response: int
    step_target: float
    """Our CPU seconds of a step are to be at most this share of the peer's."""
    memory_target: float
    """Our growth of the resident memory is to be at most this share of the peer's."""

    @property
    def folder(self) -> str:
        """Name of the folder that holds this case's models and prompts."""
        return f"{self.size}-{self.image_tokens}"

    @property
    def generated(self) -> int:
        """Response tokens of one step."""
        return self.prompts * self.n * self.response


CASES = {
    "small": Case("5m", 64, prompts=4, n=8, response=64, step_target=1 / 2.5, memory_target=1 / 2),
    "image": Case("5m", 576, prompts=2, n=8, response=64, step_target=1 / 5, memory_target=1 / 4),
    "large": Case("50m", 576, prompts=1, n=8, response=64, step_target=1 / 5, memory_target=1 / 4),
    "long": Case("5m", 256, prompts=1, n=8, response=1024, step_target=1 / 1.5, memory_target=1 / 2),
}
