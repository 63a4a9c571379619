"""Mirrors of metrics.jsonl in tensorboard, wandb or trackio.

The file stays the truth: a mirror that breaks during a run is dropped with a warning, and training goes on.
"""

from __future__ import annotations

import importlib
import math
import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol


class Tracker(Protocol):
    """One mirror."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All mirrors of a run; does nothing on ranks other than 0, and loads nothing there."""

    def __init__(
        self,
        names: Sequence[str],
        folder: str | Path,
        config: Mapping[str, Any],
        *,
        rank: int = 0,
        start_step: int = 0,
    ) -> None:
        """``config`` is the resolved settings as a plain dict; raises ImportError naming what to install."""
        folder = Path(folder)
        self._open: dict[str, Tracker] = {}
        if rank == 0:
            for name in names:
                self._open[name] = _TRACKERS[name](folder, config, start_step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Mirror one event (it holds its ``step``); null and non-finite values are left out."""
        numbers = {key: float(value) for key, value in metrics.items() if key != "step" and _is_finite(value)}
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(int(metrics["step"]), numbers)
            except Exception as error:  # whatever a tracking service throws, it must not end the run
                del self._open[name]
                warnings.warn(
                    f"{name} is off from step {metrics['step']}: {error!r}; see metrics.jsonl", stacklevel=2
                )

    def close(self) -> None:
        """Flush and end all mirrors."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                tracker.close()
            except Exception as error:  # as in log
                warnings.warn(f"{name} did not end cleanly: {error!r}; see metrics.jsonl", stacklevel=2)


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any], start_step: int) -> None:
        _load("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run wrote after the step that is resumed from.
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any], start_step: int) -> None:
        wandb = _load("wandb", "wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "uniopd-mm"),
            name=folder.name,
            id=_run_id(folder),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
        # Our own step axis: wandb's counter only grows and would drop the steps a resumed run does again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, folder: Path, config: Mapping[str, Any], start_step: int) -> None:
        trackio = _load("trackio", "trackio")
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "uniopd-mm"),
            name=f"{folder.name}-{_run_id(folder)}",
            resume="allow",
            embed=False,
            config=dict(config),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def _load(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"report.trackers names {module}, which is not installed: pip install {package}"
        ) from error


def _run_id(folder: Path) -> str:
    """Made once and kept in the run folder, so that a resumed run goes on in the service's same place."""
    path = folder / "tracker_id.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
