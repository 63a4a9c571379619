"""Which prompts a step sees, and reading them with their images.

The order is a pure function of (seed, step): nothing is carried from step to step, so a resumed run and every rank
agree without talking.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from uniopd_mm.errors import DataError
from uniopd_mm.prompts.images import open_images
from uniopd_mm.prompts.load import BadRow, PromptSet, bad_row_report
from uniopd_mm.rollout import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from uniopd_mm.processors import EncodedPrompt

MIN_BAD_ROWS = 5
"""Bad rows that a run survives before their share of the rows seen so far counts (unless max_bad_share is 0)."""
MAX_ATTEMPTS = 16
"""Replacements tried for one slot."""


@dataclass(frozen=True, slots=True)
class PromptOrder:
    """An endless sequence of prompt indices: one permutation of ``n`` after another, each an epoch."""

    n: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"an order needs at least one prompt, got n={self.n}")

    def at(self, step: int, prompts_per_step: int) -> list[int]:
        """Prompt indices of the slots of one step; a step may end one epoch and begin the next."""
        first = step * prompts_per_step
        return [self.index(position) for position in range(first, first + prompts_per_step)]

    def index(self, position: int) -> int:
        """The prompt at a position of the endless sequence."""
        epoch, offset = divmod(position, self.n)
        return _permutation(self.n, self.seed, epoch)[offset] if self.shuffle else offset


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> array:
    indices = array("q", range(n))
    random.Random(f"order/{seed}/{epoch}").shuffle(indices)
    return indices


def replacement(seed: int, step: int, slot: int, attempt: int, n: int) -> int:
    """The prompt that stands in for one that cannot be opened; depends on nothing but its arguments."""
    return random.Random(f"replacement/{seed}/{step}/{slot}/{attempt}").randrange(n)


class DrawnPrompt(NamedTuple):
    slot: int
    """Position in the global batch of the step."""
    prompt: Prompt
    images: tuple[Image, ...]
    """The prompt's images, opened once (RGB)."""
    encoded: EncodedPrompt | None = None
    """What ``PromptReader.encode`` made of it."""


class PromptReader:
    """Opens the prompts of a step; a row that cannot be opened (or encoded) is replaced, counted and kept in ``bad_rows``.

    Past ``max_bad_share`` of the distinct rows this rank has seen since it started (and past ``MIN_BAD_ROWS`` rows,
    unless the share is 0) it stops the run with the list.
    """

    def __init__(
        self,
        prompts: PromptSet,
        order: PromptOrder,
        prompts_per_step: int,
        max_bad_share: float = 0.01,
        workers: int = 4,
        encode: Callable[[Prompt, tuple[Image, ...]], EncodedPrompt] | None = None,
    ) -> None:
        """``encode`` may refuse a prompt (too long, say) with a DataError: it is replaced like one that does not open."""
        self.prompts, self.order = prompts, order
        self.prompts_per_step, self.max_bad_share, self.workers = prompts_per_step, max_bad_share, workers
        self.encode = encode
        self._seen: set[int] = set()
        self._bad: dict[int, BadRow] = {}

    @property
    def bad_rows(self) -> tuple[BadRow, ...]:
        """Rows that could not be opened so far."""
        return tuple(self._bad.values())

    def draw(self, step: int, slots: Sequence[int]) -> list[DrawnPrompt]:
        """The prompts of this rank's slots with their images, in the order of ``slots``."""
        planned = self.order.at(step, self.prompts_per_step)
        indices = [planned[slot] for slot in slots]
        with ThreadPoolExecutor(max_workers=self.workers) as pool:  # decoders release the interpreter lock
            opened = list(pool.map(self._open, indices))
        return [self._settle(step, *drawn) for drawn in zip(slots, indices, opened, strict=True)]

    def _settle(
        self, step: int, slot: int, index: int, found: tuple[Prompt, tuple[Image, ...]] | DataError
    ) -> DrawnPrompt:
        attempt = 0
        while isinstance(drawn := self._encoded(slot, found), DataError):
            self._record(index, drawn)
            attempt += 1
            if attempt > MAX_ATTEMPTS:
                tried = f"none of {MAX_ATTEMPTS} replacements could be used"
                raise DataError(f"step {step}, slot {slot}: {tried}; the last: {drawn}") from drawn
            index = replacement(self.order.seed, step, slot, attempt, len(self.prompts))
            found = self._open(index)
        self._seen.add(index)
        return drawn

    def _encoded(
        self, slot: int, found: tuple[Prompt, tuple[Image, ...]] | DataError
    ) -> DrawnPrompt | DataError:
        """Not in the threads: a tokenizer may not be shared between them."""
        if isinstance(found, DataError):
            return found
        try:
            return DrawnPrompt(slot, *found, self.encode(*found) if self.encode else None)
        except DataError as error:
            return error

    def _open(self, index: int) -> tuple[Prompt, tuple[Image, ...]] | DataError:
        try:
            prompt = self.prompts[index]
            return prompt, open_images(prompt)
        except DataError as error:
            return error

    def _record(self, index: int, error: DataError) -> None:
        self._seen.add(index)
        source, reason = self.prompts.place(index), str(error)
        self._bad[index] = BadRow(source, reason.removeprefix(f"{source}: "))
        limit = max(MIN_BAD_ROWS, self.max_bad_share * len(self._seen)) if self.max_bad_share else 0
        if len(self._bad) > limit:
            report = bad_row_report(self.bad_rows, len(self._bad), len(self._seen), self.max_bad_share)
            raise DataError(f"at run time, {report}")
