"""Which isolation this machine offers: found by running a program that tries to break out, once per process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from uniopd_mm.errors import UniOPDError
from uniopd_mm.sandbox.run import Failure, Limits, Program, Run, Success

SAFE_LEVEL = 2
"""Below it a program can reach the network, other processes and the user's files."""

_TITLES = (
    "resource limits only",
    "resource limits, and what a program starts is ended with it",
    "processes, network, files and user of its own",
    "processes, network, files and user of its own, and Landlock",
)
_REMEDY = (
    "Allow namespaces: in a container, start it with 'docker run --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined ...'; elsewhere, as root, 'sysctl -w user.max_user_namespaces=10000' and, where "
    "there is such a setting, 'sysctl -w kernel.apparmor_restrict_unprivileged_userns=0'"
)
_PROBE = """
import _bisect, _ctypes, _decimal, _hashlib, _heapq, _json, _random, _socket, math, os, socket, threading, zlib
def tries(action):
    try:
        action()
        return True
    except OSError:
        return False
def probe(ours):
    def send():
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))
    open("file", "w").write("x")
    thread = threading.Thread(target=len, args=("",)); thread.start(); thread.join()
    return {"pid": os.getpid(), "reads": tries(lambda: open(ours).read()), "sends": tries(send),
            "lists": tries(lambda: os.listdir("/"))}
"""


class SandboxError(UniOPDError, RuntimeError):
    """Programs cannot be run here as safely as asked for."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """What was reached on this machine."""

    level: int
    """0 limits, 1 + nothing survives, 2 + namespaces, 3 + Landlock."""
    landlock: bool
    """Landlock is available; it is used at lower levels as well."""
    missing: dict[int, str] = field(default_factory=dict)
    """Why each higher level was not reached."""

    def describe(self) -> str:
        """One line for the start of a run."""
        extra = " (with Landlock)" if self.landlock and self.level < 2 else ""
        reasons: dict[str, list[str]] = {}
        for level, reason in sorted(self.missing.items()):
            reasons.setdefault(reason, []).append(str(level))
        why = "".join(f"; no level {' or '.join(levels)}: {reason}" for reason, levels in reasons.items())
        unsafe = "" if self.level >= SAFE_LEVEL else "; UNSAFE for programs you do not trust"
        return f"code sandbox: level {self.level} of 3, {_TITLES[self.level]}{extra}{unsafe}{why}"


_found: Isolation | None = None
_lock = threading.Lock()


def detect() -> Isolation:
    """The highest level at which a program runs and does not get out."""
    global _found
    with _lock:
        if _found is None:
            _found = _detect()
        return _found


def describe() -> str:
    """``detect().describe()``."""
    return detect().describe()


def _detect() -> Isolation:
    missing: dict[int, str] = {}
    landlock = _problem(1, landlock=True) is None
    for level in (3, 2, 1, 0):
        why = _problem(level, landlock or level == 3)
        if why is None:
            return Isolation(level, landlock or level == 3, missing)
        missing[level] = why
    raise SandboxError(f"no program can be run in a process of its own here: {missing[0]}")


def _problem(level: int, landlock: bool) -> str | None:
    """Why a level cannot be used; None = the probe ran and found every door closed that the level closes."""
    with Run(Program(_PROBE, "call", "probe"), Limits(time_s=20), level, landlock) as run:
        result = run.test([__file__])
    if isinstance(result, Failure):
        return str(result)
    found: dict[str, Any] = result.value
    doors = []
    if level >= 2:
        doors += [name for name in ("reads", "sends") if found[name]] + (["pid"] if found["pid"] > 99 else [])
    if landlock and found["lists"]:
        doors.append("lists")
    return f"the test program got out ({', '.join(doors)})" if doors else None


class Sandbox:
    """Runs programs at the level this machine offers.

    SandboxError below level 2 unless ``allow_unsafe``.  ``level`` lowers what is used, e.g. for tests.
    """

    def __init__(
        self, limits: Limits | None = None, allow_unsafe: bool = False, level: int | None = None
    ) -> None:
        found = detect()
        self.limits = limits or Limits()
        self.level = found.level if level is None else min(level, found.level)
        self.landlock = found.landlock and (self.level == 3 or self.level < 2)
        if self.level < SAFE_LEVEL and not allow_unsafe:
            raise SandboxError(
                f"programs written by a model are not run here: {found.describe()}. {_REMEDY}, or accept the risk: "
                f"--allow-unsafe-code / verifier.sandbox.allow_unsafe=true"
            )

    def start(self, program: Program, total_s: float | None = None) -> Run:
        """One program, ready for its tests; close it (context manager).  ``total_s``: another limit for all of them."""
        limits = self.limits if total_s is None else replace(self.limits, total_s=total_s)
        return Run(program, limits, self.level, self.landlock)


def expected_outputs(
    program: str,
    entry_point: str,
    inputs: Sequence[list[Any]],
    *,
    setup: str = "",
    limits: Limits | None = None,
    allow_unsafe: bool = False,
) -> list[Any | Failure]:
    """What a reference solution returns for each list of arguments; Failure where it returns nothing."""
    sandbox = Sandbox(limits or Limits(total_s=600.0, result_bytes=1 << 24), allow_unsafe)
    with sandbox.start(Program(program, "call", entry_point, setup)) as run:
        results = [run.test(arguments) for arguments in inputs]
    return [result.value if isinstance(result, Success) else result for result in results]
