"""Data files as sequences of raw rows: JSONL, JSON, Parquet, ``datasets`` folders and hub ids.

Rows stay where they are (byte offsets of a JSONL file, memory-mapped Arrow) and are read one at a time.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from uniopd_mm.config import SourceConfig
from uniopd_mm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Row = dict[str, Any]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BATCH = 1024
_FORMATS = ".jsonl, .json, .parquet, a folder or a hub id like HuggingFaceM4/ChartQA"


class RowError(ValueError):
    """A row that cannot become a Prompt; ``reasons`` holds every problem found in it."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class Rows(Protocol):
    """Rows of one source; ``number`` counts from 1 (lines of a JSONL file, else rows)."""

    label: str
    root: str
    """Folder that relative image paths start from."""

    def __len__(self) -> int: ...

    def number(self, index: int) -> int: ...

    def read(self, index: int) -> Row:
        """The whole row; RowError when it is not one."""
        ...

    def scan(self, start: int, stop: int) -> Iterator[Row | RowError]:
        """Rows in order for checking; in the place of an image's bytes may stand their number, as text."""
        ...


class JsonlRows:
    """One JSON object a line; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.label, self.root = str(path), str(path.parent)
        self._offsets, self._numbers, position = array("q"), array("q"), 0
        with open(path, "rb") as file:
            self._stamp = _stamp(file.fileno())
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._offsets.append(position)
                    self._numbers.append(number)
                position += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def number(self, index: int) -> int:
        return self._numbers[index]

    def read(self, index: int) -> Row:
        found = next(self.scan(index, index + 1))
        if isinstance(found, RowError):
            raise found
        return found

    def scan(self, start: int, stop: int) -> Iterator[Row | RowError]:
        with open(self.label, "rb") as file:
            if _stamp(file.fileno()) != self._stamp:
                raise DataError(f"{self.label} was changed while in use. Run the command again.")
            for offset in self._offsets[start:stop]:
                file.seek(offset)
                yield _parse_json(file.readline())


class JsonRows:
    """A JSON file that holds a list of objects."""

    def __init__(self, path: Path, rows: list[Any]) -> None:
        self.label, self.root, self._rows = str(path), str(path.parent), rows

    def __len__(self) -> int:
        return len(self._rows)

    def number(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> Row:
        found = _as_row(self._rows[index])
        if isinstance(found, RowError):
            raise found
        return found

    def scan(self, start: int, stop: int) -> Iterator[Row | RowError]:
        return map(_as_row, self._rows[start:stop])


class ArrowRows:
    """A ``datasets`` table; class labels are read as their names, images stay encoded."""

    def __init__(self, dataset: Dataset, label: str, root: str) -> None:
        from datasets import ClassLabel

        self.label, self.root = label, root
        self._labels = {name: f.names for name, f in dataset.features.items() if isinstance(f, ClassLabel)}
        self._tables: Any = dataset.with_format("arrow")  # plain values: nothing is decoded

    def __len__(self) -> int:
        return len(self._tables)

    def number(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> Row:
        return self._named(self._tables[index].to_pylist()[0])

    def scan(self, start: int, stop: int) -> Iterator[Row | RowError]:
        for low in range(start, stop, _BATCH):
            table = self._tables[low : min(low + _BATCH, stop)]
            columns = {name: _without_bytes(table.column(name)) for name in table.column_names}
            for k in range(table.num_rows):
                yield self._named({name: values[k] for name, values in columns.items()})

    def _named(self, row: Row) -> Row:
        for name, names in self._labels.items():
            if row[name] is not None and row[name] >= 0:  # -1 marks a hidden label
                row[name] = names[row[name]]
        return row


def find_data(path: str, folders: Sequence[Path]) -> Path | None:
    """The local file or folder of a source in the first of ``folders`` that has it; None = it may be on the hub."""
    if path.startswith("hf://"):
        return None
    places = [Path(os.path.normpath(folder / path)) for folder in folders]
    return next((place for place in places if place.exists()), None)


def open_rows(source: SourceConfig, folders: Sequence[Path]) -> Rows:
    """The rows of a source; a relative path is looked for in each of ``folders``, then taken for a hub id."""
    if source.path.startswith("hf://"):
        return ArrowRows(_load("parquet", source, data_files=source.path, split="train"), source.path, "")
    path = find_data(source.path, folders)
    if path is None:
        if not _HUB_ID.fullmatch(source.path) or source.path.endswith(
            (".json", ".jsonl", ".parquet", ".arrow")
        ):
            looked = ", ".join(os.path.normpath(folder / source.path) for folder in folders)
            raise DataError(
                f"there is no data at '{source.path}' (looked for {looked}). Expected {_FORMATS}."
            )
        label = f"{source.path}{'/' + source.subset if source.subset else ''}[{source.split}]"
        return ArrowRows(_load(source.path, source, name=source.subset, split=source.split), label, "")
    if path.is_dir():
        return ArrowRows(_open_folder(path, source), f"{path}[{source.split}]", str(path))
    try:
        return _open_file(path, source)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def row_range(text: str | None, count: int) -> range:
    """The rows that a slice such as ``0:1000``, ``:10%`` or ``-500:`` takes of ``count``."""
    if text is None:
        return range(count)
    match = re.fullmatch(r"(?:(-?\d+)(%)?)?:(?:(-?\d+)(%)?)?", text.strip())
    if match is None:
        raise ConfigError(f'slice \'{text}\' is not of the form start:stop, e.g. "0:1000", ":10%" or "-500:"')
    low, low_share, high, high_share = match.groups()
    start = None if low is None else int(low) * count // 100 if low_share else int(low)
    stop = None if high is None else int(high) * count // 100 if high_share else int(high)
    return range(count)[start:stop]


def _open_file(path: Path, source: SourceConfig) -> Rows:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return JsonlRows(path)
    if suffix == ".json":
        return _open_json(path)
    if suffix == ".parquet":
        dataset = _load("parquet", source, data_files=str(path), split="train")
        return ArrowRows(dataset, str(path), str(path.parent))
    raise DataError(f"{path}: rows cannot be read from a '{suffix}' file. Expected {_FORMATS}.")


def _open_json(path: Path) -> Rows:
    with open(path, "rb") as file:
        is_list = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if is_list:
        try:
            return JsonRows(path, json.loads(path.read_text(encoding="utf-8-sig")))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: the file is not valid JSON: {error.msg}.") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: the file is not UTF-8 text ({error.reason} at byte {error.start})."
            ) from error
    rows = JsonlRows(path)  # many JSONL files are called .json
    if len(rows) and isinstance(next(rows.scan(0, 1)), RowError):
        raise DataError(f"{path}: expected a JSON list of rows, or one row a line.")
    return rows


def _open_folder(path: Path, source: SourceConfig) -> Dataset:
    datasets = _datasets()
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _load(
            str(path), source, name=source.subset, split=source.split
        )  # e.g. a downloaded hub repository
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow, OS and `datasets` errors alike mean: not readable
        raise DataError(f"cannot read the data set folder {path}: {error}") from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if source.split not in found:
        raise DataError(f"{path} has no split '{source.split}'. Set split to one of: {', '.join(found)}.")
    return found[source.split]


def _load(path: str, source: SourceConfig, **kwargs: Any) -> Dataset:
    try:
        return _datasets().load_dataset(path, **kwargs)
    except Exception as error:  # network, pyarrow and `datasets` errors alike mean: not readable
        tried = f"split: {source.split}" + (f", subset: {source.subset}" if source.subset else "")
        hint = f"Check split and subset ({tried})."
        if path == source.path and not Path(path).exists():
            hint = f"No local file has that name; for a hub id, check the id, {tried}, access and network."
        elif "data_files" in kwargs:
            hint = "Check the file."
        raise DataError(f"cannot load '{source.path}': {type(error).__name__}: {error}. {hint}") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Parquet, Arrow and hub data need `datasets`: pip install "uniopd-mm[train]"'
        ) from error
    return datasets


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _parse_json(line: bytes) -> Row | RowError:
    try:
        return _as_row(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return RowError(f"the line is not UTF-8 text ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        return RowError(f"the line is not JSON: {error.msg} at column {error.colno}")


def _as_row(value: Any) -> Row | RowError:
    if isinstance(value, dict):
        return value
    return RowError(f"the row is {'null' if value is None else type(value).__name__}, expected an object")


def _without_bytes(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Python values of a column with the number of bytes (as text; none for 0) in place of those of images, so that
    checking does not read gigabytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, call = column.type, pc.call_function
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        sizes = call("binary_length", [column]).to_pylist()
        return [None if n is None else str(n).encode() if n else b"" for n in sizes]
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        contents = _without_bytes(_field(column, "bytes"))
        paths = _field(column, "path").to_pylist()
        known = column.is_valid().to_pylist()
        pairs = zip(contents, paths, known, strict=True)
        return [{"bytes": content, "path": path} if valid else None for content, path, valid in pairs]
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _holds_bytes(kind.value_type):
        flat = iter(_without_bytes(call("list_flatten", [column])))
        lengths = call("list_value_length", [column]).to_pylist()
        return [None if length is None else [next(flat) for _ in range(length)] for length in lengths]
    return column.to_pylist()


def _field(column: pa.ChunkedArray | pa.Array, name: str) -> pa.ChunkedArray | pa.Array:
    import pyarrow.compute as pc

    return pc.call_function("struct_field", [column], pc.StructFieldOptions(name))


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {field.name for field in kind} == {"bytes", "path"}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
