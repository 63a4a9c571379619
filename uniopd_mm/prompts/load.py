"""Mixtures and data files -> PromptSet: every row checked once, every problem listed, nothing silently dropped."""

from __future__ import annotations

import dataclasses
import random
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from pydantic import Field

from uniopd_mm.config import SourceConfig
from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.prompts.manifest import ListedRows, Manifest, is_manifest, read_manifest, require_fit
from uniopd_mm.prompts.parse import Known, check_prompt, check_source, parse_row
from uniopd_mm.prompts.rows import RowError, Rows, find_data, open_rows, row_range
from uniopd_mm.rollout import Prompt
from uniopd_mm.settings import Settings, load_config

LISTED = 20
"""Bad rows written out in an error."""


class MixtureConfig(Settings):
    """A mixture file: where prompts come from, and how much of each."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Data sets, in order; an epoch is all of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why; a row with two problems is listed twice."""

    source: str
    """``file:row``"""
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One opened source."""

    config: SourceConfig
    """Its relative paths start from the current folder."""
    name: str
    rows: Rows

    def place(self, index: int) -> str:
        return f"{self.rows.label}:{self.rows.number(index)}"

    def parse(self, row: dict[str, Any], index: int) -> Prompt:
        number = self.rows.number(index)
        return parse_row(row, self.config, self.name, self.place(index), number, self.rows.root)


class PromptSet(Sequence[Prompt]):
    """The prompts of a run in a fixed order.  Rows stay on disk; a Prompt is built when it is asked for."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.bad_rows: tuple[BadRow, ...] = ()
        """Problems found at load time; these rows are left out."""
        self.n_rows = 0
        """Rows looked at: after ``slice``, before ``weight``."""
        self._entries = (array("q"), array("q"), array("q"))  # source, row of it, copy made by `weight`
        self._domains: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._entries[0])

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """The prompt, with images still unopened.  DataError when its file is not what it was at load time."""
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        number, row, copy = (column[index] for column in self._entries)
        source = self.sources[number]
        try:
            prompt = source.parse(source.rows.read(row), row)
        except RowError as error:
            raise DataError(f"{source.place(row)}: {error}") from error
        return dataclasses.replace(prompt, id=f"{prompt.id}#{copy + 1}") if copy else prompt

    def place(self, index: int) -> str:
        """``file:row`` of a prompt."""
        return self.sources[self._entries[0][index]].place(self._entries[1][index])

    def entries(self) -> list[tuple[int, int]]:
        """Of every prompt, the position of its source in ``sources`` and of its row there."""
        return list(zip(*self._entries[:2], strict=True))

    def domains(self) -> dict[str, int]:
        """Prompts of each domain, copies counted."""
        return dict(sorted(self._domains.items()))

    def add(self, source: int, rows: Sequence[tuple[int, int]], domains: dict[int, str]) -> None:
        """Append (row, copy) entries of a source."""
        for row, copy in rows:
            for column, value in zip(self._entries, (source, row, copy), strict=True):
                column.append(value)
            self._domains[domains[row]] += 1


def load_prompts(
    spec: str | Path | Sequence[SourceConfig],
    *,
    domains: Collection[str] | None = None,
    verifiers: Collection[str] | None = None,
    require_answer: bool = True,
    max_bad_share: float = 0.01,
    seed: int = 0,
    balanced: bool = True,
) -> PromptSet:
    """Prompts of a mixture YAML, a data file or folder, a hub id, a balanced mixture, or a list of sources.

    ``domains`` are those a teacher serves and ``verifiers`` those that exist; None accepts all.  Every row is checked;
    bad rows are left out and listed in ``bad_rows``.  DataError when more than ``max_bad_share`` of all rows are bad,
    ConfigError for settings that fit no data.  The same on every rank.  ``balanced`` False: the sources of a balanced
    mixture as they were before.
    """
    manifest = read_manifest(spec) if isinstance(spec, str | Path) and is_manifest(spec) else None
    if manifest is not None:
        sources = _open_sources(manifest.sources, [manifest.path.parent, Path()])
        sources = [_listed(source, manifest) for source in sources] if balanced else sources
    else:
        sources = _open_sources(*_configs(spec))
    prompts = PromptSet(sources)
    known = Known(domains, verifiers, require_answer)
    first_use: dict[str, str] = {}
    bad: list[BadRow] = []
    for number, source in enumerate(sources):
        taken = row_range(source.config.slice, len(source.rows))
        if not taken:
            asked = f", slice {source.config.slice} takes none" if source.config.slice else ""
            raise DataError(
                f"{source.rows.label} holds {len(source.rows)} rows{asked}. Give it some or remove it."
            )
        good: dict[int, str] = {}
        for index, outcome in _checked(source, taken, known, first_use):
            if isinstance(outcome, Prompt):
                good[index] = outcome.domain
            else:
                bad += [BadRow(source.place(index), reason) for reason in outcome]
        prompts.n_rows += len(taken)
        prompts.add(number, _entries(source, good, seed), good)
    prompts.bad_rows = tuple(bad)
    if manifest is not None:
        require_fit(manifest.path, [source.rows for source in sources])
    _limit(bad, prompts.n_rows, max_bad_share)
    if not len(prompts):
        raise DataError(f"no prompts in '{spec}': every weight is too small. Raise a weight.")
    return prompts


def _entries(source: Source, good: Collection[int], seed: int) -> list[tuple[int, int]]:
    if isinstance(source.rows, ListedRows):
        return source.rows.entries(good)
    return weighted(list(good), source.config.weight, f"{seed}/{source.name}")


def weighted(rows: Sequence[int], weight: float, seed: str) -> list[tuple[int, int]]:
    """(row, copy) entries: each row ``floor(weight)`` times, and once more for a seeded random share of the rest."""
    copies = int(weight)
    entries = [(row, copy) for copy in range(copies) for row in rows]
    chosen = random.Random(seed).sample(range(len(rows)), round((weight - copies) * len(rows)))
    return entries + [(rows[k], copies) for k in sorted(chosen)]


def bad_row_report(bad: Sequence[BadRow], n_bad: int, n_rows: int, max_bad_share: float) -> str:
    """The sentence and the list that a user gets when too many rows are bad."""
    lines = [f"{n_bad} of {n_rows} rows are bad, more than data.max_bad_share={max_bad_share:g} allows:"]
    if n_bad == n_rows:
        lines = [f"all {n_rows} rows are bad:"]
    lines += [str(row) for row in bad[:LISTED]]
    if len(bad) > LISTED:
        lines.append(f"... and {len(bad) - LISTED} more")
    lines.append("Repair or remove these rows; a recipe may raise data.max_bad_share.")
    return "\n  ".join(lines)


def _configs(spec: str | Path | Sequence[SourceConfig]) -> tuple[Sequence[SourceConfig], list[Path]]:
    """Sources, and the folders that their relative paths may start from."""
    if not isinstance(spec, str | Path):
        return spec, [Path()]
    if Path(spec).suffix.lower() not in (".yaml", ".yml"):
        return [SourceConfig.model_validate({"path": str(spec)})], [Path()]
    if not Path(spec).is_file():
        raise DataError(
            f"there is no mixture file '{spec}' (looked in {Path.cwd()}). Mixtures ship in data/mixtures/."
        )
    return load_config(MixtureConfig, spec).sources, [Path(spec).parent, Path()]


def _open_sources(configs: Sequence[SourceConfig], folders: Sequence[Path]) -> list[Source]:
    configs = [config for config in configs if config.weight > 0]
    if not configs:
        raise ConfigError(
            "there is no data source with a weight above 0; give at least one, e.g. {path: train.jsonl}"
        )
    for config in configs:
        check_source(config)
    names = [config.name or _stem(config.path) for config in configs]
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(
                f"{count} data sources are called '{name}', so their ids collide. Give each a `name`."
            )
    return [_open_source(c, name, folders) for c, name in zip(configs, names, strict=True)]


def _open_source(config: SourceConfig, name: str, folders: Sequence[Path]) -> Source:
    path = find_data(config.path, folders)
    if path is not None and is_manifest(path):
        raise ConfigError(
            f"{path} is a balanced mixture, which cannot be a source of another one. Give it alone: data.train={path}"
        )
    rows = open_rows(config, folders)
    found: dict[str, str] = {} if path is None else {"path": str(path)}
    if config.image_root is not None:
        rows.root = found["image_root"] = str(_image_root(config.image_root, folders))
    return Source(config.model_copy(update=found), name, rows)


def _image_root(image_root: str, folders: Sequence[Path]) -> Path:
    places = [folder / image_root for folder in folders]
    root = next((place for place in places if place.is_dir()), None)
    if root is None:
        raise ConfigError(
            f"image_root '{image_root}' is no folder (looked for {', '.join(map(str, places))})"
        )
    return root


def _listed(source: Source, manifest: Manifest) -> Source:
    listed, n_rows = manifest.rows[source.name], manifest.n_rows[source.name]
    return dataclasses.replace(source, rows=ListedRows(source, listed, n_rows))


def _stem(path: str) -> str:
    return (
        Path(path).stem
        if Path(path).suffix in (".jsonl", ".ndjson", ".json", ".parquet")
        else Path(path).name
    )


def _checked(
    source: Source, taken: range, known: Known, first_use: dict[str, str]
) -> Iterator[tuple[int, Prompt | Sequence[str]]]:
    """Each row's index with its Prompt (for checking only: image bytes are cut) or the reasons why it is bad."""
    for index, row in zip(taken, source.rows.scan(taken.start, taken.stop), strict=True):
        try:
            if isinstance(row, RowError):
                raise row
            prompt = source.parse(row, index)
        except RowError as error:
            yield index, error.reasons
            continue
        reasons = check_prompt(prompt, known)
        if prompt.id in first_use:
            hint = 'columns: {id: "#"} numbers the rows instead'
            reasons.append(f"the id '{prompt.id}' is already used by {first_use[prompt.id]} ({hint})")
        first_use.setdefault(prompt.id, prompt.source)
        yield index, reasons or prompt


def _limit(bad: Sequence[BadRow], n_rows: int, max_bad_share: float) -> None:
    n_bad = len({row.source for row in bad})
    if n_bad > max_bad_share * n_rows or n_bad == n_rows:
        raise DataError(bad_row_report(bad, n_bad, n_rows, max_bad_share))
