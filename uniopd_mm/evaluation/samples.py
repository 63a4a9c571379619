"""Sampled answers on disk: the log of every sample is what an interrupted run goes on from.

``FOLDER/HASH/rank_0000.jsonl`` holds one line per sample, in the order they got done; HASH stands for everything that
changes what is sampled (``settings.json`` beside it), so that answers of other settings are never mixed.  Each line also
has a digest of its prompt: an answer to a row that has changed since is not used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from uniopd_mm.errors import DataError, ResumeError

Key = tuple[str, str, int]
"""Benchmark, prompt id, sample index: one sample of given settings."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to one prompt, not scored."""

    benchmark: str
    id: str
    """Of the prompt."""
    index: int
    """Which of the prompt's answers, from 0."""
    text: str
    """The response without special tokens."""
    finish: Literal["stop", "length", "error"]
    n_tokens: int
    error: str = ""
    """Why there is no answer (an image that cannot be opened, a server that failed); asked again by the next run."""

    @property
    def key(self) -> Key:
        return self.benchmark, self.id, self.index


_NAMES = tuple(field.name for field in fields(Sample))


def settings_hash(settings: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that stand for JSON-able settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def different(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``name: one -> other`` for every setting in which two (nested) mappings differ."""
    lines = []
    for name in sorted({*first, *second}):
        one, other = first.get(name), second.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            lines += different(one, other, f"{prefix}{name}.")
        elif one != other:
            lines.append(f"{prefix}{name}: {json.dumps(one)} -> {json.dumps(other)}")
    return lines


class SampleStore:
    """The samples of one run, shared by its ranks: each appends to its own file and reads all.

    A context manager.  ``missing`` and ``samples`` know what the files held when the store was opened, what this rank
    appended, and after :meth:`refresh` everything.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        rank: int = 0,
        prompts: Mapping[str, str] | None = None,
    ) -> None:
        """``prompts``: a digest of every prompt by id; None = an id always stands for the same prompt."""
        self.root, self.settings, self.hash = Path(folder), dict(settings), settings_hash(settings)
        self._prompts = dict(prompts or {})
        self.folder = self.root / self.hash
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            write_whole(self.folder / "settings.json", json.dumps(self.settings, indent=2) + "\n")
        self.path = self.folder / f"rank_{rank:04d}.jsonl"
        self._file = self._open()
        self._samples: dict[Key, Sample] = {}
        try:
            self.refresh()
        except DataError:
            self.close()
            raise

    def __enter__(self) -> SampleStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)  # and with it the lock
            self._file = -1

    def refresh(self) -> None:
        """Read what all ranks have written so far; an answer counts more than an error."""
        self._samples.clear()
        for path in sorted(self.folder.glob("rank_*.jsonl")):
            for sample, prompt in _read(path, self.hash):
                known = self._samples.get(sample.key)
                if prompt == self._prompt(sample.id) and (known is None or known.error):
                    self._samples[sample.key] = sample

    def missing(self, benchmark: str, ids: Iterable[str], n: int) -> dict[str, list[int]]:
        """Prompt id -> indices below ``n`` that have no answer yet; prompts that have all are left out."""
        wanted = {id: [i for i in range(n) if not self._answered((benchmark, id, i))] for id in ids}
        return {id: indices for id, indices in wanted.items() if indices}

    def append(self, samples: Sequence[Sample]) -> None:
        """Write samples in one go: a process that is killed leaves all of them, or a last line that is cut."""
        about = ({"settings": self.hash, "prompt": self._prompt(s.id)} for s in samples)
        lines = [json.dumps(a | asdict(s), ensure_ascii=False) for a, s in zip(about, samples, strict=True)]
        data = "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")
        with writing(self.path):
            while data:
                data = data[os.write(self._file, data) :]
        self._samples |= {sample.key: sample for sample in samples}

    def samples(self, benchmark: str, ids: Iterable[str], n: int) -> list[Sample]:
        """Known samples with an index below ``n``, by prompt in the given order, then by index."""
        keys = ((benchmark, id, i) for id in ids for i in range(n))
        return [self._samples[key] for key in keys if key in self._samples]

    def others(self) -> dict[str, dict[str, Any]]:
        """Settings of the samples beside these that stay because they were made in another way, by hash."""
        found = {}
        for path in sorted(self.root.glob("*/settings.json")):
            if path.parent != self.folder and any(path.parent.glob("rank_*.jsonl")):
                found[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _prompt(self, id: str) -> str:
        return self._prompts.get(id, "")

    def _answered(self, key: Key) -> bool:
        sample = self._samples.get(key)
        return sample is not None and not sample.error

    def _open(self) -> int:
        """This rank's file, locked, without a last line that a killed run cut."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise ResumeError(
                f"another run is writing to {self.path}. Wait for it, or give this one another folder: --out FOLDER"
            ) from error
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(file, whole)
        return file


def read_samples(path: Path) -> list[Sample]:
    """The samples of a ``samples.jsonl``, each once; an answer counts more than an error.

    Of each line only ``benchmark``, ``id`` and ``text`` are needed; answers without an ``index`` are numbered.
    """
    samples: dict[Key, Sample] = {}
    n_answers: Counter[tuple[Any, Any]] = Counter()
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = {"finish": "stop", "n_tokens": 0, "error": "", **json.loads(line)}
                row.setdefault("index", n_answers[row["benchmark"], row["id"]])
                sample = Sample(**{name: row[name] for name in _NAMES})
                if not (isinstance(sample.text, str) and isinstance(sample.index, int)):
                    raise TypeError("text is a string, and index a number")
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}: not a sample ({type(error).__name__}: {error}); expected one JSON object a line "
                    "with benchmark, id and text."
                ) from error
            n_answers[sample.benchmark, sample.id] += 1
            known = samples.get(sample.key, sample)
            if known.text != sample.text and not (known.error or sample.error):
                raise DataError(
                    f"{path}:{number}: another answer {sample.index} to {sample.id}. Remove one, or number them: index"
                )
            if sample.key not in samples or known.error:
                samples[sample.key] = sample
    return list(samples.values())


def _read(path: Path, wanted: str) -> Iterator[tuple[Sample, str]]:
    """The samples of one file, each with the digest of its prompt; a last line without an end is of a run that was killed or still writes."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                sample = Sample(**{name: row[name] for name in _NAMES})
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}: not a sample ({type(error).__name__}: {error}). Remove the line; that sample is "
                    "then made again."
                ) from error
            if row.get("settings") != wanted:
                raise DataError(
                    f"{path}:{number}: a sample of settings {row.get('settings')} among those of {wanted}. Remove the line."
                )
            yield sample, row.get("prompt", "")


def write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the disk (it is full, say) inside is one that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}. Mend that (is the disk full?); the same command then goes on from here"
        ) from error
