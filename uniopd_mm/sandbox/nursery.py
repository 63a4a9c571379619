"""The process that sandboxes are forked from: it has Python started and common modules imported, and runs no program.

One per process of ours, started when first needed; it ends when we close it or end.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

START_S = 20.0
"""A sandbox that is not ready by then does not start."""
_CHILD = str(Path(__file__).with_name("child.py"))


class Nursery:
    """Forks launchers on request; a nursery that was ended is started again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None

    def launch(self, requests: int, replies: int) -> int:
        """Start a sandbox that reads ``requests`` and writes ``replies`` (file descriptors); a descriptor of its process.

        OSError if that cannot be done.
        """
        with self._lock:
            if self._process is not None:
                with contextlib.suppress(OSError):
                    return self._ask(requests, replies)
                self._end()
            self._start()
            return self._ask(requests, replies)

    def close(self) -> None:
        """End the process; sandboxes that are running go on."""
        with self._lock:
            self._end()

    def _ask(self, requests: int, replies: int) -> int:
        assert self._line is not None
        socket.send_fds(self._line, [b"+"], [requests, replies])
        _, found, _, _ = socket.recv_fds(self._line, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not found:
            raise ConnectionError("the process that starts sandboxes ended; it needs Linux 5.3 or later")
        return found[0]

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # The last argument says in the process table whose it is.
                [_interpreter(), "-I", "-S", "-B", "-X", "utf8", _CHILD, str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,
            )
        ours.settimeout(START_S)
        self._line = ours

    def _end(self) -> None:
        if self._process is None or self._line is None:
            return
        self._line.close()
        self._process.kill()
        self._process.wait()
        self._process = self._line = None


def _interpreter() -> str:
    """The Python that virtual environments are made from: it needs no site-packages."""
    return getattr(sys, "_base_executable", None) or sys.executable


NURSERY = Nursery()
atexit.register(NURSERY.close)
os.register_at_fork(after_in_child=NURSERY.__init__)  # a copy of our process may not speak on its line
