"""The parent's side of the math worker processes: start when needed, feed one request at a time, replace what fails.

Workers are plain subprocesses, not ``multiprocessing`` ones: nothing of this process (a CUDA context, the script that
is ``__main__``) reaches them, and it works in any thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from uniopd_mm.verifiers.base import VerifierError

START_S = 60.0
"""A worker that is not ready by then does not start."""
GRACE_S = 1.0
"""Beyond its limit a worker has so long to say that it overran; then it is killed from here."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a worker says of one (gold, answer); None = unknown, with the reason."""

    gold_ok: bool | None = None
    equal: bool | None = None
    reason: str = ""


class _Worker:
    """One process; ``job`` is the index of the request it works on, None when idle or starting."""

    def __init__(self, timeout_s: float, boxed: bool) -> None:
        root = str(Path(__file__).parents[2])
        path = [*(entry for entry in sys.path if entry), root]
        # The worker finds the same packages as this process, and nothing in the working directory shadows them.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
        command = [
            sys.executable,
            "-m",
            "uniopd_mm.verifiers.math_worker",
            str(os.getpid()),
            str(timeout_s),
            "boxed" if boxed else "bare",
        ]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = False
        self.job: int | None = None
        self.n_given = 0
        self.deadline = time.monotonic() + START_S
        self.buffer = b""

    def give(self, job: int, gold: str, answer: str | None, timeout_s: float) -> None:
        """Send a request; raises BrokenPipeError when the process is gone."""
        self.n_given += 1
        request = {"job": self.n_given, "gold": gold, "answer": answer}
        self.stdin.write(json.dumps(request).encode() + b"\n")
        self.stdin.flush()
        self.job, self.deadline = job, time.monotonic() + timeout_s + GRACE_S

    def receive(self) -> dict | None:
        """The reply to the request at hand, or None so far; raises EOFError when the process is gone."""
        data = os.read(self.stdout.fileno(), 65536)
        if not data:
            raise EOFError
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for reply in map(json.loads, lines):
            # A fork that died while idle failed no request, and the next one may answer what was given up.
            if reply.get("job", self.n_given) == self.n_given and (self.job is not None or not self.ready):
                return reply
        return None

    def stop(self) -> int:
        """Kill the process and reap it; its exit status."""
        self.process.kill()
        status = self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # closing flushes what the process no longer reads
            self.stdin.close()
        self.stdout.close()
        return status


class MathWorkers:
    """Up to ``n`` worker processes; each comparison has ``timeout_s`` seconds.  Safe to use from several threads."""

    def __init__(self, n: int, timeout_s: float, boxed: bool = True) -> None:
        r"""``boxed``: golds and answers are expressions, compared as contents of ``\boxed{}``; else texts that hold one."""
        self.n, self.timeout_s, self.boxed = n, timeout_s, boxed
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._started_once = False
        # A worker dies with the *thread* that started it, so that is one which lasts as long as this object.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="math-workers")
        self._finalizer = weakref.finalize(self, _stop_all, self._workers, self._owner)

    def compare(self, pairs: Sequence[tuple[str, str | None]]) -> list[Verdict]:
        """Verdicts on (gold, answer) pairs, in order; an answer of None only asks whether the gold is readable."""
        with self._lock:
            self._forget_inherited()
            verdicts: list[Verdict | None] = [None] * len(pairs)
            todo = deque(range(len(pairs)))
            try:
                while todo or any(worker.job is not None for worker in self._workers):
                    self._assign(pairs, todo)
                    for worker in self._wait():
                        self._collect(worker, verdicts, todo)
            except BaseException:
                # An interrupted worker would answer the next batch with this one's reply.
                _stop_all(self._workers, self._owner)
                raise
            return [verdict or Verdict(reason="math worker gave no verdict") for verdict in verdicts]

    def close(self) -> None:
        """Stop all workers; the next comparison starts new ones."""
        with self._lock:
            _stop_all(self._workers, self._owner)

    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.process.pid for worker in self._workers]

    def _forget_inherited(self) -> None:
        """After a fork the workers belong to the parent; the child starts its own."""
        if os.getpid() != self._owner:
            self._workers, self._owner = [], os.getpid()
            self._starter = ThreadPoolExecutor(1, thread_name_prefix="math-workers")
            self._finalizer = weakref.finalize(self, _stop_all, self._workers, self._owner)

    def _assign(self, pairs: Sequence[tuple[str, str | None]], todo: deque[int]) -> None:
        """Give each idle worker a request, replacing those that died, and start workers while requests are left over."""
        for worker in [w for w in self._workers if w.ready and w.job is None]:
            if not todo:
                return
            try:
                if _readable(worker):  # a fork died while idle
                    worker.receive()
                worker.give(todo[0], *pairs[todo[0]], self.timeout_s)
                todo.popleft()
            except (BrokenPipeError, EOFError):  # it died while idle: no answer's fault
                self._remove(worker)
        starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self.n and starting < len(todo):
            self._workers.append(self._starter.submit(_Worker, self.timeout_s, self.boxed).result())
            starting += 1

    def _wait(self) -> list[_Worker]:
        """Workers that have something to read or are past their deadline."""
        waiting = [w for w in self._workers if not w.ready or w.job is not None]
        if not waiting:
            return []
        with selectors.DefaultSelector() as selector:
            for worker in waiting:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            left = min(worker.deadline for worker in waiting) - time.monotonic()
            readable = [key.data for key, _ in selector.select(max(0.0, left))]
        now = time.monotonic()
        return readable + [w for w in waiting if w not in readable and w.deadline <= now]

    def _collect(self, worker: _Worker, verdicts: list[Verdict | None], todo: deque[int]) -> None:
        """Take a reply, or end a worker that overran or died."""
        try:
            # A reply that is there counts, however late this process comes to read it.
            reply = worker.receive() if _readable(worker) else None
        except EOFError:
            reason = f"math worker died (status {self._remove(worker)})"
            return self._fail(worker, reason, verdicts, todo)
        if reply is None:
            if worker.deadline <= time.monotonic():
                self._remove(worker)
                limit_s = self.timeout_s if worker.ready else START_S
                self._fail(worker, f"took longer than {limit_s:g} s", verdicts, todo)
        elif "error" in reply:
            self._remove(worker)
            self._fail(worker, reply["error"], verdicts, todo)
        elif "failed" in reply:  # its next fork is ready
            self._fail(worker, reply["failed"], verdicts, todo)
            worker.job = None
        elif not worker.ready:
            worker.ready = self._started_once = True
        else:
            job, worker.job = worker.job, None
            assert job is not None
            verdicts[job] = Verdict(reply["gold_ok"], reply["equal"])

    def _fail(self, worker: _Worker, reason: str, verdicts: list[Verdict | None], todo: deque[int]) -> None:
        """Unknown for the request at hand; an error when no worker has ever started."""
        if worker.ready:
            assert worker.job is not None
            verdicts[worker.job] = Verdict(reason=reason)
        elif not self._started_once:
            raise VerifierError(
                f"the math worker process did not start: {reason}. "
                f'Check the installation: {sys.executable} -c "import math_verify" (pip install math-verify)'
            )
        elif todo:  # starts again for the next request; this one must not wait forever
            verdicts[todo.popleft()] = Verdict(reason=f"math worker did not start: {reason}")

    def _remove(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.stop()


def _readable(worker: _Worker) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        return bool(selector.select(0))


def _stop_all(workers: list[_Worker], owner: int) -> None:
    """Stop and forget workers, unless this is a fork of their owner."""
    if os.getpid() == owner:
        while workers:
            workers.pop().stop()
