"""The rows of a benchmark: from the hub, or from a local folder that holds the public files.

A local ``source`` has one sub-folder per benchmark, with the files of the hub repository in it (or beside each other):
Parquet, JSONL and JSON (also gzipped), and zip files of images.  Images stay encoded: ``{"bytes": ..., "path": ...}``.  A source may also be
a local folder itself (an absolute path).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.rows import ArrowRows, ZipRows

if TYPE_CHECKING:
    from uniopd_mm.evaluation.benchmark import Benchmark, Row, Source

TABLES = (".parquet", ".jsonl", ".json")
"""Files that hold rows."""
LFS_POINTER = b"version https://git-lfs"
IN_MEMORY = 256
"""Rows with pictures that are held in memory where no more are asked for; more stay on disk."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def load_rows(
    benchmark: Benchmark,
    source: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    check_count: bool = True,
) -> Sequence[Row]:
    """The rows of one benchmark; its sources are tried in order, in ``source/NAME`` if a folder is given, else on the hub.

    ``split`` replaces the source's own, ``limit`` takes the first rows.  The number of rows is checked where it is known and
    no limit is asked for.  An image in a zip file among the files of a source, or beside a JSON table, takes the place of
    the text that names it in a row.  Many rows with pictures are no list: each is read from disk when it is asked for.  DataError
    names what was found and what was expected.
    """
    failures = []
    for place in benchmark.sources:
        wanted = replace(place, split=split or place.split)
        local = source is not None or Path(place.path).is_absolute()
        try:
            if split not in (None, place.split) and wanted.files and wanted.files == place.files:
                raise DataError(f"there is no split '{split}', only '{place.split}'")
            folder = Path(source) / benchmark.name if source else Path(place.path)
            files = _local_files(folder, wanted) if local else []
            rows = read_files(files, limit, wanted.late) if local else _hub_rows(wanted, limit)
            check_columns(benchmark, rows)
        except DataError as error:
            failures.append(f"  {error}" if local else f"  {_label(wanted)}: {error}")
            continue
        if check_count and limit is None:
            own = split in (None, place.split)
            check_number(benchmark, len(rows), wanted.n_rows or (benchmark.n_rows if own else None))
        return rows
    raise DataError(
        "\n".join(
            [
                f"no rows of {benchmark.title} could be read:",
                *dict.fromkeys(failures),
                _advice(benchmark, source, split),
            ]
        )
    )


def check_columns(benchmark: Benchmark, rows: Sequence[Row]) -> None:
    """DataError naming the row and its columns where one of the benchmark's is not there."""
    if not rows:
        raise DataError("no rows")
    for number, found in enumerate(
        rows.columns() if isinstance(rows, ArrowRows | ZipRows) else rows, start=1
    ):
        lacking = [name for name in benchmark.columns if name not in found]
        if lacking:
            raise DataError(
                f"row {number} has no column {', '.join(lacking)}; it has {', '.join(found)}, "
                f"{benchmark.title} needs {', '.join(benchmark.columns)}"
            )


def check_number(benchmark: Benchmark, found: int, expected: int | None) -> None:
    """DataError unless the whole split was found."""
    if expected not in (None, found):
        raise DataError(
            f"{benchmark.title} has {expected} rows, {found} were found. Is the file whole, and the split right? "
            "To score these rows in spite of that, say how many you want: --limit N."
        )


def read_files(files: Iterable[Path], limit: int | None = None, late: Sequence[str] = ()) -> Sequence[Row]:
    """Rows of tables one after the other, with the members of zip files in place of their names.  ``late`` columns stay in
    their files."""
    files = list(files)
    for path in files:
        _check_is_file(path)
    tables = [path for path in files if _form(path) in TABLES]
    if _stay_on_disk(tables, limit):
        return _mapped(tables, limit)
    rows: list[Row] = []
    for path in tables:
        if limit is None or len(rows) < limit:
            rows += _table(path, None if limit is None else limit - len(rows), late)
    archives = [path for path in files if path.suffix == ".zip"]
    return ZipRows(rows, archives) if archives else rows


def _stay_on_disk(tables: Sequence[Path], limit: int | None) -> bool:
    """Whether the rows are those of Parquet files, and more than are held in memory."""
    if not all(_form(path) == ".parquet" for path in tables):
        return False
    n = sum(_n_parquet(path) for path in tables)
    return min(n, n if limit is None else limit) > IN_MEMORY


def _mapped(tables: Sequence[Path], limit: int | None) -> ArrowRows:
    """Rows of Parquet files as memory-mapped Arrow, which `datasets` makes once and keeps in its cache."""
    import datasets

    try:
        found = datasets.load_dataset("parquet", data_files=[str(path) for path in tables], split="train")
    except Exception as error:  # pyarrow, disk and `datasets` errors alike mean: not readable
        raise DataError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return ArrowRows(found if limit is None else found.select(range(min(limit, len(found)))))


def _local_files(folder: Path, source: Source) -> list[Path]:
    """The files of a source in a local folder: those it names, else the tables of its split."""
    if not folder.is_dir():
        beside = sorted(path.name for path in folder.parent.glob("*")) or ["nothing"]
        there = (
            f"but {folder.parent} with {_first(beside)}"
            if folder.parent.is_dir()
            else f"and no {folder.parent}"
        )
        raise DataError(f"there is no folder {folder}, {there}")
    if source.files:
        return [path for pattern in source.files for path in _matching(folder, pattern)]
    inside = folder / source.subset if source.subset and (folder / source.subset).is_dir() else folder
    tables = sorted(path for path in inside.rglob("*") if _form(path) in TABLES and path.is_file())
    chosen = [path for path in tables if _is_of_split(path.relative_to(inside), source.split)]
    if not chosen and source.split == "train" and len(tables) == 1:
        chosen = tables  # the hub calls the rows of a repository without splits `train`
    if not chosen:
        found = [str(path.relative_to(folder)) for path in tables] or ["no table at all"]
        raise DataError(f"{inside} holds no file of split '{source.split}', but {_first(found)}")
    return chosen


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Files that a name or glob of the repository stands for, in their folder or beside each other."""
    places = (pattern, PurePosixPath(pattern).name)
    found = next(
        filter(None, (sorted(folder.glob(place + gz)) for place in places for gz in ("", ".gz"))), []
    )
    if not found:
        there = sorted(path.name for path in folder.iterdir()) or ["nothing"]
        raise DataError(f"{folder} holds no {pattern}, but {_first(there)}")
    return found


def _first(names: Sequence[str], n: int = 10) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def _is_of_split(path: Path, split: str) -> bool:
    """``test-00000-of-00001.parquet``, ``test.jsonl``, ``test/0.parquet``."""
    names = [*path.parts[:-1], path.stem]
    return any(name == split or name.startswith((f"{split}-", f"{split}.")) for name in names)


def _form(path: Path) -> str:
    """``.jsonl`` of ``test.jsonl`` and ``test.jsonl.gz``."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _table(path: Path, limit: int | None, late: Sequence[str]) -> list[Row]:
    try:
        if _form(path) == ".parquet":
            return _parquet(path, limit)
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if _form(path) == ".jsonl":
                return _lines(path, file, limit, late)
            rows = json.load(file)
    except DataError:  # is a ValueError, too
        raise
    except gzip.BadGzipFile as error:
        raise DataError(f"{path} is not a gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zlib.error, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}. Download it again") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a JSON list of rows")
    return [_with_files(row, path.parent) for row in rows[:limit]]


def _lines(path: Path, file: Iterable[bytes], limit: int | None, late: Sequence[str]) -> list[Row]:
    if late and path.suffix == ".gz":
        raise DataError(f"{path} is read in parts, which a gzip file cannot be. Type: gunzip {path}")
    rows: list[Row] = []
    offset = 0
    for number, line in enumerate(file, start=1):
        if limit is not None and len(rows) >= limit:
            break
        place = {"file": str(path.absolute()), "offset": offset}
        offset += len(line)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: the line is not JSON: {error}. Is the file whole? Download it again"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: the row is {type(row).__name__}, expected an object")
        row |= {column: place for column in late if column in row}
        rows.append(_with_files(row, path.parent))
    return rows


def _check_is_file(path: Path) -> None:
    """DataError for what git leaves in the place of a large file."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(f"{path} is a Git LFS pointer, not the file. In its folder, type: git lfs pull")


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
    rows: list[Row] = []
    with _parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=64):
            rows += batch.to_pylist()
            if limit is not None and len(rows) >= limit:
                return rows[:limit]
    return rows


def _n_parquet(path: Path) -> int:
    with _parquet_file(path) as file:
        return file.metadata.num_rows


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    """An open Parquet file; DataError where it is damaged."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('Parquet needs `pyarrow`: pip install "uniopd-mm[eval]"') from error
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _hub_rows(source: Source, limit: int | None) -> Sequence[Row]:
    if source.files:
        return read_files(_downloaded(source), limit, source.late)
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
    n = len(found) if limit is None else min(limit, len(found))
    rows = ArrowRows(found.select(range(n)))
    return rows if n > IN_MEMORY else list(rows)


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


def _label(source: Source) -> str:
    subset = f"/{source.subset}" if source.subset else ""
    return f"{source.path}{subset} [{source.split}]" + (f" {', '.join(source.files)}" if source.files else "")


def _advice(benchmark: Benchmark, source: Path | None, split: str | None) -> str:
    """What to type."""
    place = next((one for one in benchmark.sources if not Path(one.path).is_absolute()), None)
    if place is None:
        return "These rows are made on this machine: make quickstart"
    place = replace(place, split=split or place.split)
    include = "".join(f" --include '{pattern}'" for pattern in place.files)
    folder = "FOLDER" if source is None else str(source)
    download = (
        f"  hf download {place.path} --repo-type dataset{include} --local-dir {folder}/{benchmark.name}"
    )
    if source is None:
        return (
            "Check network and access (hf auth login; a gated set is opened at "
            f"https://huggingface.co/datasets/{place.path}).\n"
            f"Without network, fetch the files elsewhere and give their folder, --source FOLDER:\n{download}"
        )
    return f"Put the files of the hub repository there, or leave out --source to fetch them:\n{download}"
