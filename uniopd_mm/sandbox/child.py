"""The processes that run programs, test by test; started as ``python -I -S -B child.py`` with an empty environment.

Four processes: the *nursery* has common modules loaded and forks a launcher whenever our process sends it two pipes; the
*launcher* enters the namespaces and waits; the *supervisor* (process 1 of the namespace) speaks with our process over the
pipes, one JSON object per line, and keeps time; the *program* is forked from it, restricted, and has only a pipe to the
supervisor.  None of them is ever told what result is expected, and a test's input arrives only after the result of the test
before it was sent.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import isolation
from calls import refuse_calls
from values import decode, encode

del sys.path[0]

_COMMON = (
    "array bisect builtins cmath collections copy dataclasses datetime decimal enum fractions functools "
    "heapq io itertools json math operator queue random re statistics string threading time traceback "
    "typing"
)
"""Loaded once for all programs, most of which would import some of them for each test."""
_CLEAN_S = 5.0
_CHUNK = 1 << 16

Fields = dict[str, Any]


class Control:
    """The line to our process."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self.write_fd = read_fd, write_fd
        self.buffer = b""

    def receive(self) -> Fields | None:
        """The next object, or None when our process has closed the line."""
        while b"\n" not in self.buffer:
            data = os.read(self.read_fd, _CHUNK)
            if not data:
                return None
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def send(self, **fields: Any) -> None:
        data = json.dumps(fields).encode() + b"\n"
        while data:
            data = data[os.write(self.write_fd, data) :]


class Process:
    """The forked program: its id, the pipes to it, and what it has sent so far."""

    def __init__(self, pid: int, requests: int, replies: int, output: int | None) -> None:
        self.pid, self.requests, self.replies, self.output = pid, requests, replies, output
        self.pidfd = os.pidfd_open(pid)
        self.received = {fd: bytearray() for fd in (replies, output) if fd is not None}

    def close(self) -> None:
        for fd in (self.pidfd, self.requests, *self.received):
            if fd is not None:
                os.close(fd)


class Supervisor:
    """Runs requests of our process one after the other; a program that is gone is started again for the next one."""

    def __init__(self, control: Control, config: Fields, uid: int | None) -> None:
        self.control, self.config, self.uid = control, config, uid
        self.rules = self.find_rules()
        self.process: Process | None = None
        self.last: Process | None = None

    def serve(self) -> None:
        while (request := self.control.receive()) is not None:
            answer = self.stdin_test if self.config["style"] == "stdin" else self.call_test
            reply = answer(request)
            try:
                self.control.send(**reply)
            except RecursionError:  # nested more deeply than can be passed on
                self.control.send(kind="result", data="the result is nested too deeply")
        self.clean()

    def call_test(self, request: Fields) -> Fields:
        """One call in the running program."""
        process = self.process
        if process is None:
            process = self.process = self.start(None)
            answer = self.reply(process, request)
            if answer["kind"] != "loaded":
                self.clean()
                return answer
        self.write_request(process, request)
        answer = self.reply(process, request)
        if answer["kind"] not in ("value", "exception", "result"):
            self.clean()
        return answer

    def stdin_test(self, request: Fields) -> Fields:
        """The whole program in a process of its own, with a text to read and no files of the test before."""
        if self.config["level"] >= 2 and os.listdir(self.config["temp"]):
            isolation.renew_temp(self.config["temp"])
            self.rules = self.find_rules()
        text = os.memfd_create("stdin")
        with open(text, "wb", closefd=False) as file:
            file.write(request["input"].encode("utf-8", "surrogateescape"))
        os.lseek(text, 0, os.SEEK_SET)
        self.process = process = self.start(text)
        os.close(text)
        problem = self.wait(process, request, lambda: False)
        status = self.clean()
        if problem is not None:
            return problem
        self.drain(process, request["cap"])
        failed = _first_line(process.received[process.replies])
        if failed is not None:
            return failed
        if status != 0:
            return _ended(status)
        output = process.received.get(process.output, bytearray())  # type: ignore[arg-type]
        if len(output) > request["cap"]:
            return {"kind": "output"}
        return {"kind": "stdout", "data": output.decode("utf-8", "replace")}

    def find_rules(self) -> int | None:
        """What Landlock is to allow programs (file descriptor)."""
        config = self.config
        return isolation.landlock_rules(config["readable"], config["temp"]) if config["landlock"] else None

    def write_request(self, process: Process, request: Fields) -> None:
        """Hand the input to the program, which may be reading slowly or not at all."""
        data = json.dumps({"input": request["input"]}).encode() + b"\n"
        deadline = time.monotonic() + request["limit_s"]
        while data:
            _, writable, _ = select.select([], [process.requests], [], max(0, deadline - time.monotonic()))
            if not writable:
                return
            try:
                data = data[os.write(process.requests, data[:4096]) :]
            except BrokenPipeError:
                return

    def reply(self, process: Process, request: Fields) -> Fields:
        """The next line from the program, or why there is none."""
        received = process.received[process.replies]
        received.clear()
        problem = self.wait(process, request, lambda: b"\n" in received)
        if problem is not None:
            return problem
        self.drain(process, request["cap"])
        line = _first_line(received)
        if line is not None:
            return line
        status = self.clean()
        return _ended(status) if status else {"kind": "exit", "data": "the program ended early"}

    def wait(self, process: Process, request: Fields, done: Callable[[], bool]) -> Fields | None:
        """Read until ``done`` or the program's end; None, or a problem: over time, too much output."""
        deadline = time.monotonic() + request["limit_s"]
        poll = select.poll()
        for fd in (process.pidfd, *process.received):
            poll.register(fd, select.POLLIN)
        poll.register(self.control.read_fd, 0)  # only tells when our process is gone
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return {"kind": "timeout"}
            ready = [fd for fd, _ in poll.poll(left * 1000)]
            if self.control.read_fd in ready:
                self.clean()
                sys.exit(0)
            for fd in ready:
                if fd in process.received and not self.read(process, fd):
                    poll.unregister(fd)
                if fd in process.received and len(process.received[fd]) > request["cap"]:
                    return {"kind": "output"}
            if process.pidfd in ready:  # what is still in the pipes is drained later
                return None
        return None

    @staticmethod
    def read(process: Process, fd: int) -> bool:
        """Take what a pipe holds; False at its end."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return True
        process.received[fd] += data
        return bool(data)

    def drain(self, process: Process, cap: int) -> None:
        """What was still in the pipes when the program ended; whoever holds them open is not waited for."""
        for fd, received in process.received.items():
            while len(received) <= cap:
                size = len(received)
                if not self.read(process, fd) or len(received) == size:
                    break

    def start(self, text: int | None) -> Process:
        """Fork the program.  In the program's process this does not return."""
        if self.last is not None:
            self.last.close()
        requests, replies = os.pipe(), os.pipe()
        output = os.pipe() if text is not None else None
        pid = os.fork()
        if pid == 0:
            become_program(self, requests[0], replies[1], text, output[1] if output else None)
        for fd in (requests[0], replies[1], *(output[1:] if output else ())):
            os.close(fd)
        for fd in (requests[1], replies[0], *(output[:1] if output else ())):
            os.set_blocking(fd, False)
        self.last = Process(pid, requests[1], replies[0], output[0] if output else None)
        return self.last

    def clean(self) -> int:
        """End the program and all that it started; its wait status."""
        status, process = 0, self.process
        if process is None:
            return status
        if self.config["level"] < 2:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + _CLEAN_S
        alive = True
        while alive and time.monotonic() < deadline:
            self.kill_all(process)
            alive, found = self.reap(process)
            status = found if found is not None else status
            if alive:
                time.sleep(0.001)
        self.process = None
        return status

    def kill_all(self, process: Process) -> None:
        level = self.config["level"]
        with contextlib.suppress(ProcessLookupError):
            if level >= 2 and os.getpid() == 1:
                os.kill(-1, signal.SIGKILL)  # everything in this process namespace but ourselves
            elif level == 1:
                for pid in _children():
                    os.kill(pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)

    def reap(self, process: Process) -> tuple[bool, int | None]:
        """(whether children are left, the program's wait status if it was reaped now)."""
        status = None
        try:
            while True:
                pid, found = os.waitpid(process.pid if self.config["level"] == 0 else -1, os.WNOHANG)
                if pid == 0:
                    return True, status
                if pid == process.pid:
                    status = found
        except ChildProcessError:
            return False, status


def _children() -> Iterator[int]:
    """Ids of our direct children; those of a child that ends become ours."""
    us = str(os.getpid())
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit():
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    if file.read().rpartition(")")[2].split()[1] == us:
                        yield int(name)


def _first_line(received: bytearray) -> Fields | None:
    """The object on the first complete line of a program's replies; its content is the program's to choose."""
    line, newline, _ = bytes(received).partition(b"\n")
    if not newline:
        return None
    try:
        fields = json.loads(line)
        kind, data = fields["kind"], fields.get("data")
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        return {"kind": "result", "data": "the result cannot be read"}
    if kind not in ("loaded", "value", "exception", "result"):
        return {"kind": "result", "data": "the result cannot be read"}
    return {"kind": kind, "data": data}


def _ended(status: int) -> Fields:
    if os.WIFSIGNALED(status):
        return {"kind": "signal", "data": os.WTERMSIG(status)}
    return {"kind": "exit", "data": f"the program exited with status {os.waitstatus_to_exitcode(status)}"}


# -- the program's process ----------------------------------------------------------------------------------------------
class Finish(SystemExit):
    """Leaves the interpreter the ordinary way: threads are waited for, exit handlers run, then ``_leave``."""


def become_program(
    supervisor: Supervisor, requests: int, replies: int, text: int | None, output: int | None
) -> NoReturn:
    """Restrict this process and run the program in it."""
    config = supervisor.config
    os.setsid()
    if text is not None and output is not None:
        os.dup2(text, 0)
        os.dup2(output, 1)
    try:
        os.chdir(config["temp"])
        isolation.limit_resources(
            config["memory_bytes"], config["cpu_s"], config["file_bytes"], config["level"] < 2
        )
        isolation.die_with_parent()
        isolation.drop_privileges(supervisor.uid, supervisor.rules)
        with contextlib.nullcontext() if config["level"] == 3 else contextlib.suppress(OSError):
            refuse_calls()
    except BaseException:
        os._exit(1)
    requests, replies = _keep_only(requests, replies)
    if text is not None:
        _run_script(config, replies)
    _serve_calls(config, requests, replies)


def _keep_only(*fds: int) -> list[int]:
    """Close every file but the standard ones and ``fds``; their new numbers."""
    high = [os.dup2(fd, 40 + i) for i, fd in enumerate(sorted(fds))]
    numbers = dict(zip(sorted(fds), high, strict=True))
    os.closerange(3, 40)
    os.closerange(40 + len(fds), 1 << 16)
    return [numbers[fd] for fd in fds]


def _text(fd: int, mode: str) -> Any:
    return open(fd, mode, encoding="utf-8", errors="surrogateescape", closefd=False)


def _new_module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def _load(config: Fields, namespace: dict[str, Any]) -> None:
    for title, source in (("setup", config["setup"]), ("program", config["source"])):
        exec(compile(source, f"<{title}>", "exec", dont_inherit=True), namespace)


def _run_script(config: Fields, replies: int) -> NoReturn:
    """Style stdin: the program is a script."""
    sys.stdin = sys.__stdin__ = _text(0, "r")
    sys.stdout = sys.__stdout__ = _text(1, "w")
    sys.argv = ["program.py"]
    atexit.register(_leave)
    try:
        _load(config, _new_module("__main__"))
    except SystemExit:
        pass
    except BaseException as error:
        _send(replies, "exception", _name(error))
        os._exit(1)
    raise Finish(0)


def _leave() -> None:
    """Run after the program's threads and exit handlers; tearing the interpreter down would take longer than most programs."""
    try:
        for stream in (sys.stdout, sys.__stdout__):
            if stream is not None:
                stream.flush()
    except BaseException:  # a stream of the program's own, or a closed one
        os._exit(1)
    os._exit(0)


def _serve_calls(config: Fields, requests: int, replies: int) -> NoReturn:
    """Styles call and assert: load the program once, then evaluate one input at a time."""
    us, namespace = os.getpid(), _new_module("program")
    sys.stdin = _text(0, "r")
    evaluate = {"call": _call, "assert": _evaluate}[config["style"]]
    try:
        _load(config, namespace)
    except BaseException as error:
        _send(replies, "exception", _name(error))
        os._exit(1)
    _send(replies, "loaded", None)
    for line in _text(requests, "r"):
        given = decode(json.loads(line)["input"])
        try:
            kind, data = "value", evaluate(config, namespace, given)
        except BaseException as error:
            kind, data = "exception", _name(error)
        if os.getpid() != us:  # the program forked, and this is the copy
            os._exit(0)
        if kind == "value":
            try:
                data = encode(data)
            except (TypeError, RecursionError) as error:
                kind, data = "result", _name(error)
        _send(replies, kind, data)
    os._exit(0)


def _call(config: Fields, namespace: dict[str, Any], arguments: list[Any]) -> Any:
    name = config["entry_point"]
    owner = namespace.get("Solution")
    if name not in namespace and owner is not None:
        return getattr(owner(), name)(*arguments)
    if name not in namespace:
        raise NameError(f"the program defines no function '{name}'")
    return namespace[name](*arguments)


def _evaluate(config: Fields, namespace: dict[str, Any], given: list[str]) -> Any:
    """Run statements, then give the value of an expression (None without one)."""
    statements, expression = given
    exec(compile(statements, "<test>", "exec", dont_inherit=True), namespace)
    return eval(compile(expression, "<test>", "eval", dont_inherit=True), namespace) if expression else None


def _name(error: BaseException) -> str:
    """``ValueError: bad`` of an exception whose own methods may be hostile."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return type(error).__name__


def _send(replies: int, kind: str, data: Any) -> None:
    text = json.dumps({"kind": kind, "data": data}).encode() + b"\n"
    while text:
        text = text[os.write(replies, text) :]


# -- start --------------------------------------------------------------------------------------------------------------
def nursery() -> None:
    """Fork a launcher for each pair of pipes that comes in over standard input, until our process closes it."""
    line = socket.socket(fileno=os.dup(0))
    os.dup2(1, 0)
    for name in _COMMON.split():
        importlib.import_module(name)
    gc.freeze()  # collections in programs need not touch, and so copy, what is shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are not waited for
    while len(fds := socket.recv_fds(line, 1, 2, socket.MSG_CMSG_CLOEXEC)[1]) == 2:
        pid = os.fork()
        if pid == 0:
            line.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            launch(Control(*fds))
            os._exit(0)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(line, [b"+"], [pidfd])
        for fd in (pidfd, *fds):
            os.close(fd)


def launch(control: Control) -> None:
    """The launcher, and in its child the supervisor."""
    config = control.receive()
    if config is None:
        return
    uid = None
    try:
        isolation.go_first_when_memory_runs_out()
        if config["level"] >= 2:
            uid = isolation.enter_namespaces(config["readable"], config["hidden"], config["temp"])
            launcher_waits()
            isolation.die_with_parent()
        elif config["level"] == 1:
            isolation.adopt_orphans()
        isolation.forbid_tracing()
        supervisor = Supervisor(control, config, uid)
    except (OSError, AttributeError) as error:  # AttributeError: a C library without the call
        control.send(failed=str(error))
        return
    control.send(ready=True)
    with contextlib.suppress(BrokenPipeError):
        supervisor.serve()


def launcher_waits() -> None:
    """Fork; the child goes on as process 1 of the new namespace, the launcher ends with it."""
    pid = os.fork()
    if pid:
        os.closerange(0, 1 << 10)
        os.waitpid(pid, 0)
        os._exit(0)


if __name__ == "__main__":
    nursery()
