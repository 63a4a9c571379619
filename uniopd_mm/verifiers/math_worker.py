"""One process that compares mathematical answers with math-verify; ``math_workers`` starts, feeds and kills it.

math-verify may hang or eat memory on an answer like 9^(9^9), inside one C call that no signal handler interrupts; so it
runs here, under limits, where it can be killed.  Requests and replies are JSON lines on the original stdin and stdout.
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
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """``argv``: the parent's process id, the CPU seconds one comparison may take, and "boxed" or "bare"."""
    parent, cpu_s, boxed = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "boxed"
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
    for line in sys.stdin:  # ends when the parent closes the pipe or is gone
        request = json.loads(line)
        # A backstop for a worker whose parent is gone: past it the kernel ends the process, even inside a C call.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            reply = compare(request["gold"], request["answer"], boxed)
        except MemoryError:
            reply = {"error": "out of memory"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(replies, reply)


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
