"""A whole training run whose teachers are real vLLM servers, against the same run with the teachers in its process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from launching import metrics, train, write_recipe

if TYPE_CHECKING:
    from conftest import Served

pytestmark = pytest.mark.servers

COMPARED = {"train/gap", "train/loss", "train/grad_norm", "rollout/length"}
"""About equal: the server resizes pictures with torchvision, this process with Pillow."""


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
                assert ours[key] == pytest.approx(wanted[key], rel=2e-2, abs=5e-3), key
