"""Answer prompts n times each, skipping what is already on disk, and verify the answers.

A sample depends on the model, the sampling settings, the seed, its prompt and its index alone: not on the other prompts,
on n, on the number of ranks, or on how often the run was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from uniopd_mm.engines import Engine, encode_groups
from uniopd_mm.errors import DataError, UniOPDError
from uniopd_mm.evaluation.runner import EVALUATION_SEED
from uniopd_mm.evaluation.samples import Sample, SampleStore
from uniopd_mm.prompts import open_images
from uniopd_mm.rollout import Group, Outcome, Prompt, Rollout

if TYPE_CHECKING:
    from uniopd_mm.config import SamplingConfig
    from uniopd_mm.distributed import World
    from uniopd_mm.processors import VLMProcessor
    from uniopd_mm.verifiers import VerifierPool

ROUND = 8
"""Samples of one prompt that are decoded together behind it."""
WINDOW = 16
"""Batches whose prompts are sorted by length among themselves."""
VERIFIED_TOGETHER = 512
_CHARS_PER_TOKEN = 4

Progress = Callable[[int, int], None]
"""Gets (samples done, samples to do) of this rank in this run."""


def generate(
    engine: Engine,
    processor: VLMProcessor,
    name: str,
    prompts: Sequence[Prompt],
    n: int,
    sampling: SamplingConfig,
    seed: int,
    store: SampleStore,
    world: World,
    batch: int = 64,
    progress: Progress | None = None,
) -> None:
    """Append to ``store`` what it misses of ``n`` samples of every prompt (unique ids); the ranks share the prompts.

    Samples are on disk as soon as their prompt's round is done.  Prompts whose images cannot be opened, and answers that
    servers failed to give, are appended with their ``error``.  Returns when all ranks are done and the store knows all.
    """
    with world.together(UniOPDError, OSError):
        mine = prompts[world.rank :: world.size]
        missing = store.missing(name, [prompt.id for prompt in mine], n)
        report = _Report(store, sum(map(len, missing.values())), progress)
        for some in _batches([prompt for prompt in mine if prompt.id in missing], processor, batch):
            groups, failed = _encode(some, processor)
            report([_no_answer(name, p.id, i, reason) for p, reason in failed for i in missing[p.id]])
            for number in range((n + ROUND - 1) // ROUND):
                wanted = {g.slot: [i for i in missing[g.prompt.id] if i // ROUND == number] for g in groups}
                _round(name, engine, groups, wanted, sampling, (EVALUATION_SEED, seed, number), report)
    store.refresh()


def score(
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    verifiers: VerifierPool,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Outcomes of ``samples`` in order; ``prompts`` hold their golds.  A sample without an answer is unknown."""
    by_id = {prompt.id: prompt for prompt in prompts}
    outcomes = [Outcome(None, reason=sample.error) for sample in samples]
    answered = [i for i, sample in enumerate(samples) if not sample.error]
    for start in range(0, len(answered), VERIFIED_TOGETHER):
        some = answered[start : start + VERIFIED_TOGETHER]
        checked = verifiers.check([(by_id[samples[i].id], samples[i].text) for i in some])
        for i, outcome in zip(some, checked, strict=True):
            outcomes[i] = outcome
        if progress:
            progress(start + len(some), len(answered))
    return outcomes


def prompt_slot(id: str) -> int:
    """62 bits that stand for a prompt: its random numbers are the same whatever is evaluated beside it."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8]) >> 2


def _batches(prompts: Sequence[Prompt], processor: VLMProcessor, batch: int) -> Iterator[list[Prompt]]:
    """Prompts of like length together, to pad less; the longest of a window first, so that what does not fit into
    memory shows early."""
    for start in range(0, len(prompts), batch * WINDOW):
        window = prompts[start : start + batch * WINDOW]
        window = sorted(window, key=lambda prompt: _length(prompt, processor), reverse=True)
        for low in range(0, len(window), batch):
            yield window[low : low + batch]


def _length(prompt: Prompt, processor: VLMProcessor) -> int:
    """About how many tokens a prompt has; no image is decoded for it."""
    length = 0
    for message in prompt.messages:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        length += sum(map(len, texts)) // _CHARS_PER_TOKEN
    for width, height in map(_image_size, prompt.images):
        length += processor.expected_image_tokens(height, width) if width else 0
    return length


def _image_size(value: object) -> tuple[int, int]:
    """Width and height from an image's header; 0 x 0 where it has none that can be read."""
    import io
    from pathlib import Path

    from PIL import Image

    if isinstance(value, Image.Image):
        return value.size
    source = io.BytesIO(value) if isinstance(value, bytes) else value
    if not isinstance(source, io.BytesIO | Path):
        return 0, 0
    try:
        with Image.open(source) as image:
            return image.size
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ):  # said when it is opened for real
        return 0, 0


def _encode(
    prompts: Sequence[Prompt], processor: VLMProcessor
) -> tuple[list[Group], list[tuple[Prompt, str]]]:
    """Groups, and the prompts that cannot be encoded with the reason."""
    groups, failed = [], []
    for prompt in prompts:
        try:
            groups += encode_groups([(prompt_slot(prompt.id), prompt, open_images(prompt))], processor)
        except DataError as error:
            failed.append((prompt, str(error)))
    return groups, failed


class _Report:
    """Puts samples on disk and says how many there are."""

    def __init__(self, store: SampleStore, total: int, progress: Progress | None) -> None:
        self.store, self.total, self.progress, self.done = store, total, progress, 0
        self([])

    def __call__(self, samples: Sequence[Sample]) -> None:
        self.store.append(samples)
        self.done += len(samples)
        if self.progress:
            self.progress(self.done, self.total)


def _round(
    name: str,
    engine: Engine,
    groups: Sequence[Group],
    wanted: Mapping[int, Sequence[int]],
    sampling: SamplingConfig,
    seed: tuple[int, ...],
    report: Callable[[Sequence[Sample]], None],
) -> None:
    """Sample the indices ``wanted`` (by slot, of one round), and report each group as soon as it is done.

    An engine numbers the rollouts of a call from 0, so those before the first missing one are sampled again and left.
    """
    sizes: dict[int, list[Group]] = {}
    for group in groups:
        if wanted[group.slot]:
            sizes.setdefault(wanted[group.slot][-1] % ROUND + 1, []).append(group)
    for size, some in sorted(sizes.items()):
        waiting = {group.slot: group for group in some}

        def finished(ready: list[Group], size: int = size, waiting: dict[int, Group] = waiting) -> None:
            for group in ready:
                del waiting[group.slot]
                indices, rollouts = wanted[group.slot], group.rollouts
                if len(rollouts) == size:  # else a server lost some, and it is not known which
                    rollouts = tuple(rollouts[i % ROUND] for i in indices)
                report(_samples(name, group.prompt.id, indices, rollouts[: len(indices)], engine.failed))

        engine.sample(some, size, sampling, seed, finished=finished)
        for group in waiting.values():
            report(_samples(name, group.prompt.id, wanted[group.slot], (), engine.failed))


def _samples(
    name: str, id: str, indices: Sequence[int], rollouts: Sequence[Rollout], failed: Sequence[str]
) -> list[Sample]:
    """One sample per index; those that no rollout is left for have no answer."""
    lost = "; ".join(dict.fromkeys(failed)) or "not answered"
    samples = [
        Sample(name, id, index, rollout.text, rollout.finish, len(rollout.response_ids))
        for index, rollout in zip(indices, rollouts, strict=False)
    ]
    return samples + [_no_answer(name, id, index, lost) for index in indices[len(rollouts) :]]


def _no_answer(name: str, id: str, index: int, reason: str) -> Sample:
    return Sample(name, id, index, "", "error", 0, reason)
