"""The small pieces around the loop: launching guards, learning rates, sharing of work, summaries, checkpoints' manifests."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from uniopd_mm.config import OptimConfig, TeacherConfig
from uniopd_mm.distributed import World
from uniopd_mm.errors import ConfigError
from uniopd_mm.evaluation import summarise
from uniopd_mm.evaluation.results import Scored
from uniopd_mm.evaluation.samples import Sample
from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.teachers.pool import route, served_domains
from uniopd_mm.training.checkpoint import list_checkpoints
from uniopd_mm.training.launch import LOCK_MAX_AGE_S, error_message, prepare_environment
from uniopd_mm.training.trainer import lr_factor


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return monkeypatch


def test_ranks_share_the_cores(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("LOCAL_SIZE", "2")
    clean_environment.setattr(os, "cpu_count", lambda: 8)
    prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "4"


def test_a_users_thread_count_is_kept(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("OMP_NUM_THREADS", "3")
    prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_dead_runs_compilation_lock_is_removed_and_a_live_ones_is_not(
    clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clean_environment.setattr("uniopd_mm.training.launch._has_gpu", lambda: False)
    locks = [tmp_path / "extensions" / name / "lock" for name in ("dead", "live")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    old = time.time() - LOCK_MAX_AGE_S - 60
    os.utime(locks[0], (old, old))
    prepare_environment()
    assert not locks[0].exists() and locks[1].exists()


def test_a_missing_compiler_is_named_before_deepspeed_fails(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setattr("uniopd_mm.training.launch._has_gpu", lambda: False)
    clean_environment.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"apt-get install g\+\+"):
        prepare_environment()


def test_only_the_first_rank_prints_a_whole_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert error_message(ConfigError("one\ntwo")) == "error: one\ntwo"
    monkeypatch.setenv("RANK", "3")
    assert error_message(ConfigError("one\ntwo")) == "error on rank 3: one"


def test_learning_rate_rises_and_falls() -> None:
    optim = OptimConfig(warmup_steps=4, schedule="linear")
    factors = [lr_factor(step, optim, 8) for step in range(8)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert lr_factor(7, OptimConfig(), 8) == 1.0
    cosine = OptimConfig(schedule="cosine")
    assert lr_factor(0, cosine, 8) == 1.0 and lr_factor(4, cosine, 8) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "size"), [(7, 3), (2, 4), (8, 2), (0, 2)])
def test_ranks_share_everything_once_and_evenly(n: int, size: int) -> None:
    parts = [World(rank, size, rank, torch.device("cpu")).share(n) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_prompts_go_to_the_teacher_of_their_domain() -> None:
    teachers = {"a": TeacherConfig(model="x", domains=["math"]), "b": TeacherConfig(model="y")}
    assert route(teachers, "math") == "a" and route(teachers, "anything") == "b"
    assert served_domains(teachers) is None
    del teachers["b"]
    assert served_domains(teachers) == {"math"}
    with pytest.raises(ConfigError, match="no teacher serves domain 'chart'"):
        route(teachers, "chart")


def test_unknown_outcomes_are_not_counted_as_wrong() -> None:
    def scored(id: str, index: int, correct: bool | None, extracted: str | None = "1") -> Scored:
        return Scored(Sample("eval", id, index, "", "stop", 4), Outcome(correct, extracted=extracted))

    metrics = summarise(
        [Prompt("x", (), domain="a"), Prompt("y", (), domain="b")],
        [
            scored("x", 0, True),
            scored("x", 1, None),
            scored("y", 0, False, None),
            scored("y", 1, True),
            scored("y", 2, None),
        ],
    )
    assert metrics["eval/accuracy"] == pytest.approx(2 / 3)
    assert metrics["eval/a/accuracy"] == 1.0 and metrics["eval/b/accuracy"] == 0.5
    assert metrics["eval/unknown_share"] == 0.4 and metrics["eval/unparsed_share"] == 0.2


def test_a_checkpoint_with_a_missing_or_short_file_does_not_exist(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / f"step_{step:06d}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"12345")
        manifest = {"step": step, "world_size": 1, "zero_stage": 0, "state": {}, "files": {"weights": 5}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "step_000003" / "weights").write_bytes(b"123")
    (tmp_path / "step_000002" / "weights").unlink()
    assert [c.step for c in list_checkpoints(tmp_path)] == [1]
