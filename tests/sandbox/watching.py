"""What tests of the sandbox look at from outside: processes and files that are left, and time that was taken."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path


def _start_time(pid: int) -> str | None:
    """Of a live process, in clock ticks; None for our own child, which sandboxes are forked from."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" or fields[1] == str(os.getpid()) else fields[19]
    return None


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def sandbox_processes() -> dict[int, str]:
    """Live processes of this process's sandboxes, orphans too: id -> start time."""
    found, mark = {}, b"sandbox/child.py\0%d\0" % os.getpid()
    for name in os.listdir("/proc"):
        if name.isdigit() and mark in _command(int(name)):
            began = _start_time(int(name))
            if began is not None:
                found[int(name)] = began
    return found


def left_processes(patience_s: float = 1.0) -> dict[int, str]:
    """Those that are still there after a while."""
    left = sandbox_processes()
    deadline = time.monotonic() + patience_s
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        now = sandbox_processes()
        left = {pid: began for pid, began in left.items() if now.get(pid) == began}
    return left


def temporary_folders() -> set[str]:
    """Folders that this process's sandboxes make where programs have no file tree of their own."""
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(f"sandbox-{os.getpid()}-")}
