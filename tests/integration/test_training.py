"""Whole training runs whose teachers are real vLLM servers, or whose student is sampled by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from launching import metrics, train, write_recipe

from uniopd_mm.config import RolloutServerConfig
from uniopd_mm.engines import ServerEngine
from uniopd_mm.processors import get_processor

if TYPE_CHECKING:
    from conftest import Served

pytestmark = pytest.mark.servers

COMPARED = {"train/gap", "train/loss", "train/grad_norm", "rollout/length"}
"""Equal but for the rounding of two implementations, which a few updates make larger."""


def test_a_run_with_its_teachers_behind_servers_is_the_run_with_them_in_process(
    vllm_text: Served, vllm_image: Served, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_models,
        family="qwen2_5_vl",
        optim={"lr": 1e-6},  # a larger one, and the smallest difference would soon sample other tokens
        teachers={
            "seer": {"model": str(vllm_image.folder), "dtype": "float32", "domains": ["see"]},
            "reader": {
                "model": str(vllm_text.folder),
                "dtype": "float32",
                "domains": ["read"],
                "view": "text",
            },
        },
    )
    local = metrics(train(recipe, f"out={tmp_path / 'local'}"))
    assert sum("train/gap" in row for row in local) == 3
    servers = [
        f"teachers.seer.server.urls=[{vllm_image.url}]",
        f"teachers.reader.server.urls=[{vllm_text.url}]",
        "teachers.reader.server.kind=vllm_text",
    ]
    for ranks in (1, 2):
        remote = metrics(train(recipe, f"out={tmp_path / f'remote{ranks}'}", *servers, ranks=ranks))
        for ours, wanted in zip(remote, local, strict=True):
            assert not any(key.startswith("unscored/") for key in ours)
            for key in COMPARED & wanted.keys():
                assert ours[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-4), key


@pytest.fixture
def vllm_student(vllm_image: Served) -> Iterator[Served]:
    """A server for a run to give its weights to; the others find it as it was."""
    yield vllm_image
    _give_back(vllm_image)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_that_gets_the_weights_samples_as_the_student_would(
    ranks: int, vllm_student: Served, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    rows = _run_with(vllm_student, tiny_models, tmp_path, ranks=ranks)
    assert max(row["rollout/mismatch"] for row in rows) < 1e-3
    assert not any("rollout/staleness" in row or "rollout/failed_share" in row for row in rows)
    kept = sorted(path.name for path in (tmp_path / "run" / "sync").iterdir())
    assert kept == ["weights_000002", "weights_000003"]


def test_a_server_that_gets_none_is_seen_to_fall_behind(
    vllm_student: Served, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    rows = _run_with(vllm_student, tiny_models, tmp_path, "rollout.server.sync=never")
    assert rows[0]["rollout/mismatch"] < 1e-3 < 1e-2 < rows[1]["rollout/mismatch"]
    assert [row.get("rollout/staleness", 0) for row in rows] == [0, 1, 2]
    assert not (tmp_path / "run" / "sync").exists()


def test_a_run_that_goes_on_gives_the_server_its_weights_at_once(
    vllm_student: Served, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    """In between the server may have been started anew: here it is given those of the beginning."""
    recipe = _recipe(vllm_student, tiny_models, tmp_path)
    train(recipe, "steps=2")
    _give_back(vllm_student)
    rows = _steps(train(recipe, "steps=3"))
    assert len(rows) == 3 and max(row["rollout/mismatch"] for row in rows) < 1e-3


def _run_with(
    served: Served, models: Mapping[str, Path], folder: Path, *settings: str, ranks: int = 1
) -> list[dict[str, float]]:
    """Metrics of the three steps of a run that samples from the server."""
    rows = _steps(train(_recipe(served, models, folder), *settings, ranks=ranks))
    assert len(rows) == 3
    return rows


def _recipe(served: Served, models: Mapping[str, Path], folder: Path) -> Path:
    student, rollout = {"model": str(served.folder)}, {"server": {"urls": [served.url]}}
    return write_recipe(folder, models, family="qwen2_5_vl", student=student, rollout=rollout)


def _steps(run: Path) -> list[dict[str, float]]:
    """Metrics without those of evaluations."""
    return [row for row in metrics(run) if "train/loss" in row]


def _give_back(served: Served) -> None:
    """The server has the weights it was started with."""
    settings = RolloutServerConfig(urls=[served.url])
    with ServerEngine(settings, get_processor(served.folder)) as engine:
        engine.load_weights(str(served.folder), 0)
