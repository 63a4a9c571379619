"""What must be right before torch and DeepSpeed are imported, and what must happen when the launcher dies.

Imports nothing heavy: the script calls :func:`prepare_environment` first.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from types import FrameType

from uniopd_mm.errors import ConfigError

LOCK_MAX_AGE_S = 600.0
"""A compilation of DeepSpeed's CPU communication kernel takes about half a minute; an older lock is a dead run's."""


def prepare_environment() -> None:
    """Set the thread count, clear stale compilation locks and check for a compiler."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    # The deepspeed launcher, unlike torchrun, leaves this unset: every rank would take all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_world)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    # DeepSpeed still calls what torch 2.13 has renamed; nothing a user can act on.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    if not _has_gpu():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # DeepSpeed would find it out by itself, with a warning
        _remove_stale_locks()
        if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
            raise ConfigError(
                "DeepSpeed compiles its communication kernel on a machine without a GPU and needs a C++ compiler. "
                "Install one, e.g.: apt-get install g++"
            )


def is_launched(local_rank: int | None = None) -> bool:
    """Whether a launcher (deepspeed, torchrun) started this process, as one of several; ``local_rank``: its option."""
    return local_rank is not None or "LOCAL_RANK" in os.environ


def _has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/kfd").exists()


def _remove_stale_locks() -> None:
    """A run killed while compiling leaves a lock on which every later run would wait for ever, silently."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    for lock in root.glob("**/lock"):
        try:
            age = time.time() - lock.stat().st_mtime
            if age > LOCK_MAX_AGE_S:
                lock.unlink()
                print(f"removed {lock}: left by a run that was killed while compiling", file=sys.stderr)
        except FileNotFoundError:  # another rank was faster
            continue


def error_message(error: Exception) -> str:
    """What this rank prints of an error: rank 0 all of it, the others one line, since most errors happen to all."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        return f"error: {error}"
    return f"error on rank {rank}: {str(error).splitlines()[0]}"


class StopRequest:
    """Turns SIGTERM, SIGINT and the death of the launcher into a flag that the loop reads between steps.

    The deepspeed command, when killed, leaves its ranks running; a thread watches for that.  A second signal ends the
    process at once.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._ancestors = _ancestors(os.getpid())[:2] if is_launched() else []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if self._ancestors:
            threading.Thread(target=self._watch, daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.reason and name == "SIGINT":
            raise KeyboardInterrupt
        self.reason = self.reason or name

    def _watch(self) -> None:
        while not self.reason:
            if _ancestors(os.getpid())[: len(self._ancestors)] != self._ancestors:
                self.reason = "the launcher is gone"
            time.sleep(1.0)


def _ancestors(pid: int) -> list[int]:
    """Process ids from the parent upwards (Linux; empty elsewhere)."""
    found: list[int] = []
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        pid = int(stat.rsplit(")", 1)[1].split()[1])
        found.append(pid)
    return found
