"""Rows whose pictures stay on disk until a row is asked for."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, overload

from uniopd_mm.errors import DataError

if TYPE_CHECKING:
    from uniopd_mm.evaluation.benchmark import Row


class ArrowRows(Sequence["Row"]):
    """Rows of memory-mapped tables, each read when it is asked for: their pictures are larger than memory.

    Pages that were read count as memory of the process, but all ranks share them and the system takes them back.
    """

    def __init__(self, dataset: Any) -> None:
        self._tables = dataset.with_format("arrow")  # plain values: no image is decoded

    def __len__(self) -> int:
        return len(self._tables)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        rows = self._tables[index].to_pylist()
        return rows if isinstance(index, slice) else rows[0]

    def columns(self) -> Iterable[Collection[str]]:
        """Names of the columns; all rows have the same."""
        return [self._tables.column_names] if len(self) else []


class ZipRows(Sequence["Row"]):
    """Rows with the content of a zip member in place of each text that is its name, read when the row is asked for."""

    def __init__(self, rows: Sequence[Row], archives: Sequence[Path]) -> None:
        """DataError when no row names a member."""
        self._rows, self._members = rows, _members(archives)
        if not any(self._member(value) for row in rows for value in row.values()):
            names = ", ".join(list(self._members)[:3])
            raise DataError(
                f"no row names a file of {', '.join(p.name for p in archives)} (which holds {names}, ...)"
            )

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._filled(row) for row in self._rows[index]]
        return self._filled(self._rows[index])

    def columns(self) -> Iterable[Collection[str]]:
        """Names of the columns of every row."""
        return self._rows

    def _filled(self, row: Row) -> Row:
        filled = dict(row)
        for column, value in row.items():
            member = self._member(value)
            if member:
                archive, name = member
                try:
                    filled[column] = {"bytes": archive.read(name), "path": value}
                except (zipfile.BadZipFile, zlib.error) as error:
                    raise DataError(f"{name} in {archive.filename} is damaged: {error}") from error
        return filled

    def _member(self, value: Any) -> tuple[zipfile.ZipFile, str] | None:
        return self._members.get(value.removeprefix("./")) if isinstance(value, str) else None


def _members(archives: Sequence[Path]) -> dict[str, tuple[zipfile.ZipFile, str]]:
    """The members of zip files by the names that rows may have for them."""
    members: dict[str, tuple[zipfile.ZipFile, str]] = {}
    for path in archives:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise DataError(f"{path} is damaged: {error}") from error
        for name in archive.namelist():
            parts = PurePosixPath(name).parts  # the row may or may not name the folder that was packed
            for start in range(min(2, len(parts))):
                members.setdefault("/".join(parts[start:]), (archive, name))
    return members
