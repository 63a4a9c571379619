"""Scores on disk, found again by what they are of: a resumed or repeated run asks its teachers for nothing twice.

A score is filed under the teacher (the content of its files, its data type, its template) and under what it was asked:
the ids of the prompt and of the response, the pixels of the images, the temperature.  U teacher tokens of a response;
log-probabilities in nats.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from uniopd_mm.config import TeacherConfig
from uniopd_mm.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from uniopd_mm.processors import EncodedPrompt

MANIFEST = "manifest.json"
_BUSY_S = 60.0  # how long one process waits for another that writes the same file
_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


class ScoreCache:
    """The scores of one teacher; a context manager.

    Every rank writes a file of its own and reads those of all ranks, so that nobody waits for a lock, and a run that goes
    on with another number of ranks finds everything.
    """

    def __init__(self, folder: Path, identity: str, rank: int = 0) -> None:
        """``identity``: digest of the teacher, from :func:`describe_teacher`."""
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"{identity[:16]}-rank{rank}.sqlite"
        self.n_found = self.n_asked = 0
        self._own = _open(own)
        others = sorted(set(folder.glob(f"{identity[:16]}-rank*.sqlite")) - {own})
        self._files = [self._own, *map(_open, others)]

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def get(self, key: bytes, n: int) -> Tensor | None:
        """The ``n`` values filed under a key, [U] float32; None = not there."""
        self.n_asked += 1
        for file in self._files:
            row = file.execute("SELECT value FROM scores WHERE key = ?", (key,)).fetchone()
            if row is not None and len(row[0]) == 4 * n:
                self.n_found += 1
                return torch.from_numpy(np.frombuffer(row[0], dtype="<f4").copy())
        return None

    def put(self, scores: Iterable[tuple[bytes, Tensor]]) -> None:
        """File values, all or none."""
        rows = [(key, values.numpy().astype("<f4").tobytes()) for key, values in scores]
        if rows:
            with self._own:
                self._own.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)


def question_keys(
    encoded: EncodedPrompt, images: Iterable[Image], responses: Iterable[Tensor], temperature: float
) -> Iterator[bytes]:
    """What is asked of a teacher about each response to a prompt, as 32 bytes."""
    prompt = hashlib.sha256(f"{temperature!r};".encode() + _id_bytes(encoded.input_ids))
    for image in images:
        prompt.update(f"{image.size};".encode() + image.convert("RGB").tobytes())
    for response_ids in responses:
        digest = prompt.copy()
        digest.update(_id_bytes(response_ids))
        yield digest.digest()


def _id_bytes(ids: Tensor) -> bytes:
    return f"{len(ids)};".encode() + ids.numpy().astype("<i8").tobytes()


def describe_teacher(
    settings: TeacherConfig, served_as: str | None, known_files: Mapping[str, Any]
) -> dict[str, Any]:
    """What a teacher's numbers depend on, for the manifest; ``served_as``: the name its servers know it by.

    ``known_files``: the manifest's digests of files, kept while size and time of change are the same.
    """
    folder = _model_folder(settings)
    files = {
        path.name: _file_entry(path, known_files)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _MODEL_FILES
    }
    facts = {
        "files": {name: entry["sha256"] for name, entry in files.items()},
        "dtype": settings.dtype,
        "template": settings.template,
        "min_pixels": settings.min_pixels,
        "max_pixels": settings.max_pixels,
        "server": None if settings.server is None else {"kind": settings.server.kind, "model": served_as},
    }
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {"identity": identity, "model": settings.model, "revision": settings.revision, **facts} | {
        "file_digests": {str(folder / name): entry for name, entry in files.items()}
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache folder; an empty one when there is none yet."""
    path = folder / MANIFEST
    if not path.exists():
        return {"teachers": {}, "files": {}}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {"teachers": dict(manifest["teachers"]), "files": dict(manifest["files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the manifest of a score cache ({error}). Move {folder} away, or set score_cache to another "
            "folder."
        ) from error


def write_manifest(folder: Path, teachers: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the descriptions of named teachers; the file is replaced whole."""
    manifest = read_manifest(folder)
    for name, described in teachers.items():
        entry = {key: value for key, value in described.items() if key != "file_digests"}
        manifest["teachers"][described["identity"]] = {"name": name, **entry}
        manifest["files"] |= described["file_digests"]
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{MANIFEST}.tmp"
    partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


def _open(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_S)
        connection.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
        connection.commit()
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{path} of the score cache cannot be used ({error}). Remove this file.") from error
    return connection


def _model_folder(settings: TeacherConfig) -> Path:
    """The folder that ``from_pretrained`` reads: the model's own, or its snapshot in the hub's cache."""
    if Path(settings.model).is_dir():
        return Path(settings.model).resolve()
    from transformers.utils import cached_file

    found = cached_file(settings.model, "config.json", revision=settings.revision)
    assert found is not None  # else it has raised
    return Path(found).parent


def _file_entry(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    state = path.stat()
    entry = known.get(str(path))
    if entry and (entry["size"], entry["mtime_ns"]) == (state.st_size, state.st_mtime_ns):
        return dict(entry)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": digest}
