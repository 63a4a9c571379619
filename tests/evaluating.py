"""An engine and a processor without a model, for tests of what is done with answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from uniopd_mm.config import SamplingConfig
from uniopd_mm.distributed import World
from uniopd_mm.engines.sampling import rollout_uniforms
from uniopd_mm.rollout import Group, Prompt, Rollout

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=4)


class OneOfMany(World):
    """A rank whose others run before or after it."""

    def gather(self, items: Any) -> list[Any]:
        return list(items)


def world(rank: int = 0, size: int = 1) -> World:
    return OneOfMany(rank, size, rank, torch.device("cpu"))


def prompt(id: str, answer: str = "7", text: str = "how many ?", **more: Any) -> Prompt:
    return Prompt(id, ({"role": "user", "content": text},), answer=answer, **more)


class Processor:
    """Encodes a text as its characters."""

    def encode(self, messages: list[dict[str, Any]], images: Any) -> Any:
        ids = [ord(c) for message in messages for c in str(message["content"])]
        return SimpleNamespace(input_ids=torch.tensor(ids))

    def expected_image_tokens(self, height: int, width: int) -> int:
        return height * width


class Engine:
    """Answers a number that depends on the seed, the slot and the index alone; ``stop_after`` groups it is killed."""

    matches_trainer = True

    def __init__(
        self,
        stop_after: int | None = None,
        lose: Callable[[Group, int], bool] | None = None,
        context: int | None = None,
    ) -> None:
        self.stop_after, self.lose = stop_after, lose or (lambda group, index: False)
        self.failed: list[str] = []
        self.context = context
        self.calls: list[tuple[list[str], int]] = []
        self.limits: list[int] = []
        """``max_new_tokens`` of each call."""

    def sample(
        self,
        groups: list[Group],
        n: int,
        sampling: SamplingConfig,
        seed: tuple[int, ...],
        progress: Any = None,
        finished: Callable[[list[Group]], None] | None = None,
    ) -> list[Group]:
        self.calls.append(([group.prompt.id for group in groups], n))
        self.limits.append(sampling.max_new_tokens)
        self.failed, done = [], []
        for group in groups:
            if self.stop_after == 0:
                raise KeyboardInterrupt
            rollouts = [self._rollout(seed, group, i) for i in range(n) if not self.lose(group, i)]
            self.failed += ["the server is down"] * (n - len(rollouts))
            if rollouts:
                done.append(replace(group, rollouts=tuple(rollouts)))
                if finished:
                    finished([done[-1]])
            if self.stop_after is not None:
                self.stop_after -= 1
        return done

    def _rollout(self, seed: tuple[int, ...], group: Group, index: int) -> Rollout:
        number = int(rollout_uniforms(seed, group.slot, index, 1)[0] * 1e9)
        text = f"{group.prompt.id} {number}"
        return Rollout(torch.tensor([1, 2]), torch.zeros(2), "stop", text, index=index)
