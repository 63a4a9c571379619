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
from uniopd_mm.evaluation.samples import Sample, SampleStore
from uniopd_mm.prompts import open_images
from uniopd_mm.rollout import Group, Outcome, Prompt

if TYPE_CHECKING:
    from uniopd_mm.config import SamplingConfig
    from uniopd_mm.distributed import World
    from uniopd_mm.processors import VLMProcessor
    from uniopd_mm.verifiers import VerifierPool

EVALUATION_SEED = 1_000_003
"""Keeps the random numbers of evaluation apart from those of training."""
ROUND = 8
"""Samples of one prompt that are decoded together behind it."""
WINDOW = 16
"""Batches whose prompts are sorted by length among themselves."""
VERIFIED_TOGETHER = 512
ROOM_STEP = 256
"""What the context leaves for an answer is rounded down to a multiple, so that prompts of like length, which have like
room, are still answered together."""
_CHARS_PER_TOKEN = 4

Progress = Callable[[int, int], None]
"""Gets (samples done, samples to do) of this rank in this run."""
Report = Callable[[Sequence[Sample]], None]
"""Gets samples as soon as they are done."""


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
        report = _Storing(store, sum(map(len, missing.values())), progress)
        answer(engine, processor, name, mine, missing, sampling, seed, report, batch)
    store.refresh()


def answer(
    engine: Engine,
    processor: VLMProcessor,
    name: str,
    prompts: Sequence[Prompt],
    missing: Mapping[str, Sequence[int]],
    sampling: SamplingConfig,
    seed: int,
    report: Report,
    batch: int = 64,
) -> None:
    """Report the samples ``missing`` (indices by prompt id) of ``prompts``, each once, also those without an answer.

    An answer ends where the engine's context is full.
    """
    for some in _batches([prompt for prompt in prompts if prompt.id in missing], processor, batch):
        groups, failed = _encode(some, processor, engine.context)
        report([_no_answer(name, p.id, i, reason) for p, reason in failed for i in missing[p.id]])
        for number in sorted({i // ROUND for group in groups for i in missing[group.prompt.id]}):
            wanted = {g.slot: [i for i in missing[g.prompt.id] if i // ROUND == number] for g in groups}
            _round(name, engine, groups, wanted, sampling, (EVALUATION_SEED, seed, number), report)


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
    return int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()[:8]) >> 2


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

    value = value() if callable(value) else value
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
    prompts: Sequence[Prompt], processor: VLMProcessor, context: int | None
) -> tuple[list[Group], list[tuple[Prompt, str]]]:
    """Groups, and the prompts that cannot be encoded, or leave no room for an answer, with the reason."""
    groups, failed = [], []
    for prompt in prompts:
        try:
            (group,) = encode_groups([(prompt_slot(prompt.id), prompt, open_images(prompt))], processor)
        except DataError as error:
            failed.append((prompt, str(error)))
            continue
        length = len(group.encoded.input_ids)
        if context is not None and length >= context:
            hint = ". Smaller pictures: --max-pixels" if prompt.images else ""
            failed.append((prompt, f"{length} prompt tokens; prompt and answer may have {context}{hint}"))
        else:
            groups.append(group)
    return groups, failed


def answer_tokens(max_new_tokens: int, n_prompt: int, context: int | None) -> int:
    """Tokens that the answer to a prompt of ``n_prompt`` tokens may have: fewer than ``max_new_tokens`` where the context
    is full before."""
    if context is None or n_prompt + max_new_tokens <= context:
        return max_new_tokens
    left = context - n_prompt
    return left - left % ROOM_STEP or left


class _Storing:
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
    report: Report,
) -> None:
    """Sample the indices ``wanted`` (by slot, of one round), and report each group as soon as it is done.

    An engine numbers the rollouts of a call from 0, so those before the first missing one are sampled again and left.
    """
    alike: dict[tuple[int, int], list[Group]] = {}
    for group in groups:
        if wanted[group.slot]:
            room = answer_tokens(sampling.max_new_tokens, len(group.encoded.input_ids), engine.context)
            alike.setdefault((wanted[group.slot][-1] % ROUND + 1, room), []).append(group)
    for (size, room), some in sorted(alike.items()):
        waiting = {group.slot: group for group in some}

        def finished(ready: list[Group], waiting: dict[int, Group] = waiting) -> None:
            for group in ready:
                del waiting[group.slot]
                report(_samples(name, group, wanted[group.slot], engine.failed))

        engine.sample(
            some, size, sampling.model_copy(update={"max_new_tokens": room}), seed, finished=finished
        )
        for group in waiting.values():
            report(_samples(name, group, wanted[group.slot], engine.failed))


def _samples(name: str, group: Group, indices: Sequence[int], failed: Sequence[str]) -> list[Sample]:
    """One sample per index; a rollout that was lost leaves one without an answer."""
    id, lost = group.prompt.id, "; ".join(dict.fromkeys(failed)) or "not answered"
    rollouts = {rollout.index: rollout for rollout in group.rollouts}
    samples = []
    for index in indices:
        rollout = rollouts.get(index % ROUND)
        if rollout is None:
            samples.append(_no_answer(name, id, index, lost))
        else:
            samples.append(Sample(name, id, index, rollout.text, rollout.finish, len(rollout.response_ids)))
    return samples


def _no_answer(name: str, id: str, index: int, reason: str) -> Sample:
    return Sample(name, id, index, "", "error", 0, reason)
