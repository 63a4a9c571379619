"""Right programs pass, whatever ordinary means they use, and wrong ones are told apart with a reason."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from uniopd_mm.config import SandboxConfig, VerifierConfig
from uniopd_mm.rollout import Prompt
from uniopd_mm.sandbox import Failure, Limits, expected_outputs
from uniopd_mm.verifiers import VerifierPool, get_verifier, verifier_names
from uniopd_mm.verifiers.code import CodeTest, CodeTests, CodeVerifier, extract_code

CONFIG = VerifierConfig(workers=2, sandbox=SandboxConfig(allow_unsafe=True))
FIXTURE = Path(__file__).parents[1] / "fixtures" / "metric_cases.jsonl"


@pytest.fixture(scope="module")
def verifier() -> CodeVerifier:
    return CodeVerifier(CONFIG)


def prompt(tests: CodeTests) -> Prompt:
    return Prompt("p", (), answer=tests.to_json(), verifier="code")


def fenced(code: str) -> str:
    return f"Here it is.\n```python\n{code}\n```\n"


RIGHT_CALLS: dict[str, tuple[str, list[Any], Any]] = {
    "plain": ("def f(a, b): return a + b", [1, 2], 3),
    "method": ("class Solution:\n    def f(self, a): return a * 2", [3], 6),
    "imports": ("from collections import *\nimport heapq, bisect, itertools, functools, re, math, random, decimal\ndef f(a): return sorted(Counter(a).items())", ["aab"], [("a", 2), ("b", 1)]),
    "counter": ("from collections import Counter\ndef f(a): return Counter(a)", ["aab"], {"a": 2, "b": 1}),
    "dataclass": ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(a): return P(a).x", [4], 4),
    "long_integer": ("def f(n): return 3 ** n", [20000], 3**20000),
    "recursion": ("import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)", [50000], 50000),
    "cached_recursion": ("import sys, functools\nsys.setrecursionlimit(10**6)\n@functools.cache\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)", [20000], 20000),
    "threads": ("import threading\ndef f(n):\n    out = []\n    ts = [threading.Thread(target=out.append, args=(i,)) for i in range(n)]\n    [t.start() for t in ts]; [t.join() for t in ts]\n    return sorted(out)", [8], list(range(8))),
    "big_stack_thread": ("import threading, sys\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\ndef g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(n):\n    out = []\n    t = threading.Thread(target=lambda: out.append(g(n)))\n    t.start(); t.join()\n    return out[0]", [30000], 30000),
    "prints_much": ("def f(n):\n    for i in range(n): print('x' * 1000)\n    return n", [3000], 3000),
    "own_main": ("def f(a): return a\nif __name__ == '__main__':\n    print(f(int(input())))", [1], 1),
    "temporary_file": ("def f(t):\n    with open('x.txt', 'w') as file: file.write(t)\n    return open('x.txt').read()", ["hello"], "hello"),
    "bytes_and_sets": ("def f(): return (b'\\x00\\xff', {1, 2}, frozenset([3]), 1j, None, -0.0)", [], (b"\x00\xff", {1, 2}, frozenset([3]), 1j, None, -0.0)),
    "not_finite": ("def f(): return [float('inf'), -float('inf'), float('nan')]", [], [float("inf"), -float("inf"), float("nan")]),
    "surrogates": ("def f(t): return t + chr(0xd800)", ["ä\x00"], "ä\x00\ud800"),
    "catches_everything": ("def f():\n    try: raise KeyboardInterrupt\n    except BaseException: return 'ok'", [], "ok"),
    "long_result": ("def f(n): return list(range(n))", [50000], list(range(50000))),
    "long_argument": ("def f(a): return sum(a)", [list(range(200000))], sum(range(200000))),
    "dict_keys": ("def f(d): return {k: v + 1 for k, v in d.items()}", [{1: 2, (3, 4): 5}], {1: 3, (3, 4): 6}),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT_CALLS)
def test_a_right_function_is_correct(name: str, verifier: CodeVerifier) -> None:
    code, arguments, expected = RIGHT_CALLS[name]
    tests = CodeTests("call", (CodeTest(arguments, expected),) * 2, "exact", "f")
    if name == "counter":
        expected_type = verifier.judge(tests, code)
        assert expected_type == (True, "passed 2 tests")
    outcome = verifier.verify(prompt(tests), fenced(code))
    assert outcome.correct is True and outcome.score == 1.0, outcome.reason
    assert outcome.extracted == code[:2000]


RIGHT_SCRIPTS = {
    "input": "print(sum(map(int, input().split())))",
    "read": "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
    "buffer": "import sys\nprint(sum(map(int, sys.stdin.buffer.readline().split())))",
    "file_0": "print(sum(map(int, open(0).read().split())))",
    "descriptor": "import os\nos.write(1, b'%d\\n' % sum(map(int, os.read(0, 1000).split())))",
    "main": "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
    "exit": "import sys\nprint(sum(map(int, input().split())))\nsys.exit(0)",
    "quick_exit": "import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)",
    "no_newline": "import sys\nsys.stdout.write(str(sum(map(int, input().split()))))",
    "thread": "import threading\nt = threading.Thread(target=lambda: print(sum(map(int, input().split()))))\nt.start()",
    "exit_handler": "import atexit, io, os, sys\nsys.stdout = io.StringIO()\natexit.register(lambda: os.write(1, sys.stdout.getvalue().encode()))\nprint(sum(map(int, input().split())))",
    "iterator": "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))",
    "replaced_input": "import sys\ninput = sys.stdin.readline\nprint(sum(map(int, input().split())))",
}


@pytest.mark.parametrize("name", RIGHT_SCRIPTS)
def test_a_right_script_is_correct(name: str, verifier: CodeVerifier) -> None:
    tests = CodeTests("stdin", (CodeTest("1 2 3\n", "6\n"), CodeTest("10 20", "30")), "livecodebench")
    outcome = verifier.verify(prompt(tests), fenced(RIGHT_SCRIPTS[name]))
    assert outcome.correct is True, outcome.reason


def test_modules_that_a_judge_imports_need_no_import(verifier: CodeVerifier) -> None:
    script = (
        "a = list(map(int, stdin.readline().split()))\nprint(pow(a[0], 2, 7), Counter(a)[a[0]], sqrt(4), inf)"
    )
    tests = CodeTests.from_input_output({"inputs": ["3 3"], "outputs": ["2 2 2.0 inf"]})
    assert verifier.judge(tests, script) == (True, "passed 1 tests")
    method = "class Solution:\n    def f(self, a: List[int]) -> Optional[int]:\n        return heappop(a)"
    tests = CodeTests.from_input_output({"inputs": ["[1, 2]"], "outputs": ["1"], "fn_name": "f"})
    assert verifier.judge(tests, method) == (True, "passed 1 tests")


def test_each_run_of_a_script_is_new(verifier: CodeVerifier) -> None:
    code = "import sys, builtins\nn = getattr(sys, 'n', 0) + getattr(builtins, 'n', 0)\nsys.n = builtins.n = 1\nprint(n)"
    tests = CodeTests("stdin", (CodeTest("", "0"),) * 3)
    assert verifier.judge(tests, code) == (True, "passed 3 tests")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def f(x): return x", "test 2 of 3: expected 4, found 2"),
        ("def f(x): raise ValueError('no')", "test 1 of 3: ValueError: no"),
        ("def f(x):\n    while x: pass\n    return 0", "test 2 of 3: took longer than 0.3 s"),
        ("def f(x): return bytearray(8 << 30)", "out of memory"),
        ("import os\ndef f(x): os.kill(os.getpid(), 11)", "ended by signal 11"),
        ("import numpy\ndef f(x): return 0", "ModuleNotFoundError"),
        ("def g(x): return 0", "the program defines no function 'f'"),
        ("def f(", "SyntaxError"),
    ],
)
def test_a_wrong_program_is_incorrect_and_the_reason_says_why(
    code: str, reason: str, verifier: CodeVerifier
) -> None:
    tests = CodeTests(
        "call", (CodeTest([0], 0), CodeTest([2], 4), CodeTest([3], 9)), entry_point="f", time_limit_s=0.3
    )
    correct, found = verifier.judge(tests, code)
    assert correct is False and reason in found


def test_all_tests_together_have_a_limit() -> None:
    verifier = CodeVerifier(
        VerifierConfig(sandbox=SandboxConfig(allow_unsafe=True, time_limit_s=10, total_limit_s=1))
    )
    tests = CodeTests("call", tuple(CodeTest([x], x) for x in range(10)), entry_point="f")
    began = time.monotonic()
    correct, _ = verifier.judge(tests, "import time\ndef f(x):\n    time.sleep(0.4)\n    return x")
    assert correct is False and time.monotonic() - began < 3


ASSERTS = [
    ("assert f(3) == [3]", True),
    ("assert [3] == f(3)", True),
    ("assert f(3) == [3] and f(4) == [4]", True),
    ("x = f(3)\nassert x == [3]", True),
    ("assert sorted(f(3)) == [3]", True),
    ("assert f(3)[0] == 3", True),
    ("assert f(3)", True),
    ("assert not f(3)", False),
    ("assert f(3) == [4]", False),
    ("assert f(3) is None", False),
    ("import math\nassert math.isclose(f(3)[0], 3.0000000001)", True),
    ("assert abs(f(3)[0] - 3.5) < 1e-6", False),
    ("assert abs(3.0 - f(3)[0]) <= 1e-6", True),
    ("assert isinstance(f(3), list)", None),
    ("assert isinstance(f(3), dict)", False),
    ("for x in (1, 2):\n    assert f(x) == [x]", None),
]


@pytest.mark.parametrize(("code", "correct"), ASSERTS)
def test_assert_statements(code: str, correct: bool | None, verifier: CodeVerifier) -> None:
    tests = CodeTests("assert", (CodeTest(code),))
    assert verifier.judge(tests, "def f(x): return [x]")[0] is correct
    if correct is None:  # the other profiles reproduce other judges, which believe the program
        assert CodeVerifier(CONFIG, "evalplus").judge(tests, "def f(x): return [x]")[0] is True


def test_expected_outputs_of_a_reference_solution() -> None:
    found = expected_outputs(
        "import math\ndef f(x, y): return (x / y, math.pi)",
        "f",
        [[1, 2], [1, 0], [3, 2]],
        limits=Limits(time_s=5),
        allow_unsafe=True,
    )
    assert found[0] == (0.5, 3.141592653589793) and found[2][0] == 1.5
    assert isinstance(found[1], Failure) and "ZeroDivisionError" in str(found[1])


def test_a_reference_solution_that_runs_too_long_loses_only_that_output() -> None:
    code = "def f(x):\n    while x == 1: pass\n    return x"
    found = expected_outputs(code, "f", [[0], [1], [2]], limits=Limits(time_s=0.3), allow_unsafe=True)
    assert found[0] == 0 and isinstance(found[1], Failure) and found[2] == 2


def test_programs_are_judged_side_by_side_and_in_order() -> None:
    tests = CodeTests("call", (CodeTest([1], 1),), entry_point="f")
    right, slow = (
        fenced("def f(x): return x"),
        fenced("import time\ndef f(x):\n    time.sleep(1)\n    return x"),
    )
    with VerifierPool(CONFIG) as pool:
        began = time.monotonic()
        outcomes = pool.check([(prompt(tests), text) for text in (slow, slow, right, "no code")])
        took_s = time.monotonic() - began
    assert [outcome.correct for outcome in outcomes] == [True, True, True, False]
    assert took_s < 1.9


def test_the_overhead_of_a_program_is_small(verifier: CodeVerifier) -> None:
    tests = CodeTests("call", (CodeTest([1], 1),) * 10, entry_point="f")
    times = []
    for _ in range(8):
        began = time.monotonic()
        assert verifier.judge(tests, "def f(x): return x")[0]
        times.append(time.monotonic() - began)
    assert min(times) < 0.15, times


@pytest.mark.parametrize("answer", [None, "", "7", "{}", '{"style": "call", "tests": []}', ["a", "b"]])
def test_tests_that_cannot_be_read_are_unknown_not_incorrect(answer: Any, verifier: CodeVerifier) -> None:
    row = Prompt("p", (), answer=answer)
    assert verifier.check_gold(row)
    assert verifier.verify(row, fenced("x = 1")).correct is None


def test_the_verifier_is_found_by_name() -> None:
    assert {"code", "code:strict", "code:evalplus", "code:livecodebench", "code:prime"} <= set(
        verifier_names()
    )
    assert get_verifier("code:prime", CONFIG).profile == "prime"


# What the upstream judges say of an attack is not what ours says.
FOOLED = ("frame", "AlwaysEqual", "__eq__", "subclass", "os._exit", "write", "print")
CASES = [
    case
    for line in FIXTURE.read_text().splitlines()
    if (case := json.loads(line))["metric"].startswith("code_")
]


@pytest.mark.parametrize("case", CASES, ids=[f"{c['metric']}-{c.get('note', '')}" for c in CASES])
def test_cases_of_the_benchmarks_own_judges(case: dict[str, Any]) -> None:
    kind, prediction, reference = case["metric"], case["prediction"], case["reference"]
    if kind == "code_lcb_extract":
        assert (extract_code(prediction, "livecodebench") or "") == case["expected"]
        return
    settings: dict[str, Any] = {"time_limit_s": 1.0}
    if kind == "code_evalplus_status":
        profile, code = "evalplus", prediction
        pairs = zip(reference["inputs"], reference["expected"], strict=True)
        tests = CodeTests(
            "call", tuple(CodeTest(*p) for p in pairs), "evalplus", reference["entry"], **settings
        )
    elif kind == "code_lcb_all_pass":
        profile, code = "livecodebench", f"```\n{prediction}\n```"
        tests = CodeTests.from_input_output(reference, **settings)
    else:
        profile, code = "prime", prediction
        tests = CodeTests.from_input_output(reference, compare="prime", **settings)
    outcome = CodeVerifier(CONFIG, profile).verify(prompt(tests), code)
    attack = any(word in case["note"] for word in FOOLED)
    wanted = False if attack else case["expected"] in ("pass", 1.0)
    assert outcome.correct is wanted, outcome.reason


def test_a_problem_may_have_its_own_limit_for_all_tests() -> None:
    slow = "import time\ndef f(x):\n    time.sleep(0.4)\n    return x"
    tests = [CodeTest([i], i) for i in range(3)]
    for total_s, correct in ((0.5, False), (20.0, True)):
        problem = CodeTests("call", tuple(tests), entry_point="f", total_limit_s=total_s)
        outcome, reason = CodeVerifier(CONFIG).judge(problem, slow)
        assert outcome is correct, reason
