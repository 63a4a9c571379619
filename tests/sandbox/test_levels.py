"""What each level promises, for root and for an ordinary user, and that too little isolation is refused."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import attacks
import pytest
from watching import left_processes, temporary_folders

from uniopd_mm.config import SandboxConfig, VerifierConfig
from uniopd_mm.sandbox import (
    Failure,
    Limits,
    Program,
    Sandbox,
    SandboxError,
    Success,
    describe,
    detect,
    isolation,
    levels,
)
from uniopd_mm.verifiers import VerifierError, get_verifier

REPOSITORY = Path(levels.__file__).parents[2]
needs_2 = pytest.mark.skipif(detect().level < 2, reason=detect().describe())


def run(source: str, level: int, *arguments: object) -> Success | Failure:
    sandbox = Sandbox(Limits(time_s=0.4), allow_unsafe=True, level=level)
    with sandbox.start(Program(source, entry_point="f")) as program:
        return program.test(list(arguments))


def test_the_level_is_one_line() -> None:
    assert re.fullmatch(r"code sandbox: level [0-3] of 3, .+", describe())
    assert f"level {detect().level} " in describe()


@pytest.mark.parametrize("level", range(4))
def test_a_right_program_passes_at_every_level(level: int) -> None:
    assert run("def f(a, b): return a + b", min(level, detect().level), 2, 3) == Success(5)


def test_less_than_level_2_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SandboxError, match="--allow-unsafe-code") as refused:
        Sandbox(level=1)
    for words in (
        "verifier.sandbox.allow_unsafe=true",
        "seccomp=unconfined",
        "sysctl -w user.max_user_namespaces",
    ):
        assert words in str(refused.value)
    monkeypatch.setattr(levels, "_found", levels.Isolation(1, False, {2: "unshare: Operation not permitted"}))
    assert "UNSAFE" in describe() and "unshare: Operation not permitted" in describe()
    with pytest.raises(VerifierError, match="--allow-unsafe-code"):
        get_verifier("code")
    assert get_verifier("code", VerifierConfig(sandbox=SandboxConfig(allow_unsafe=True))).sandbox.level == 1


def test_a_reason_that_is_the_same_for_two_levels_is_told_once() -> None:
    line = levels.Isolation(1, False, {3: "unshare: no", 2: "unshare: no"}).describe()
    assert line.endswith("; no level 2 or 3: unshare: no")


def test_without_a_place_for_temporary_files_the_lower_levels_do_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nowhere(**_: object) -> str:
        raise FileNotFoundError("No usable temporary directory")

    monkeypatch.setattr("tempfile.mkdtemp", nowhere)
    assert "temporary directory" in str(run("def f(): return 1", 1))
    if detect().level >= 2:
        assert run("def f(): return 1", detect().level) == Success(1)


def test_a_nursery_that_was_killed_is_replaced() -> None:
    from uniopd_mm.sandbox.nursery import NURSERY

    assert run("def f(): return 1", 3) == Success(1)
    assert NURSERY._process is not None
    for end in (NURSERY._process.kill, NURSERY.close):
        end()
        assert run("def f(): return 1", 3) == Success(1)


def test_a_program_goes_on_when_its_nursery_ends() -> None:
    from uniopd_mm.sandbox.nursery import NURSERY

    with Sandbox(allow_unsafe=True).start(Program("def f(x): return x", entry_point="f")) as program:
        NURSERY.close()
        assert program.test([1]) == Success(1)
    assert not left_processes()


def test_a_copy_of_our_process_starts_its_own_nursery() -> None:
    script = (
        "import os\nfrom uniopd_mm.sandbox import *\n"
        "def f(): return Sandbox(allow_unsafe=True).start(Program('def f(x): return x', entry_point='f'))\n"
        "with f() as a:\n    pid = os.fork()\n"
        "    if pid == 0:\n        with f() as b: os._exit(0 if b.test([2]) == Success(2) else 1)\n"
        "    assert os.waitpid(pid, 0)[1] == 0 and a.test([1]) == Success(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


REFUSED = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def f(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return result if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""


@needs_2
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86_64")
@pytest.mark.parametrize(
    "call",
    [(101, 0), (250, 0, -3, 1), (248, 0, 0, 0, 0, -4), (29, 7, 4096, 0o1600), (272, 0x10000000), (425, 8, 0), (323, 1),
     (321, 5, 0, 0), (135, 0xFFFFFFFF), (56, 0x10000011, 0, 0, 0, 0), (56, 0x20011, 0, 0, 0, 0), (41, 40, 1, 0),
     (41, 38, 5, 0), (0x40000000 + 39,)],
    ids=["ptrace", "keyctl", "add_key", "shmget", "unshare", "io_uring", "userfaultfd", "bpf", "personality", "clone_user", "clone_mount", "vsock", "alg", "x32"],
)  # fmt: skip
def test_calls_that_no_right_program_needs_are_refused(call: tuple[int, ...]) -> None:
    assert run(REFUSED, detect().level, *call) == Success("EPERM")


@needs_2
def test_a_newer_clone_is_said_not_to_exist_so_that_the_older_is_used() -> None:
    if os.uname().machine == "x86_64":
        assert run(REFUSED, detect().level, 435, 0, 0) == Success("ENOSYS")
    source = "import os, socket, threading\ndef f():\n    t = threading.Thread(target=print); t.start(); t.join()\n"
    source += "    if os.fork() == 0: os._exit(7)\n    s = socket.socketpair(); s[0].send(b'x')\n"
    source += "    return [os.waitstatus_to_exitcode(os.wait()[1]), s[1].recv(1)]"
    assert run(source, detect().level) == Success([7, b"x"])


def test_a_program_has_no_open_files_but_its_own() -> None:
    source = "import fcntl\ndef f():\n    out = []\n    for fd in range(1024):\n"
    source += (
        "        try: fcntl.fcntl(fd, 1); out.append(fd)\n        except OSError: pass\n    return len(out)"
    )
    for level in range(detect().level + 1):
        assert run(source, level) == Success(5)  # three standard ones, its questions and its answers


def test_a_program_has_no_capabilities_at_any_level() -> None:
    source = "import ctypes\ndef f():\n    l = ctypes.CDLL(None); d = (ctypes.c_uint32 * 6)()\n"
    source += "    return [l.capget((ctypes.c_uint32 * 2)(0x20080522, 0), d), list(d)]"
    for level in range(detect().level + 1):
        assert run(source, level) == Success([0, [0] * 6])


def test_a_sandbox_that_does_not_start_gives_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from uniopd_mm.sandbox import nursery
    from uniopd_mm.verifiers.code import CodeTest, CodeTests

    verifier = get_verifier("code", VerifierConfig(sandbox=SandboxConfig(allow_unsafe=True)))
    nursery.NURSERY.close()
    monkeypatch.setattr(nursery, "_CHILD", "/nowhere/child.py")
    correct, reason = verifier.judge(
        CodeTests("call", (CodeTest([1], 1),), entry_point="f"), "def f(x): return x"
    )
    assert correct is None and "did not start" in reason


@needs_2
def test_a_supervisor_that_is_killed_from_outside_gives_unknown() -> None:
    with Sandbox().start(Program("def f(x): return x", entry_point="f")) as program:
        assert program.test([1]) == Success(1)
        signal.pidfd_send_signal(program._pidfd, signal.SIGKILL)
        assert program._ended(5)  # by then its children have been told
        result = program.test([2])
    assert isinstance(result, Failure) and result.kind == "unknown"
    assert not left_processes()


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("name", ["LOOP", "STOP_ITSELF", "LOCKED_FOLDER", "KILL_PARENT", "FORK_TWICE_RETURN"])
def test_lower_levels_clean_up_as_well(level: int, name: str) -> None:
    before = temporary_folders()
    run(getattr(attacks, name), level, 1)
    assert not left_processes()
    assert temporary_folders() <= before


def test_level_1_ends_what_left_its_session() -> None:
    assert run(attacks.DAEMON, 1, 1) == Success(1)
    assert not left_processes()


@pytest.mark.skipif(not detect().landlock, reason="no Landlock")
@pytest.mark.parametrize("name", ["WRITE", "PASSWD", "TCP", "KILL_PARENT", "DEV_SHM"])
def test_landlock_alone_keeps_files_tcp_and_other_processes_away(name: str, tmp_path: Path) -> None:
    if name in ("TCP", "KILL_PARENT") and isolation.landlock_abi() < 6:
        pytest.skip("an older Landlock")
    source = getattr(attacks, name).replace("OUTSIDE", str(tmp_path)).replace("PORT", "9")
    result = run(source, 1, 1)
    assert isinstance(result, Failure) and "PermissionError" in str(result)
    assert not list(tmp_path.iterdir())


@needs_2
@pytest.mark.parametrize(
    ("name", "why"),
    [("WRITE", "No such file"), ("PASSWD", "No such file"), ("TCP", "unreachable"), ("UDP", "unreachable")],
)
def test_namespaces_alone_keep_files_and_the_network_away(name: str, why: str, tmp_path: Path) -> None:
    source = getattr(attacks, name).replace("OUTSIDE", str(tmp_path)).replace("PORT", "9")
    assert why in str(run(source, 2, 1))


@needs_2
def test_programs_end_when_our_process_is_killed() -> None:
    script = (
        "from uniopd_mm.sandbox import *\n"
        "with Sandbox(Limits(time_s=60)).start(Program('def f(): print()\\n' 'while True: pass', entry_point='f')) as p:\n"
        "    print(open(f'/proc/self/fdinfo/{p._pidfd}').read().split('Pid:')[1].split()[0], flush=True)\n"
        "    p.test([])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None
    launcher = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{launcher}") and time.monotonic() < deadline:
        state = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "ZX":  # ended; whoever adopted it has not looked yet
            break
        time.sleep(0.02)
    else:
        assert not os.path.exists(f"/proc/{launcher}")


@needs_2
def test_an_ordinary_user_gets_the_same_isolation(tmp_path: Path) -> None:
    """As root: the attacks once more as a user without rights, with the system's Python."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None or python is None:
        pytest.skip("needs root, setpriv and a Python for all users")
    user = [setpriv, "--reuid", "65534", "--regid", "65534", "--clear-groups", python, "-c"]
    script = f"""
import sys
sys.path[:0] = [{str(REPOSITORY)!r}, {str(Path(attacks.__file__).parent)!r}]
import attacks
from watching import left_processes
from uniopd_mm.sandbox import *
print(detect().level, describe())
sandbox = Sandbox(Limits(time_s=0.4), allow_unsafe=True)
for name in ("WRITE", "DAEMON", "FORK_BOMB", "TCP", "UDP", "PASSWD", "KILL_PARENT", "KILL_ALL", "PTRACE", "STOP_PARENT"):
    with sandbox.start(Program(getattr(attacks, name).replace("PORT", "9").replace("OUTSIDE", "/var/tmp"), entry_point="f")) as program:
        print(name, program.test([1]))
with sandbox.start(Program("def f(x): return x + 1", entry_point="f")) as program:
    print("CONTROL", program.test([1]))
print("LEFT", left_processes())
"""
    if subprocess.run(
        [*user, "import sys; assert sys.version_info >= (3, 11)"], stderr=subprocess.DEVNULL
    ).returncode:
        pytest.skip("no Python >= 3.11 for all users")
    done = subprocess.run([*user, script], capture_output=True, text=True, cwd="/")
    if "PermissionError" in done.stderr or "No module named 'uniopd_mm'" in done.stderr:
        pytest.skip("the checkout cannot be read by all users")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["CONTROL"] == "Success(value=2)", done.stdout
    assert lines["LEFT"] == "{}"
    if not done.stdout.startswith(("2", "3")):
        pytest.skip(done.stdout.splitlines()[0])
    for name, why in {
        "WRITE": "No such file",
        "FORK_BOMB": "took longer",
        "TCP": "Permission denied|unreachable",
        "UDP": "unreachable",
        "PASSWD": "No such file",
        "KILL_PARENT": "not permitted|value=None",
        "KILL_ALL": "No such process|ended",
        "PTRACE": r"\[-1, -1, -1\]",
        "STOP_PARENT": "not permitted|took longer",
    }.items():
        assert re.search(why, lines[name]), (name, lines[name])
