"""A balanced mixture on disk: rows of other files and how often each is in an epoch.  No row or image is copied.

A JSONL file.  Its first line is the header (where the rows are, and how the file was made), each further line a row.
``scripts/balance_data.py`` writes it; ``load_prompts`` takes it like any data file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from uniopd_mm.config import SourceConfig
from uniopd_mm.errors import DataError
from uniopd_mm.prompts.rows import Row, RowError, Rows, row_range

if TYPE_CHECKING:
    from uniopd_mm.prompts.load import PromptSet, Source

MARK = "balanced_mixture"
"""Key of the header that tells a manifest from rows; its value is the version of the format."""
VERSION = 2
_STRIPES = 16
_STRIPE = 4096  # bytes
LISTED = 10
"""Differences written out in an error."""
_AGAIN = "Run scripts/balance_data.py again; answers to rows that are still the same are kept."


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One row of a source."""

    source: str
    """Name of the source."""
    row: int
    """As in ``file:row``: line of a JSONL file, else number of the row from 1."""
    id: str
    """Of its prompt."""
    repeats: int
    """How often it is in an epoch."""
    n_correct: int
    """Of the student's answers."""
    n_known: int
    """Answers whose outcome is known; 0 = the student was not asked, or nothing is known."""
    digest: str
    """Of the row's content, from :func:`row_digest`."""


@dataclass(frozen=True)
class Manifest:
    """A manifest as it was read."""

    path: Path
    sources: tuple[SourceConfig, ...]
    """Relative paths start from the manifest's folder."""
    n_rows: Mapping[str, int]
    """Source name -> rows that its file held."""
    rows: Mapping[str, Mapping[int, ManifestRow]]
    """Source name -> row number -> row."""
    about: Mapping[str, Any]
    """How it was made."""


class ListedRows:
    """Rows of a source with their repeats; what no longer is as it was listed goes to ``problems``."""

    def __init__(self, source: Source, listed: Mapping[int, ManifestRow], n_rows: int) -> None:
        rows = source.rows
        self.label, self.root = rows.label, rows.root
        self.problems: list[str] = []
        self._source, self._rows, self._listed = source, rows, listed
        # A mixture with a smaller weight took a random part of the rows: those left out are not listed.
        self._is_complete = source.config.weight >= 1
        if len(rows) != n_rows:
            self.problems.append(f"{rows.label} had {n_rows} rows and now has {len(rows)}")

    def __len__(self) -> int:
        return len(self._rows)

    def number(self, index: int) -> int:
        return self._rows.number(index)

    def read(self, index: int) -> Row:
        return self._rows.read(index)

    def scan(self, start: int, stop: int) -> Iterator[Row | RowError]:
        """As the source has them, compared with the list on the way."""
        for index, row in zip(range(start, stop), self._rows.scan(start, stop), strict=True):
            number = self.number(index)
            listed = self._listed.get(number)
            if listed and (
                isinstance(row, RowError) or row_digest(self._source, row, index) != listed.digest
            ):
                self.problems.append(f"{self.label}:{number} ({listed.id}) is not what it was")
            yield row

    def entries(self, good: Iterable[int]) -> list[tuple[int, int]]:
        """(row, copy) of the usable rows; one that is not listed is a problem, for it would silently be left out."""
        entries = []
        for index in good:
            listed = self._listed.get(self.number(index))
            if listed:
                entries += [(index, copy) for copy in range(listed.repeats)]
            elif self._is_complete:
                self.problems.append(f"{self.label}:{self.number(index)} could not be used and now can")
        return entries


def row_digest(source: Source, row: Row, index: int) -> str:
    """16 hexadecimal digits of a row as ``Rows.scan`` gives it: of all its columns, and of its pictures as far as they can
    be told apart without reading all of them (files by size and samples, bytes in a table by their number)."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=repr)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    try:
        images = source.parse(row, index).images
    except RowError:  # said where the rows are checked
        images = ()
    for image in images:
        if isinstance(image, Path):
            digest.update(file_samples(image))
    return digest.hexdigest()[:16]


def file_samples(path: Path) -> bytes:
    """Size and up to 64 KiB from all over a file; nothing for one that cannot be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            parts = [str(size).encode()]
            for k in range(_STRIPES):
                file.seek(max(0, size - _STRIPE) * k // (_STRIPES - 1))
                parts.append(file.read(_STRIPE))
    except OSError:
        return b""
    return b"\0".join(parts)


def row_digests(prompts: PromptSet) -> list[str]:
    """The digest of the row of every prompt, in order; each source is read once."""
    digests: dict[tuple[int, int], str] = {}
    for number, source in enumerate(prompts.sources):
        taken = row_range(source.config.slice, len(source.rows))
        for index, row in zip(taken, source.rows.scan(taken.start, taken.stop), strict=True):
            if not isinstance(row, RowError):
                digests[number, index] = row_digest(source, row, index)
    return [digests[entry] for entry in prompts.entries()]


def is_manifest(path: str | Path) -> bool:
    """Whether a file says of itself that it is one."""
    path = Path(path)
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MARK) + 4).startswith(f'{{"{MARK}"'.encode())


def read_manifest(path: str | Path) -> Manifest:
    """DataError with file and line when it is none, or is cut."""
    path, place, rows = Path(path), f"{path}:1", {}
    try:
        with open(path, encoding="utf-8") as file:
            header = json.loads(file.readline())
            if header[MARK] != VERSION:
                raise ValueError(f"format {header[MARK]}, expected {VERSION}")
            sources = [{**source} for source in header["sources"]]
            n_rows = {source["name"]: source.pop("n_rows") for source in sources}
            rows = {name: {} for name in n_rows}
            for number, line in enumerate(file, start=2):
                place = f"{path}:{number}"
                row = ManifestRow(**json.loads(line))
                rows[row.source][row.row] = row
            place = str(path)
            n_listed = sum(map(len, rows.values()))
            if n_listed != header["n_listed"]:
                raise ValueError(f"{header['n_listed']} rows announced, {n_listed} found")
            configs = tuple(SourceConfig.model_validate(source) for source in sources)
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{place}: not a balanced mixture ({reason}). {_AGAIN}") from error
    return Manifest(path, configs, n_rows, rows, header["about"])


def write_manifest(
    path: Path,
    prompts: PromptSet,
    repeats: Sequence[int],
    counts: Sequence[tuple[int, ...]],
    digests: Sequence[str],
    about: Mapping[str, Any],
) -> None:
    """Write the balanced mixture of ``prompts``; the file appears whole or not at all.

    ``repeats``, ``counts`` (correct, known, ...) and ``digests`` belong to the prompts in order; a row that the mixture has
    several times is listed once, with the sum of its repeats.
    """
    rows: dict[tuple[int, int], ManifestRow] = {}
    for i, (number, index) in enumerate(prompts.entries()):
        known = rows.get((number, index))
        source = prompts.sources[number]
        rows[number, index] = ManifestRow(
            source=source.name,
            row=source.rows.number(index),
            id=known.id if known else prompts[i].id,
            repeats=repeats[i] + (known.repeats if known else 0),
            n_correct=counts[i][0],
            n_known=counts[i][1],
            digest=digests[i],
        )
    header = {
        MARK: VERSION,
        "sources": [_source_entry(source, path.parent) for source in prompts.sources],
        "n_listed": len(rows),
        "about": about,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    with open(partial, "w", encoding="utf-8") as file:
        for line in (header, *map(asdict, rows.values())):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def require_fit(path: Path, sources: Iterable[Rows]) -> None:
    """DataError when rows are not what they were listed as."""
    problems = [problem for rows in sources if isinstance(rows, ListedRows) for problem in rows.problems]
    if problems:
        more = [f"... and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        head = f"{path} no longer fits the rows that it lists:"
        raise DataError("\n  ".join([head, *problems[:LISTED], *more, _AGAIN]))


def _source_entry(source: Source, folder: Path) -> dict[str, Any]:
    """Settings of a source, with paths that start from ``folder`` (absolute ones and hub ids stay)."""
    entry = source.config.model_dump(mode="json", exclude_defaults=True)
    for key in ("path", "image_root"):
        if key in entry and os.path.exists(entry[key]) and not os.path.isabs(entry[key]):
            entry[key] = os.path.relpath(entry[key], folder)
    return {**entry, "name": source.name, "n_rows": len(source.rows)}
