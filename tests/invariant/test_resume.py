"""A run that is stopped, killed or continued ends where an undisturbed one ends, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from launching import command, environment, launch, metrics, train, write_recipe
from safetensors.torch import load_file

TIMES = ("time/", "perf/")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    return write_recipe(
        tmp_path_factory.mktemp("resume"),
        tiny_models,
        steps=4,
        checkpoint={"every": 1, "keep": 2},
        eval={"every": 2},
    )


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Path:
    return train(recipe, f"out={recipe.parent / 'undisturbed'}")


def numbers(run: Path) -> list[dict[str, object]]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in metrics(run)]


def assert_same_run(run: Path, wanted: Path) -> None:
    assert numbers(run) == numbers(wanted)
    ours, theirs = (
        load_file(run / "model" / "model.safetensors"),
        load_file(wanted / "model" / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def start(recipe: Path, *arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(recipe, *arguments, ranks=ranks),
        env=environment(),
        cwd=recipe.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], timeout: float = 240) -> None:
    wait_for_file(run / "checkpoints" / f"step_{step:06d}" / "manifest.json", process, timeout)


def test_more_steps_continue_a_finished_run(recipe: Path, undisturbed: Path) -> None:
    run = recipe.parent / "in_two_parts"
    train(recipe, f"out={run}", "steps=2")
    train(recipe, f"out={run}")
    assert_same_run(run, undisturbed)


def test_a_killed_run_continues_from_its_last_checkpoint(recipe: Path, undisturbed: Path) -> None:
    run = recipe.parent / "killed"
    process = start(recipe, f"out={run}")
    wait_for_step(run, 1, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    torn = run / "checkpoints" / "step_000099"  # what a kill in the middle of a save would leave
    torn.mkdir()
    (torn / "manifest.json").write_text('{"step": 99')
    (run / "checkpoints" / "step_000050.tmp").mkdir()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/')
    train(recipe, f"out={run}")
    assert newest.name in {f"step_{n:06d}" for n in range(1, 5)}
    assert_same_run(run, undisturbed)


def wait_for_file(path: Path, process: subprocess.Popen[str], timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "sign", ["config.yaml", "rollouts/step_000001.jsonl"], ids=["before the first step", "in the middle"]
)
def test_sigterm_saves_and_the_same_command_goes_on(recipe: Path, undisturbed: Path, sign: str) -> None:
    run = recipe.parent / f"terminated_at_{Path(sign).stem}"
    options = (f"out={run}", "checkpoint.every=0", "report.rollouts_every=1")
    process = start(recipe, *options)
    wait_for_file(run / sign, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "The same command goes on" in output
    assert not (run / "model").exists()
    train(recipe, *options)
    assert_same_run(run, undisturbed)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(recipe: Path, undisturbed: Path) -> None:
    run = recipe.parent / "killed_early"
    process = start(recipe, f"out={run}", "checkpoint.every=0")
    wait_for_file(run / "metrics.jsonl", process)  # the evaluation before the first step
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    train(recipe, f"out={run}", "checkpoint.every=0")
    assert_same_run(run, undisturbed)


def test_ranks_do_not_outlive_a_killed_launcher(recipe: Path) -> None:
    run = recipe.parent / "orphaned"
    process = start(recipe, f"out={run}", "steps=100000", ranks=2)
    wait_for_step(run, 1, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # the launcher's second half and two ranks
    process.send_signal(signal.SIGTERM)  # the deepspeed command dies of it and tells nobody
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=90)
    for orphan in alive:
        orphan.kill()
    assert not alive


def test_other_settings_are_refused_with_the_difference(recipe: Path, undisturbed: Path) -> None:
    done = launch(recipe, f"out={undisturbed}", "optim.lr=0.5", "rollout.n=2")
    assert done.returncode == 1
    assert "optim.lr: 0.001 -> 0.5" in done.stderr and "rollout.n: 3 -> 2" in done.stderr
    assert "--fresh" in done.stderr


def test_fresh_moves_the_old_run_aside(recipe: Path) -> None:
    run = recipe.parent / "fresh"
    train(recipe, f"out={run}", "steps=1", "eval.every=0")
    train(recipe, f"out={run}", "steps=1", "eval.every=0", "optim.lr=1e-4", "--fresh")
    old = list(recipe.parent.glob("fresh.*"))
    assert len(old) == 1
    assert [row["step"] for row in metrics(old[0])] == [row["step"] for row in metrics(run)] == [1]
