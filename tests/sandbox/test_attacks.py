"""No program is called correct without being it, and none leaves a process, a file or a hang behind."""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from pathlib import Path

import pytest
from attacks import CALLS as FUNCTIONS
from attacks import SCRIPTS as PROGRAMS
from system_attacks import KERNEL, LEFT_BY_A_TEST, OUTPUT, RESULTS
from watching import left_processes, temporary_folders

from uniopd_mm.config import SandboxConfig, VerifierConfig
from uniopd_mm.sandbox import detect, run
from uniopd_mm.verifiers.code import CodeTest, CodeTests, CodeVerifier

CALLS = FUNCTIONS | KERNEL | RESULTS
SCRIPTS = PROGRAMS | OUTPUT
LIMIT_S = 0.3
HANG_S = 1.0
COMPARES = ("evalplus", "livecodebench", "exact", "prime")


@pytest.fixture(scope="module")
def verifier() -> CodeVerifier:
    return CodeVerifier(VerifierConfig(sandbox=SandboxConfig(allow_unsafe=True, memory_mb=256)))


class Target:
    """What attacks aim at: a folder, the expected values in a file, sockets; and whether they hit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "outside"
        self.folder.mkdir()
        (self.folder / "kept").write_text("kept")
        self.folder.chmod(0o777)
        self.secret = folder / "secret.json"
        self.values = {str(x): secrets.randbits(60) for x in range(3)}
        self.secret.write_text(json.dumps(self.values))
        self.tcp, self.udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.tcp.bind(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.udp.bind(("127.0.0.1", self.port))
        self.abstract_name = f"uniopd-{secrets.token_hex(8)}"
        self.abstract.bind("\0" + self.abstract_name)
        # The path of a socket is short; bound relative to its folder.
        self.socket_path = f"/tmp/{secrets.token_hex(6)}"
        self.unix.bind(self.socket_path)
        for server in (self.tcp, self.unix, self.abstract):
            server.listen()
        for server in (self.tcp, self.udp, self.unix, self.abstract):
            server.setblocking(False)

    def aim(self, source: str) -> str:
        for name, value in (
            ("OUTSIDE/socket", self.socket_path),
            ("OUTSIDE", str(self.folder)),
            ("SECRET", str(self.secret)),
            ("CHECKOUT", run.__file__),
            ("PORT", str(self.port)),
            ("ABSTRACT", self.abstract_name),
        ):
            source = source.replace(name, value)
        return source

    def reached(self) -> list[str]:
        hits = []
        for name, take in (
            ("tcp", self.tcp.accept),
            ("unix", self.unix.accept),
            ("abstract", self.abstract.accept),
            ("udp", lambda: self.udp.recv(10)),
        ):
            try:
                take()
                hits.append(name)
            except BlockingIOError:
                pass
        if [p.name for p in self.folder.iterdir()] != ["kept"] or (
            self.folder / "kept"
        ).read_text() != "kept":
            hits.append("files")
        if Path("/dev/shm/left_by_a_program").exists():
            hits.append("shared memory")
        return hits

    def close(self) -> None:
        for server in (self.tcp, self.udp, self.unix, self.abstract):
            server.close()
        Path(self.socket_path).unlink()


@pytest.fixture
def target(tmp_path: Path):
    target = Target(tmp_path)
    yield target
    target.close()


def attack(verifier: CodeVerifier, tests: CodeTests, source: str, target: Target) -> None:
    before = temporary_folders()
    n_threads = threading.active_count()
    for last in (False, True):
        began = time.monotonic()
        correct, reason = verifier.judge(tests, target.aim(source))
        took_s = time.monotonic() - began
        assert correct is not True, reason
        if took_s < LIMIT_S + HANG_S or last:  # a machine that is busy gets a second chance
            break
    assert threading.active_count() == n_threads
    if detect().level < 2:
        return
    assert correct is False, reason
    assert took_s < LIMIT_S + HANG_S, reason
    assert not left_processes()
    assert temporary_folders() <= before
    assert target.reached() == []


@pytest.mark.parametrize("name", CALLS)
def test_a_function_that_cannot_know_the_result_is_incorrect(
    name: str, verifier: CodeVerifier, target: Target
) -> None:
    compare = COMPARES[list(CALLS).index(name) % len(COMPARES)]
    tests = tuple(CodeTest([int(x)], value) for x, value in target.values.items())
    attack(verifier, CodeTests("call", tests, compare, "f", time_limit_s=LIMIT_S), CALLS[name], target)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_cannot_know_the_output_is_incorrect(
    name: str, verifier: CodeVerifier, target: Target
) -> None:
    compare = COMPARES[list(SCRIPTS).index(name) % len(COMPARES)]
    tests = tuple(CodeTest(f"{x}\n", f"{value}\n") for x, value in target.values.items())
    attack(verifier, CodeTests("stdin", tests, compare, time_limit_s=LIMIT_S), SCRIPTS[name], target)


@pytest.mark.skipif(detect().level < 2, reason=detect().describe())
@pytest.mark.parametrize("what", LEFT_BY_A_TEST)
def test_a_test_of_a_script_finds_nothing_of_the_test_before(what: str, verifier: CodeVerifier) -> None:
    tests = CodeTests("stdin", (CodeTest("", "clean"),) * 3, time_limit_s=2.0)
    assert verifier.judge(tests, LEFT_BY_A_TEST[what]) == (True, "passed 3 tests")
    assert not left_processes()


@pytest.mark.parametrize("compare", COMPARES)
@pytest.mark.parametrize(
    "name", ["equals", "subclass_of_int", "subclass_of_list", "nested", "fake_type", "nan"]
)
def test_no_comparison_asks_the_result_whether_it_is_equal(
    name: str, compare: str, verifier: CodeVerifier
) -> None:
    for expected in ([12345], 0.5):
        tests = CodeTests("call", (CodeTest([1], expected),), compare, "f")
        assert verifier.judge(tests, CALLS[name])[0] is False


@pytest.mark.parametrize(
    "name", ["equals", "frames", "garbage", "patch_runner", "patch_json", "exit", "os_exit"]
)
def test_assert_statements_do_not_tell_the_program_their_value(name: str, verifier: CodeVerifier) -> None:
    value = secrets.randbits(60)
    tests = CodeTests("assert", (CodeTest(f"assert f(1) == {value}"), CodeTest(f"assert {value} == f(2)")))
    assert verifier.judge(tests, CALLS[name])[0] is False


@pytest.mark.parametrize("code", ["assert eq(f(1), 5)", "assert (f(1) == 5) is True", "assert {f(1): 1}[5]",
                                  "assert isinstance(f(1), int)", "for x in [1]:\n    assert f(x) == 5"])  # fmt: skip
def test_a_check_that_the_program_could_forge_proves_nothing(code: str, verifier: CodeVerifier) -> None:
    forger = "import builtins\nbuiltins.isinstance = lambda *a: True\ndef eq(a, b): return True\nclass Y(int):\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 5\ndef f(x): return Y(5)"
    tests = CodeTests("assert", (CodeTest(code),))
    assert verifier.judge(tests, forger)[0] is not True


def test_the_process_table_and_files_of_the_machine_are_not_seen(verifier: CodeVerifier) -> None:
    if verifier.sandbox.level < 2:
        pytest.skip(detect().describe())
    from uniopd_mm.sandbox import Program, Success

    source = """
import os
def f():
    def look(path):
        try: return sorted(os.listdir(path))
        except OSError: return []
    return [os.getpid() < 10, look("/proc"), look("/etc"), look("/home"), look("."), dict(os.environ)]
"""
    with verifier.sandbox.start(Program(source, entry_point="f")) as program:
        result = program.test([])
    assert isinstance(result, Success), result
    few, proc, etc, home, here, environment = result.value
    assert few and not proc and not set(etc) - {"ld.so.cache"} and not home and not here
    assert not set(environment) - {"LC_CTYPE"}
