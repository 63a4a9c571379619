"""The run folder: resolved settings, versions, metrics.jsonl, rollouts/ with thumbnails, skipped.jsonl.

JSONL is the truth that the console, the curves, the trackers and the viewer read.  JSON has no NaN, so
non-finite numbers are written as null.  Only one process (rank 0) writes.  README.md lists the columns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uniopd_mm
from uniopd_mm.errors import AlignmentError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from uniopd_mm.rollout import Group, Outcome, Rollout

SCHEMA_VERSION: Final = 1
THUMB_PIXELS: Final = 256
COLUMNS: Final = (
    "tokens",
    "token_ids",
    "mask",
    "student_lp",
    "sampler_lp",
    "teacher_lp",
    "blind_teacher_lp",
    "advantage",
    "weight",
    "student_top",
    "teacher_top",
)
"""The per-token columns of a rollout row: each null or as long as ``token_ids``."""

_PACKAGES: Final = ("torch", "transformers", "deepspeed", "datasets", "peft")
_FSYNC_EVERY_S: Final = 30.0
_LP_DECIMALS: Final = 5

DecodeTokens = Callable[[Sequence[int]], list[str]]
"""Token ids -> one string per token, special tokens kept, joined to the text of all of them."""


class RunFolder:
    """What a run leaves on disk beside its weights; creates the folder or goes on with an existing one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.versions = self.path / "versions.json"
        self.metrics = self.path / "metrics.jsonl"
        self.skipped = self.path / "skipped.jsonl"
        self.rollouts = self.path / "rollouts"
        self._file: io.BufferedWriter | None = None
        self._synced_at = 0.0
        self.path.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_header(self, config_yaml: str, *, device: str, world_size: int) -> None:
        """Resolved settings and versions, before step 0; other versions of earlier starts stay listed."""
        now: dict[str, Any] = {**collect_versions(), "device": device, "world_size": world_size}
        before: dict[str, Any] = (
            json.loads(self.versions.read_text("utf-8")) if self.versions.exists() else {}
        )
        earlier: list[dict[str, Any]] = before.pop("earlier", [])
        if before and any(before.get(key) != value for key, value in now.items()):
            earlier.append(before)
        now["started"] = datetime.now(UTC).isoformat(timespec="seconds")
        _replace(self.config, config_yaml.encode("utf-8"))
        _replace(self.versions, (json.dumps({**now, "earlier": earlier}, indent=2) + "\n").encode("utf-8"))

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One event as one line, out of this process at once; ``metrics`` must hold its ``step``."""
        if not isinstance(metrics.get("step"), int):
            raise ValueError(
                f"an event needs an integer 'step' (found {metrics.get('step')!r}): resuming cuts by it"
            )
        if self._file is None:
            _mend_tail(self.metrics)
            self._file = self.metrics.open("ab")
        self._file.write(json_line(metrics))
        self._file.flush()
        if time.monotonic() - self._synced_at > _FSYNC_EVERY_S:
            os.fsync(self._file.fileno())
            self._synced_at = time.monotonic()

    def read_metrics(self) -> list[dict[str, Any]]:
        """All events so far, in order."""
        return read_metrics(self.metrics)

    def truncate_metrics(self, step: int) -> None:
        """Drop the events after ``step``: a run resumed there writes them again."""
        self.close()
        if self.metrics.exists():
            kept = [row for row in read_metrics(self.metrics) if row["step"] <= step]
            _replace(self.metrics, b"".join(map(json_line, kept)))

    def write_rollouts(
        self,
        step: int,
        groups: Iterable[Group],
        decode_tokens: DecodeTokens,
        limit: int,
        probes: Collection[str] = (),
    ) -> Path:
        """The first ``limit`` rollouts of a step, those of the prompt ids ``probes`` first; all or none.

        Raises AlignmentError (a ValueError) naming the column that is not as long as the response.
        """
        ordered = sorted(groups, key=lambda group: (group.prompt.id not in probes, group.slot))
        lines: list[bytes] = []
        for group in ordered:
            if len(lines) >= limit:
                break
            shared = self._shared_fields(step, group, decode_tokens, group.prompt.id in probes)
            for sample, rollout in enumerate(group.rollouts[: limit - len(lines)]):
                lines.append(
                    json_line({**shared, "sample": sample, **_rollout_fields(rollout, decode_tokens, group)})
                )
        path = self.rollouts / f"step_{step:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        _replace(path, b"".join(lines))
        return path

    def append_skipped(self, rows: Iterable[Any]) -> int:
        """Add malformed data rows (mappings or dataclasses), each once; returns how many are new."""
        _mend_tail(self.skipped)
        known = set(self.skipped.read_bytes().splitlines(keepends=True)) if self.skipped.exists() else set()
        new = [line for line in dict.fromkeys(map(json_line, rows)) if line not in known]
        if new:
            with self.skipped.open("ab") as file:
                file.writelines(new)
        return len(new)

    def close(self) -> None:
        """Bring the metrics onto the disk; writing goes on after it if need be."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _shared_fields(
        self, step: int, group: Group, decode_tokens: DecodeTokens, probe: bool
    ) -> dict[str, Any]:
        prompt, encoded = group.prompt, group.encoded
        spans = encoded.image_spans
        images = group.images or (None,) * len(spans)  # a group may have let go of its pictures
        if len(spans) != len(images):
            raise AlignmentError(
                f"{prompt.id}: column 'images' has {len(images)} images for {len(spans)} spans in the prompt"
            )
        pictures = [
            {
                "thumb": image and self._write_thumb(image),
                "size": image and list(image.size),
                "student_tokens": end - start,
                "teacher_tokens": None,
            }
            for image, (start, end) in zip(images, spans, strict=True)
        ]
        return {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "sample_id": prompt.id,
            "dataset": prompt.id.partition("/")[0] if "/" in prompt.id else prompt.domain,
            "domain": prompt.domain,
            "probe": probe,
            "images": pictures,
            "prompt": "".join(decode_tokens(encoded.collapsed_ids.tolist())),
            "answer": prompt.answer,
        }

    def _write_thumb(self, image: Image) -> str:
        """JPEG of at most 256 pixels a side, named by the full image's content; its path from rollouts/."""
        digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()[:16]
        path = self.rollouts / "thumbs" / f"{digest}.jpg"
        if not path.exists():
            small = image.convert("RGB")
            small.thumbnail((THUMB_PIXELS, THUMB_PIXELS))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=85)
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, buffer.getvalue())
        return f"thumbs/{digest}.jpg"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All events in order; a last line torn by a kill is dropped, any other bad line is a DataError."""
    path = Path(path)
    # Not str.splitlines: it also cuts at U+2028 and its kin, which may stand inside a JSON string.
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()] if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}:{number} is not JSON ({error}). Restore the line or delete it."
            ) from error
    return rows


def collect_versions() -> dict[str, Any]:
    """Versions of what the numbers depend on; null where a package or a git checkout is missing."""
    installed = {name: _version(name) for name in _PACKAGES}
    own = {
        "uniopd_mm": uniopd_mm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    return {**own, **installed, **_git_state(Path(uniopd_mm.__file__))}


def json_line(value: Any) -> bytes:
    """One JSON line; numbers that JSON lacks become null, tensors lists, dataclasses objects."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)
    # backslashreplace turns a lone surrogate, which UTF-8 cannot hold, into \udXXX: its JSON escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(to_list := getattr(value, "tolist", None)):  # tensors, arrays and their scalars
        return _plain(to_list())
    return str(value)


def _rollout_fields(rollout: Rollout, decode_tokens: DecodeTokens, group: Group) -> dict[str, Any]:
    """The fields of one rollout; see README.md for what each column means."""
    ids: list[int] = rollout.response_ids.tolist()
    scored = None if rollout.scored is None else [bool(flag) for flag in rollout.scored.tolist()]
    mask = [0] * len(ids) if scored is None else [int(flag) for flag in scored]
    columns: dict[str, list[Any] | None] = {
        "tokens": decode_tokens(ids),
        "token_ids": ids,
        "mask": mask,
        "student_lp": _rounded(rollout.student_logprobs),
        "sampler_lp": _rounded(rollout.sampler_logprobs),
        "teacher_lp": _rounded(rollout.teacher_logprobs),
        "blind_teacher_lp": None,
        "advantage": _rounded(rollout.advantages),
        "weight": [float(flag and rollout.kept) for flag in mask],
        "student_top": None,
        "teacher_top": None,
    }
    for name, column in columns.items():
        if column is not None and len(column) != len(ids):
            raise AlignmentError(
                f"{group.prompt.id}: column '{name}' has {len(column)} values for {len(ids)} response tokens"
            )
    if columns["teacher_lp"] is not None and scored is not None:
        columns["teacher_lp"] = [
            lp if ok else None for lp, ok in zip(columns["teacher_lp"], scored, strict=True)
        ]
    return {
        **columns,
        "teacher": rollout.teacher,
        "unscored_reason": rollout.unscored_reason,
        "outcome": _outcome_fields(rollout.outcome),
        "score": _score(rollout.outcome),
        "kept": rollout.kept,
        "finish": rollout.finish,
    }


def _outcome_fields(outcome: Outcome | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    return {"correct": outcome.correct, "extracted": outcome.extracted, "reason": outcome.reason}


def _score(outcome: Outcome | None) -> float | None:
    """In [0, 1]: the graded score, else 1 or 0 for correct or incorrect; None = unknown or not verified."""
    if outcome is None:
        return None
    if outcome.score is None and outcome.correct is not None:
        return float(outcome.correct)
    return outcome.score


def _rounded(values: Any) -> list[float | None] | None:
    """A [T] tensor in nats as a list; five decimals are finer than what is looked for, and halve the file."""
    if values is None:
        return None
    return [
        round(x, _LP_DECIMALS) + 0.0 if math.isfinite(x) else None for x in values.tolist()
    ]  # + 0.0: no -0.0


def _replace(path: Path, data: bytes) -> None:
    """Write a whole file or, if this process dies on the way, nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _mend_tail(path: Path) -> None:
    """Cut a last line torn by a kill, so that the next line does not grow onto it."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole, _, last = data.rstrip(b"\n").rpartition(b"\n")
    try:
        json.loads(last or b"null")
        mended = data if data.endswith(b"\n") or not data else data + b"\n"
    except ValueError:
        mended = whole + b"\n" if whole else b""
    if mended != data:
        _replace(path, mended)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(source: Path) -> dict[str, Any]:
    """Revision of the checkout that ``source`` is tracked in, and whether tracked files differ from it."""
    unknown: dict[str, Any] = {"git_revision": None, "git_dirty": None}
    # An installed package may lie inside the checkout of another project: its revision would be a lie.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return unknown
    revision = _git(source.parent, "rev-parse", "HEAD")
    if revision is None:
        return unknown
    return {"git_revision": revision, "git_dirty": bool(_git(source.parent, "status", "--porcelain", "-uno"))}


def _git(folder: Path, *arguments: str) -> str | None:
    """Standard output of a git command; None if git is missing or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
