"""The math verifier and its worker processes: right answers, bombs, crashes, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uniopd_mm.config import VerifierConfig
from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers import VerifierError, get_verifier
from uniopd_mm.verifiers.math import MathVerifier, compare_plain, tidy
from uniopd_mm.verifiers.math_worker import MEMORY_BYTES
from uniopd_mm.verifiers.math_workers import MathWorkers

BOMBS = ["9^{9^{9}}", "10^{10^{10}}"]


def ask(answer) -> Prompt:
    return Prompt("row", ({"role": "user", "content": "q"},), answer=answer)


def make(workers: int = 1, timeout_s: float = 20.0) -> MathVerifier:
    verifier = get_verifier("math", VerifierConfig(workers=workers, timeout_s=timeout_s))
    assert isinstance(verifier, MathVerifier)
    return verifier


@pytest.fixture(scope="module")
def verifier():
    verifier = make()
    yield verifier
    verifier.close()


def gone(pid: int, within_s: float = 10.0) -> bool:
    """The process has ended (a zombie that nobody reaped counts)."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("gold", "text", "correct"),
    [
        ("7", "\\boxed{7}", True),
        ("7", "\\boxed{07}", True),
        ("7", "\\boxed{8}", False),
        ("7", "no box", False),
        ("\\frac{1}{2}", "\\boxed{0.5}", True),
        ("$\\frac12$", "\\boxed{\\dfrac{1}{2}}", True),
        ("\\boxed{\\sqrt{8}}", "\\boxed{2\\sqrt{2}}", True),
        ("x^2", "The answer is $x²$.", True),
        ("1000", "\\boxed{1\\,000}", True),
        ("103", "\\boxed{1.03e2}", True),
        ("12", "\\boxed{12\\text{ cm}}", True),
        ("1,2", "\\boxed{2,1}", True),
        ("(1,2)", "\\boxed{(2,1)}", False),
        ("\\text{Monday}", "\\boxed{Monday}", True),
        (["1", "2"], "\\boxed{2}", True),
        (["1", "2"], "\\boxed{3}", False),
    ],
)
def test_answers_are_compared_as_mathematics(verifier, gold, text, correct):
    assert verifier.verify(ask(gold), text).correct is correct


def test_a_gold_that_is_not_mathematics_is_unknown_and_the_check_says_so(verifier):
    outcome = verifier.verify(ask("≤≤"), "\\boxed{3}")
    assert outcome.correct is None and "not readable" in outcome.reason
    found = verifier.check_golds([ask("≤≤"), ask("\\frac{1}{2}"), ask("7"), ask("")])
    assert "not readable" in (found[0] or "")
    assert found[1:] == [None, None, "no gold answer"]


def test_an_answer_of_thousands_of_characters_is_incorrect_without_a_look(verifier):
    outcome = verifier.verify(ask("7"), "\\boxed{" + "7+" * 5000 + "7}")
    assert outcome.correct is False and "2000 characters" in outcome.reason
    assert len(outcome.extracted or "") == 2000


def test_plain_numbers_and_equal_strings_need_no_process():
    verifier = make()
    pairs = [
        ("7", "\\boxed{7}"),
        ("7", "Answer: 3"),
        ("12.5", "\\boxed{12.50}"),
        ("x+1", "\\boxed{x+1}"),
        ("7", "?"),
    ]
    outcomes = verifier.verify_many([(ask(gold), text) for gold, text in pairs])
    assert [outcome.correct for outcome in outcomes] == [True, False, True, True, False]
    assert verifier.workers.pids() == []


NUMBERS = st.one_of(
    st.integers(-(10**11), 10**11).map(str),
    st.integers(-50, 50).map(str),
    st.decimals(-50, 50, places=2).map(str),
    st.sampled_from(["0", "-0", "007", "0.50", "1.0", "-3.00"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gold=NUMBERS, answer=NUMBERS, same=st.booleans())
def test_the_shortcut_for_plain_numbers_agrees_with_math_verify(verifier, gold, answer, same):
    answer = str(Decimal(gold).normalize().quantize(Decimal("0.001"))) if same else answer
    shortcut = compare_plain(gold, answer)
    if shortcut is not None:
        assert verifier.workers.compare([(gold, answer)])[0].equal is shortcut


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.text(max_size=20),
        st.text("0123456789+-*/^_{}()[]\\$%.,= xyfracsqt", max_size=20),
        st.lists(
            st.sampled_from(["\\frac", "{", "}", "\\sqrt", "^", "2", "x", "\\text{a}", "\x00", "\ud800"])
        ).map("".join),
    )
)
def test_no_answer_makes_the_verifier_raise(verifier, answer):
    assert verifier.verify(ask("\\frac{1}{3}"), f"\\boxed{{{answer}}}").correct in (False, None, True)
    tidy(answer)


def test_a_bomb_is_unknown_after_the_timeout_and_the_next_answers_are_judged():
    verifier = make(workers=2, timeout_s=1.5)
    try:
        verifier.verify(ask("\\frac{1}{2}"), "\\boxed{0.5}")  # a worker is up
        start = time.monotonic()
        items = [(ask("\\frac{1}{3}"), f"\\boxed{{{bomb}}}") for bomb in BOMBS] + [
            (ask("\\frac{1}{4}"), "\\boxed{0.25}")
        ]
        outcomes = verifier.verify_many(items)
        # Two bombs on two workers take one timeout, plus starting new workers.
        assert time.monotonic() - start < 1.5 + 8
        assert [outcome.correct for outcome in outcomes] == [None, None, True]
        assert outcomes[0].reason == outcomes[1].reason == "took longer than 1.5 s"
        assert verifier.verify(ask("\\frac{1}{5}"), "\\boxed{0.2}").correct is True
    finally:
        verifier.close()


def test_bombs_cost_their_limit_and_nothing_more_and_change_no_other_verdict():
    verifier = make(workers=1, timeout_s=20.0)
    items = [
        (ask(f"\\frac{{1}}{{{i}}}"), f"\\boxed{{\\frac{{2}}{{{2 * i + i % 2}}}}}") for i in range(7, 107)
    ]
    try:
        undisturbed = verifier.verify_many(items)
        (pid,) = verifier.workers.pids()
        verifier._cache.clear()
        verifier.workers.close()
        verifier.workers.timeout_s = 0.6
        verifier.verify(*items[0])
        with_bombs = [*items]
        for at in (20, 50, 80):
            with_bombs.insert(at, (ask("\\frac{1}{3}"), f"\\boxed{{{BOMBS[0]}}}"))
        start = time.monotonic()
        outcomes = verifier.verify_many(with_bombs)
        assert (
            time.monotonic() - start < 3 * 0.6 + 100 * 0.1
        )  # a worker started anew would take a second each
        assert [o for o in outcomes if o.correct is not None] == undisturbed
        assert [o.reason for o in outcomes if o.correct is None] == ["took longer than 0.6 s"] * 3
        assert verifier.workers.pids() != [pid] and len(verifier.workers.pids()) == 1
    finally:
        verifier.close()


def test_a_memory_bomb_is_capped(verifier):
    verifier.verify(ask("\\frac{1}{2}"), "\\boxed{0.5}")
    (pid,) = verifier.workers.pids()
    (fork,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for process in (pid, fork):
        limits = Path(f"/proc/{process}/limits").read_text()
        assert f"Max address space         {MEMORY_BYTES}" in limits


def test_a_fork_killed_while_idle_costs_no_verdict(verifier):
    verifier.verify(ask("\\frac{1}{2}"), "\\boxed{0.5}")
    (pid,) = verifier.workers.pids()
    (fork,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(fork), signal.SIGKILL)
    time.sleep(0.2)
    golds = [f"\\frac{{1}}{{{i}}}" for i in range(200, 210)]
    outcomes = verifier.verify_many([(ask(gold), f"\\boxed{{{gold}+0}}") for gold in golds])
    assert [o.correct for o in outcomes] == [True] * 10
    assert verifier.workers.pids() == [pid]


def test_a_timeout_is_not_remembered_but_verdicts_are(verifier):
    verifier.verify(ask("\\frac{2}{3}"), "\\boxed{\\frac{4}{6}}")
    pids = verifier.workers.pids()
    verifier.workers.close()
    assert verifier.verify(ask("\\frac{2}{3}"), "\\boxed{\\frac{4}{6}}").correct is True
    assert pids and verifier.workers.pids() == []  # from memory: no process was started


def test_a_worker_killed_from_outside_costs_no_verdict_when_idle():
    verifier = make()
    try:
        assert verifier.verify(ask("\\frac{1}{2}"), "\\boxed{0.5}").correct is True
        (pid,) = verifier.workers.pids()
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)
        assert verifier.verify(ask("\\frac{1}{4}"), "\\boxed{0.25}").correct is True
        assert verifier.workers.pids() != [pid]
    finally:
        verifier.close()


def test_a_worker_that_dies_at_work_makes_the_outcome_unknown():
    verifier = make()
    try:
        verifier.verify(ask("\\frac{1}{2}"), "\\boxed{0.5}")
        (pid,) = verifier.workers.pids()
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        outcome = verifier.verify(ask("\\frac{1}{2}"), f"\\boxed{{{BOMBS[0]}}}")
        assert outcome.correct is None and "died" in outcome.reason
    finally:
        verifier.close()


def test_it_works_off_the_main_thread_and_after_that_thread_has_ended():
    verifier = make()
    seen = []
    try:
        for gold, answer in (("\\frac{1}{2}", "0.5"), ("\\frac{1}{4}", "0.25")):
            args = (ask(gold), f"\\boxed{{{answer}}}")
            thread = threading.Thread(target=lambda args=args: seen.append(verifier.verify(*args).correct))
            thread.start()
            thread.join()
            seen.append(tuple(verifier.workers.pids()))
        assert seen == [True, seen[1], True, seen[1]]  # and with the same process
    finally:
        verifier.close()


def test_closing_ends_the_workers():
    workers = MathWorkers(2, timeout_s=20.0)
    workers.compare([("\\frac{1}{2}", "0.5"), ("\\frac{1}{4}", "0.25"), ("x", "y")])
    pids = workers.pids()
    workers.close()
    assert pids and all(gone(pid) for pid in pids)


OWNER = """
    import sys, threading, time
    from uniopd_mm.verifiers.math_workers import MathWorkers
    workers = MathWorkers(1, timeout_s=60.0)
    workers.compare([("x^2", "x^{2}")])
    if sys.argv[1] == "busy":
        threading.Thread(target=workers.compare, args=([("1", "9^{9^{9}}")],), daemon=True).start()
        time.sleep(0.5)
    print(workers.pids()[0], flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_no_worker_outlives_a_killed_parent(state):
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), state], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    with owner, owner.stdout:
        pid = int(owner.stdout.readline())
        assert not gone(pid, within_s=0.1)
        owner.kill()
    assert gone(pid)


def test_workers_start_where_the_main_script_has_no_guard_and_its_folder_shadows_modules(tmp_path):
    (tmp_path / "sympy.py").write_text("raise SystemExit('shadowed')")
    script = tmp_path / "deep" / "train.py"
    script.parent.mkdir()
    script.write_text(
        "from uniopd_mm.verifiers.math_workers import MathWorkers\n"
        "print(MathWorkers(1, timeout_s=20.0).compare([('x^2', 'x^{2}')])[0].equal)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, str(script)]
    assert (
        subprocess.run(command, cwd=tmp_path, env=env, check=True, stdout=subprocess.PIPE).stdout == b"True\n"
    )


def test_a_worker_that_cannot_start_is_an_error_that_says_what_to_check(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(VerifierError, match="did not start"):
        MathWorkers(1, timeout_s=1.0).compare([("x", "y")])
