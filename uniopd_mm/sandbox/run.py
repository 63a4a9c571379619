"""Our side of the sandbox: one program, its tests one after the other, and what came of each."""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import shutil
import signal
import stat
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from uniopd_mm.sandbox.nursery import NURSERY, START_S
from uniopd_mm.sandbox.values import decode, encode

Kind = Literal["timeout", "memory", "exception", "exit", "signal", "output", "result", "unknown"]

_SLACK_S = 6.0
"""The supervisor keeps the time; it has this much longer to say so before it is ended from outside."""
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Program:
    """A program and how it is asked: a script that reads and prints, a function, or expressions in its namespace."""

    source: str
    style: Literal["stdin", "call", "assert"] = "call"
    entry_point: str | None = None
    """Function, or method of ``class Solution`` (style call)."""
    setup: str = ""
    """Code run before the program."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    time_s: float = 10.0
    """Wall time of one test."""
    total_s: float = 60.0
    """Wall time of all tests, and processor time."""
    memory_mb: int = 1024
    result_bytes: int = 1 << 16
    """Of one returned value, as tagged JSON."""
    stdout_bytes: int = 1 << 20
    """Of one test's printed text."""
    file_bytes: int = 1 << 20
    """Of one file in the temporary directory."""


@dataclass(frozen=True, slots=True)
class Success:
    """What the program returned (call, assert) or printed (stdin): plain data that the program chose freely."""

    value: Any


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no result.  ``unknown`` is the sandbox's fault, all other kinds are the program's."""

    kind: Kind
    detail: str = ""

    def __str__(self) -> str:
        return self.detail or self.kind


class Run:
    """One program in its sandbox; a context manager.  Use it from one thread."""

    def __init__(self, program: Program, limits: Limits, level: int, landlock: bool) -> None:
        self.program, self.limits, self.level = program, limits, level
        self._failed: Failure | None = None
        self._used_s = 0.0
        self._buffer = bytearray()
        self._temp: str | None = None
        self._stdin, self._stdout, self._pidfd = -1, -1, -1
        try:
            if level < 2:
                self._temp = tempfile.mkdtemp(prefix=f"sandbox-{os.getpid()}-")
            self._connect()
        except OSError as error:
            self._failed = Failure("unknown", f"the sandbox did not start: {error}")
        else:
            self._start(landlock)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def test(
        self, given: Any, time_s: float | None = None, max_bytes: int | None = None
    ) -> Success | Failure:
        """What the program makes of one input: a text (stdin), a list of arguments (call), [statements, expression]
        (assert).  ``time_s`` and ``max_bytes`` replace the limits' for this test."""
        if self._failed is not None:
            return self._failed
        time_s = time_s or self.limits.time_s
        left_s = min(time_s, self.limits.total_s - self._used_s)
        if left_s <= 0:
            return Failure("timeout", f"all tests together took longer than {self.limits.total_s:g} s")
        stdin = self.program.style == "stdin"
        cap = max_bytes or (self.limits.stdout_bytes if stdin else self.limits.result_bytes)
        began = time.monotonic()
        self._write({"input": given if stdin else encode(given), "limit_s": left_s, "cap": cap})
        reply = self._read(2 * left_s + _SLACK_S)
        self._used_s += time.monotonic() - began
        if reply is None:
            self._failed = self._lost()
            return self._failed
        return _result(reply, left_s, cap)

    def close(self) -> None:
        """End everything the program left and remove its files."""
        if self._pidfd >= 0:
            os.close(self._stdin)
            os.close(self._stdout)
            if not self._ended(_SLACK_S if self._failed is None else 0.1):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                self._ended(_SLACK_S)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._temp is not None:
            _remove(self._temp)

    def _connect(self) -> None:
        """Two pipes to a new sandbox process."""
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        try:
            self._pidfd = NURSERY.launch(theirs_in, theirs_out)
        except OSError:
            os.close(ours_in)
            os.close(ours_out)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._stdin, self._stdout = ours_out, ours_in
        os.set_blocking(ours_out, False)
        os.set_blocking(ours_in, False)

    def _ended(self, timeout_s: float) -> bool:
        """Whether the sandbox process ends within a time."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _start(self, landlock: bool) -> None:
        config = {
            "level": self.level,
            "landlock": landlock,
            "style": self.program.style,
            "source": self.program.source,
            "setup": self.program.setup,
            "entry_point": self.program.entry_point,
            "memory_bytes": self.limits.memory_mb << 20,
            "cpu_s": self.limits.total_s,
            "file_bytes": self.limits.file_bytes,
            "temp": self._temp or "/tmp",
            "readable": readable_paths(),
            "hidden": hidden_paths(),
        }
        self._write(config)
        reply = self._read(START_S)
        if reply is None or "ready" not in reply:
            why = reply.get("failed") if reply else "no answer from the sandbox process"
            self._failed = Failure("unknown", f"the sandbox did not start: {why}")

    def _lost(self) -> Failure:
        """The supervisor is gone or hangs.  Where a program can reach it, that is the program's doing."""
        if self.level < 2:
            return Failure("signal", "the program ended or stopped the process that watches it")
        return Failure("unknown", "the sandbox process ended or hung")

    def _write(self, fields: dict[str, Any]) -> None:
        """Send one line; a supervisor that does not take it is found out by the read that follows."""
        data = memoryview(json.dumps(fields).encode() + b"\n")
        deadline = time.monotonic() + START_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE)
            while data and selector.select(max(0.0, deadline - time.monotonic())):
                try:
                    data = data[os.write(self._stdin, data[:_CHUNK]) :]
                except BrokenPipeError:
                    return

    def _read(self, timeout_s: float) -> dict[str, Any] | None:
        """The supervisor's next line; None when it is gone or says nothing in time."""
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while not self._buffer.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                data = os.read(self._stdout, _CHUNK)
                if not data:
                    return None
                self._buffer += data
        line = bytes(self._buffer)
        self._buffer.clear()
        try:
            return json.loads(line)
        except (ValueError, RecursionError):  # a value nested too deeply to be read
            return {"kind": "result", "data": "the result cannot be read"}


def _result(reply: dict[str, Any], limit_s: float, cap: int) -> Success | Failure:
    kind, data = reply["kind"], reply.get("data")
    if kind == "stdout":
        return Success(data)
    if kind == "value":
        try:
            return Success(decode(data))
        except (ValueError, TypeError, RecursionError, OverflowError, MemoryError):
            return Failure("result", "the result cannot be read")
    if kind == "timeout":
        return Failure("timeout", f"took longer than {limit_s:g} s")
    if kind == "output":
        return Failure("output", f"more than {cap} bytes of output")
    if kind == "signal":
        return Failure("signal", f"ended by signal {data}")
    detail = str(data)[:300]
    if kind == "exception" and detail.startswith("MemoryError"):
        return Failure("memory", "out of memory")
    return Failure(kind if kind in ("exception", "exit", "result") else "result", detail)


def readable_paths() -> list[str]:
    """What programs may read: the standard library and the shared libraries it loads."""
    stdlib = os.path.realpath(sysconfig.get_path("stdlib"))
    paths = [
        stdlib,
        os.path.realpath(sysconfig.get_config_var("DESTSHARED") or stdlib),
        os.path.realpath(os.path.join(sys.base_prefix, "lib")),
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/usr/share/zoneinfo",
        "/etc/ld.so.cache",
    ]
    if stdlib.startswith("/nix/"):
        paths.append("/nix/store")
    paths = [path for path in dict.fromkeys(paths) if os.path.exists(path)]
    return [path for path in paths if not any(path.startswith(other + "/") for other in paths)]


def hidden_paths() -> list[str]:
    """Installed packages among the readable paths: ours, and data that others ship."""
    stdlib = os.path.realpath(sysconfig.get_path("stdlib"))
    return [f"{stdlib}/site-packages", f"{stdlib}/dist-packages", "/usr/lib/python3/dist-packages"]


def _remove(folder: str) -> None:
    """Delete a folder whatever its modes were changed to; links in it are not followed."""
    os.chmod(folder, stat.S_IRWXU)
    for parent, names, _ in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                os.chmod(path, stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)
