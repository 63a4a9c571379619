"""One process that compares mathematical answers with math-verify; ``math_workers`` starts, feeds and kills it.

math-verify may hang or eat memory on an answer like 9^(9^9), inside one C call that no signal handler interrupts; so it
runs in a fork of this process, under limits, that the kernel's alarm ends.  The next fork takes over within milliseconds,
since math-verify is loaded already.  Requests and replies are JSON lines on the original stdin and stdout.
This module imports nothing heavy and nothing of the rest of the library.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import resource
import signal
import sys
from typing import Any, TextIO

MEMORY_BYTES = 1 << 30
"""Address space of one worker; an idle one takes about 65 MB."""
REPLACE_S = 0.1
"""Of a comparison's time: kept for ending it and starting the next fork."""
_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY, _TOO_DEEP = 3, 4
_FAILURES = {
    -signal.SIGALRM: "took longer than {:g} s",
    _OUT_OF_MEMORY: "out of memory",
    _TOO_DEEP: "nested too deeply",
}


def main() -> None:
    """``argv``: the parent's process id, the seconds one comparison may take, and "boxed" or "bare"."""
    parent, timeout_s, boxed = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "boxed"
    _die_with(parent)
    _limit()
    replies = _take_stdout()
    try:
        import math_verify

        math_verify.parse("\\boxed{\\frac{1}{2}}", parsing_timeout=0)  # compiles its grammars
    except (ImportError, MemoryError, RuntimeError) as error:
        _reply(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    _reply(replies, {"ready": True})
    me, status = os.getpid(), 1
    while status != 0:
        child = os.fork()
        if child == 0:
            _die_with(me)
            os._exit(_serve(replies, timeout_s, boxed))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            _reply(replies, {"failed": _FAILURES.get(status, f"died (status {status})").format(timeout_s)})


def _serve(replies: TextIO, timeout_s: float, boxed: bool) -> int:
    """Compare until the parent closes the pipe or is gone, or memory runs out; the exit status."""
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, max(timeout_s - REPLACE_S, timeout_s / 2))
        try:
            reply = compare(request["gold"], request["answer"], boxed)
        except (MemoryError, RecursionError) as error:
            return _OUT_OF_MEMORY if isinstance(error, MemoryError) else _TOO_DEEP
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, reply | {"job": request["job"]})
    return 0


def compare(gold: str, answer: str | None, boxed: bool = True) -> dict[str, Any]:
    """``gold_ok``: the gold is readable as mathematics; ``equal``: the answer equals it (None when none was asked)."""
    import math_verify

    expected = _parse(gold, boxed)
    gold_ok = any(not isinstance(item, str) for item in expected)
    if answer is None:
        return {"gold_ok": gold_ok, "equal": None}
    # The gold goes first: the comparison is not symmetric.
    equal = math_verify.verify(expected, _parse(answer, boxed), timeout_seconds=0)
    return {"gold_ok": gold_ok, "equal": equal}


@functools.lru_cache(maxsize=512)
def _parse(text: str, boxed: bool) -> list[Any]:
    """sympy object and string of an expression; only the string, or nothing, when it is not mathematics."""
    import math_verify

    return math_verify.parse(f"\\boxed{{{text}}}" if boxed else text, parsing_timeout=0)


def _die_with(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    cap = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    if sys.platform == "linux":  # other systems refuse or ignore it
        resource.setrlimit(resource.RLIMIT_AS, (cap, hard))


def _take_stdout() -> TextIO:
    """The reply channel; from here on everything else that prints goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _reply(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


if __name__ == "__main__":
    main()
