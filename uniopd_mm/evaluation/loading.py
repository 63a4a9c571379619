"""The rows of a benchmark: from the hub, or from a local folder that holds the public files.

A local ``source`` has one sub-folder per benchmark, with the files of the hub repository in it (or beside each other):
Parquet, JSONL, JSON, and zip files of images.  Images stay encoded: ``{"bytes": ..., "path": ...}``.  A source may also be
a local folder itself (an absolute path).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from uniopd_mm.errors import DataError

if TYPE_CHECKING:
    from uniopd_mm.evaluation.benchmark import Benchmark, Row, Source

TABLES = (".parquet", ".jsonl", ".json")
"""Files that hold rows."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def load_rows(
    benchmark: Benchmark,
    source: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    check_count: bool = True,
) -> list[Row]:
    """The rows of one benchmark; its sources are tried in order, in ``source/NAME`` if a folder is given, else on the hub.

    ``split`` replaces the source's own, ``limit`` takes the first rows.  The number of rows is checked only for the whole
    of the own split.  An image in a zip file among the files of a source, or beside a JSON table, takes the place of the text
    that names it in a row.  DataError names what was found and what was expected.
    """
    failures = []
    for place in benchmark.sources:
        wanted = replace(place, split=split or place.split)
        try:
            folder = Path(source) / benchmark.name if source else Path(place.path)
            local = source is not None or folder.is_absolute()
            rows = read_files(_local_files(folder, wanted), limit) if local else _hub_rows(wanted, limit)
            check_columns(benchmark, rows)
        except DataError as error:
            failures.append(f"  {_label(wanted, source, benchmark.name)}: {error}")
            continue
        if check_count and limit is None and split is None:
            check_number(benchmark, len(rows))
        return rows
    raise DataError(
        "\n".join([f"no rows of {benchmark.title} could be read:", *failures, _advice(benchmark, source)])
    )


def check_columns(benchmark: Benchmark, rows: Sequence[Row]) -> None:
    """DataError naming the row and its columns where one of the benchmark's is not there."""
    if not rows:
        raise DataError("no rows")
    for number, row in enumerate(rows, start=1):
        lacking = [name for name in benchmark.columns if name not in row]
        if lacking:
            raise DataError(
                f"row {number} has no column {', '.join(lacking)}; it has {', '.join(row)}, "
                f"{benchmark.title} needs {', '.join(benchmark.columns)}"
            )


def check_number(benchmark: Benchmark, found: int) -> None:
    """DataError unless the whole split was found."""
    if benchmark.n_rows not in (None, found):
        raise DataError(
            f"{benchmark.title} has {benchmark.n_rows} rows, {found} were found. Is the file whole, and the split right? "
            "To score these rows in spite of that, say how many you want: --limit N."
        )


def read_files(files: Iterable[Path], limit: int | None = None) -> list[Row]:
    """Rows of tables one after the other, with the members of zip files in place of their names."""
    files = list(files)
    rows: list[Row] = []
    for path in files:
        if path.suffix in TABLES and (limit is None or len(rows) < limit):
            rows += _table(path, None if limit is None else limit - len(rows))
    archives = [path for path in files if path.suffix == ".zip"]
    return _with_members(rows, archives) if archives else rows


def _local_files(folder: Path, source: Source) -> list[Path]:
    """The files of a source in a local folder: those it names, else the tables of its split."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    if source.files:
        return [path for pattern in source.files for path in _matching(folder, pattern)]
    inside = folder / source.subset if source.subset and (folder / source.subset).is_dir() else folder
    tables = sorted(path for path in inside.rglob("*") if path.suffix in TABLES and path.is_file())
    chosen = [path for path in tables if _is_of_split(path.relative_to(inside), source.split)]
    if not chosen and source.split == "train" and len(tables) == 1:
        chosen = tables  # the hub calls the rows of a repository without splits `train`
    if not chosen:
        found = ", ".join(str(path.relative_to(folder)) for path in tables) or "no table at all"
        raise DataError(f"{inside} holds no file of split '{source.split}', but {found}")
    return chosen


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Files that a name or glob of the repository stands for, in their folder or beside each other."""
    found = sorted(folder.glob(pattern)) or sorted(folder.glob(PurePosixPath(pattern).name))
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise DataError(f"{folder} holds no {pattern}, but {there}")
    return found


def _is_of_split(path: Path, split: str) -> bool:
    """``test-00000-of-00001.parquet``, ``test.jsonl``, ``test/0.parquet``."""
    names = [*path.parts[:-1], path.stem]
    return any(name == split or name.startswith((f"{split}-", f"{split}.")) for name in names)


def _table(path: Path, limit: int | None) -> list[Row]:
    try:
        if path.suffix == ".parquet":
            return _parquet(path, limit)
        with open(path, encoding="utf-8-sig") as file:
            if path.suffix == ".jsonl":
                return _lines(path, file, limit)
            rows = json.load(file)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a JSON list of rows")
    return [_with_files(row, path.parent) for row in rows[:limit]]


def _lines(path: Path, file: Iterable[str], limit: int | None) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(file, start=1):
        if limit is not None and len(rows) >= limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: the line is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: the row is {type(row).__name__}, expected an object")
        rows.append(_with_files(row, path.parent))
    return rows


def _with_files(row: Row, folder: Path) -> Row:
    """The row with images that lie beside its table in place of their names."""

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(item) for item in value]
        if not isinstance(value, str) or not value.lower().endswith(IMAGES):
            return value
        path = folder / value
        return {"bytes": None, "path": str(path)} if path.is_file() else value

    return {column: found(value) for column, value in row.items()}


def _parquet(path: Path, limit: int | None) -> list[Row]:
    """Rows as plain values; a few at a time, so that only one copy of the images is in memory."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('Parquet needs `pyarrow`: pip install "uniopd-mm[eval]"') from error
    rows: list[Row] = []
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                rows += batch.to_pylist()
                if limit is not None and len(rows) >= limit:
                    return rows[:limit]
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return rows


def _with_members(rows: Sequence[Row], archives: Sequence[Path]) -> list[Row]:
    """Rows with the content of a zip member in place of each text that is its name; DataError if none is."""
    members: dict[str, tuple[zipfile.ZipFile, str]] = {}
    opened = []
    try:
        for path in archives:
            try:
                archive = zipfile.ZipFile(path)
            except zipfile.BadZipFile as error:
                raise DataError(f"{path} is damaged: {error}") from error
            opened.append(archive)
            for name in archive.namelist():
                parts = PurePosixPath(
                    name
                ).parts  # the folder packed may or may not be part of the name in the row
                for start in range(min(2, len(parts))):
                    members.setdefault("/".join(parts[start:]), (archive, name))
        found: list[Row] = [dict(_filled(row, members)) for row in rows]
    finally:
        for archive in opened:
            archive.close()
    if found == list(rows):
        names = ", ".join(list(members)[:3])
        raise DataError(
            f"no row names a file of {', '.join(p.name for p in archives)} (which holds {names}, ...)"
        )
    return found


def _filled(row: Row, members: dict[str, tuple[zipfile.ZipFile, str]]) -> Iterator[tuple[str, Any]]:
    for column, value in row.items():
        member = members.get(value.removeprefix("./")) if isinstance(value, str) else None
        if member is None:
            yield column, value
        else:
            archive, name = member
            yield column, {"bytes": archive.read(name), "path": value}


def _hub_rows(source: Source, limit: int | None) -> list[Row]:
    if source.files:
        return read_files(_downloaded(source), limit)
    try:
        import datasets
    except ImportError as error:
        raise ImportError('Hub data needs `datasets`: pip install "uniopd-mm[eval]"') from error
    try:
        found = datasets.load_dataset(
            source.path, name=source.subset, split=source.split, revision=source.revision
        )
    except Exception as error:  # network, pyarrow and `datasets` errors alike mean: not readable
        raise DataError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    tables: Any = found.with_format("arrow")  # plain values: no image is decoded
    n = len(tables) if limit is None else min(limit, len(tables))
    return [row for low in range(0, n, 64) for row in tables[low : min(low + 64, n)].to_pylist()]


def _downloaded(source: Source) -> list[Path]:
    """The named files of a hub repository, fetched as they are."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            source.path, repo_type="dataset", revision=source.revision, allow_patterns=list(source.files)
        )
    except Exception as error:  # network, access and cache errors alike mean: not readable
        raise DataError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return [path for pattern in source.files for path in _matching(Path(folder), pattern)]


def _label(source: Source, folder: Path | None, name: str) -> str:
    where = (
        str(Path(folder) / name) if folder else source.path + (f"/{source.subset}" if source.subset else "")
    )
    return f"{where} [{source.split}]" + (f" {', '.join(source.files)}" if source.files else "")


def _advice(benchmark: Benchmark, source: Path | None) -> str:
    if source is None and all(Path(place.path).is_absolute() for place in benchmark.sources):
        return "These rows are made on this machine: make quickstart"
    if source is None:
        return "Check network and access (huggingface-cli login), or download the files and give their folder: --source FOLDER"
    return "Put the files of the hub repository there, one sub-folder per benchmark, or leave out --source to fetch them."
