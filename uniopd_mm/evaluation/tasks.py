"""What a run evaluates: the rows of a benchmark, or of a file of one's own, as prompts, and how they are asked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Scores, mean_score
from uniopd_mm.evaluation.loading import load_rows
from uniopd_mm.prompts.images import image_source
from uniopd_mm.prompts.manifest import file_samples
from uniopd_mm.rollout import Prompt
from uniopd_mm.settings import from_options

MAX_BAD_SHARE = 0.01
"""Share of a benchmark's rows that may be unusable and are left out."""
LISTED = 5


@dataclass(frozen=True)
class RowImage:
    """A picture of a row that stays on disk, read when it is opened."""

    prompt: Callable[[], Prompt]
    """Reads the row."""
    number: int
    """Which of its pictures."""

    def __call__(self) -> Any:
        return self.prompt().images[self.number]


@dataclass(frozen=True)
class Task:
    """One benchmark, loaded: ``rows`` and ``prompts`` belong together one to one."""

    benchmark: Benchmark
    preset: Preset
    rows: Sequence[Row]
    prompts: Sequence[Prompt]
    left_out: tuple[str, ...] = ()
    """Why rows could not be used."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of what each prompt, by its id, shows to a model: :func:`prompt_digest`."""

    @property
    def name(self) -> str:
        return self.benchmark.name

    def sample_settings(self) -> dict[str, Any]:
        """What of the task, beside its prompts, changes the samples."""
        return {
            "benchmark": self.name,
            "sampling": self.preset.sampling.model_dump(mode="json"),
            "prompt": self.preset.prompt,
            "system": self.preset.system,
        }


def load_task(
    benchmark: Benchmark,
    preset: Preset,
    profile: Profile,
    source: Path | None = None,
    split: str | None = None,
) -> Task:
    """The benchmark's rows as prompts with golds; DataError when more than 1 % of them cannot be used."""
    rows = load_rows(benchmark, source, split, preset.limit)

    def read(row: Row) -> Prompt:
        return benchmark.read(row, preset, profile)

    used, prompts, digests, bad = [], [], [], []
    for index in range(len(rows)):
        try:
            row = rows[index]
            prompt = read(row)
        except DataError as error:
            bad.append(f"row {index + 1}: {error}")
            continue
        digests.append(prompt_digest(prompt))
        if not isinstance(rows, list):
            prompt = images_on_disk(prompt, lambda index=index: read(rows[index]))
            row = without_bytes(row)
        prompts.append(prompt)
        used.append(row)
    require_few(bad, len(rows), f"rows of {benchmark.title}")
    prompts = number_repeats(prompts)
    return Task(benchmark, preset, used, prompts, tuple(bad), _by_id(prompts, digests))


def require_few(bad: Sequence[str], n: int, what: str) -> None:
    """DataError that lists the first of them where more than 1 % of ``n`` cannot be used."""
    if len(bad) > MAX_BAD_SHARE * n:
        more = [f"... and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        raise DataError("\n  ".join([f"{len(bad)} of {n} {what} cannot be used:", *bad[:LISTED], *more]))


def prompt_digest(prompt: Prompt) -> str:
    """16 hexadecimal digits of what a model is shown: the turns, and the pictures (files by size and samples)."""
    digest = hashlib.sha256(json.dumps(prompt.messages, sort_keys=True).encode())
    for image in map(image_source, prompt.images):
        if isinstance(image, Path):
            content = file_samples(image)
        elif isinstance(image, str):
            content = image.encode()
        else:
            content = image if isinstance(image, bytes) else image.tobytes()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def images_on_disk(prompt: Prompt, read: Callable[[], Prompt]) -> Prompt:
    """The prompt without the bytes of its pictures; ``read`` makes it again when one is opened."""
    images = (
        image if isinstance(image, Path) else RowImage(read, k) for k, image in enumerate(prompt.images)
    )
    return replace(prompt, images=tuple(images))


def _by_id(prompts: Sequence[Prompt], digests: Sequence[str]) -> dict[str, str]:
    return {prompt.id: digest for prompt, digest in zip(prompts, digests, strict=True)}


def without_bytes(value: Any) -> Any:
    """A row, or a value in one, without the bytes of its pictures."""
    if isinstance(value, Mapping):
        return {key: without_bytes(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_bytes(inner) for inner in value]
    return None if isinstance(value, bytes) else value


def number_repeats(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with ``#2`` and so on behind an id that was there before: samples are kept by id."""
    seen: Counter[str] = Counter()
    numbered = []
    for prompt in prompts:
        seen[prompt.id] += 1
        count = seen[prompt.id]
        numbered.append(prompt if count == 1 else replace(prompt, id=f"{prompt.id}#{count}"))
    return numbered


def data_task(path: Path, preset: Preset) -> Task:
    """Rows of one's own in the row form of ``data/README.md``."""
    from uniopd_mm.prompts import load_prompts
    from uniopd_mm.verifiers import verifier_names

    found = load_prompts(str(path), verifiers=verifier_names())
    prompts, digests = [], []
    for i in range(min(preset.limit or len(found), len(found))):
        prompt = found[i]
        digests.append(prompt_digest(prompt))
        prompts.append(images_on_disk(prompt, lambda i=i: found[i]))
    rows = [{"id": prompt.id, "domain": prompt.domain} for prompt in prompts]
    left_out = tuple(map(str, found.bad_rows))
    return Task(own_benchmark(path.stem), preset, rows, prompts, left_out, _by_id(prompts, digests))


def own_benchmark(name: str) -> Benchmark:
    """A benchmark without a published protocol: accuracy, and that of each domain."""
    return Benchmark(
        name=name,
        title=name,
        domain="own",
        sources=(),
        columns=("id", "domain"),
        presets={},
        read=_no_rows,
        aggregate=mean_by_domain,
    )


def mean_by_domain(rows: Sequence[Row], scores: Sequence[Scores]) -> dict[str, float]:
    """``score``, and the mean of each domain where there are several."""
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(str(row["domain"]), []).append(i)
    numbers = mean_score(rows, scores)
    if len(members) > 1:
        for domain, some in sorted(members.items()):
            mean = mean_score([rows[i] for i in some], [scores[i] for i in some])
            numbers |= {domain: mean["score"]} if mean else {}
    return numbers


def choose_preset(benchmark: Benchmark, name: str, changes: Mapping[str, Any]) -> Preset:
    """The named preset with what was asked for in its place; ``changes`` has ``n``, ``limit`` and sampling settings."""
    if name not in benchmark.presets:
        raise ConfigError(
            f"{benchmark.title} has no preset '{name}'. Type --preset {' or --preset '.join(benchmark.presets)}"
        )
    return changed_preset(benchmark.presets[name], changes)


def changed_preset(preset: Preset, changes: Mapping[str, Any]) -> Preset:
    """A copy with every change that is not None."""
    asked = {key: value for key, value in changes.items() if value is not None}
    own = {key: asked.pop(key) for key in ("n", "limit") if key in asked}
    sampling = from_options(type(preset.sampling), **(preset.sampling.model_dump() | asked))
    return replace(preset, sampling=sampling, **own)


def _no_rows(row: Row, preset: Preset, profile: Profile) -> Prompt:
    raise NotImplementedError("rows of one's own are read by load_prompts")
