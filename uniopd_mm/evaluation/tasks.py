"""What a run evaluates: the rows of a benchmark, or of a file of one's own, as prompts, and how they are asked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Scores, mean_score
from uniopd_mm.evaluation.loading import load_rows
from uniopd_mm.rollout import Prompt
from uniopd_mm.settings import from_options

MAX_BAD_SHARE = 0.01
"""Share of a benchmark's rows that may be unusable and are left out."""
LISTED = 5


@dataclass(frozen=True)
class RowImage:
    """A picture of a row that stays on disk, read when it is opened."""

    rows: Sequence[Row]
    index: int
    read: Callable[[Row], Prompt]
    number: int
    """Which of the row's pictures."""

    def __call__(self) -> Any:
        return self.read(self.rows[self.index]).images[self.number]


@dataclass(frozen=True)
class Task:
    """One benchmark, loaded: ``rows`` and ``prompts`` belong together one to one."""

    benchmark: Benchmark
    preset: Preset
    rows: Sequence[Row]
    prompts: Sequence[Prompt]
    left_out: tuple[str, ...] = ()
    """Why rows could not be used."""

    @property
    def name(self) -> str:
        return self.benchmark.name

    def sample_settings(self) -> dict[str, Any]:
        """What of the task changes the samples.  The first prompt stands for how rows are made into prompts."""
        return {
            "benchmark": self.name,
            "sampling": self.preset.sampling.model_dump(mode="json"),
            "prompt": self.preset.prompt,
            "system": self.preset.system,
            "first_prompt": _digest(self.prompts[0]),
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
    read = partial(benchmark.read, preset=preset, profile=profile)
    used, prompts, bad = [], [], []
    for index in range(len(rows)):
        try:
            row = rows[index]
            prompt = read(row)
        except DataError as error:
            bad.append(f"row {index + 1}: {error}")
            continue
        if not isinstance(rows, list):
            images = (RowImage(rows, index, read, number) for number in range(len(prompt.images)))
            prompt, row = replace(prompt, images=tuple(images)), without_bytes(row)
        prompts.append(prompt)
        used.append(row)
    if len(bad) > MAX_BAD_SHARE * len(rows):
        more = [f"... and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        lines = [f"{len(bad)} of {len(rows)} rows of {benchmark.title} cannot be used:", *bad[:LISTED], *more]
        raise DataError("\n  ".join(lines))
    return Task(benchmark, preset, used, number_repeats(prompts), tuple(bad))


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
    n = min(preset.limit or len(found), len(found))
    prompts = [found[i] for i in range(n)]  # images stay where they are
    rows = [{"id": prompt.id, "domain": prompt.domain} for prompt in prompts]
    return Task(own_benchmark(path.stem), preset, rows, prompts, tuple(map(str, found.bad_rows)))


def own_benchmark(name: str) -> Benchmark:
    """A benchmark without a published protocol: accuracy, and that of each domain."""
    return Benchmark(
        name=name,
        title=name,
        domain="quickstart",
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


def _digest(prompt: Prompt) -> str:
    text = json.dumps([prompt.id, prompt.messages], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]
