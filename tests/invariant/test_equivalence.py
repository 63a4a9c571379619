"""Settings that must not change what is computed: ranks, accumulation, ZeRO stage, sharing the prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import metrics, train, write_recipe
from safetensors.torch import load_file

COMPARED = (
    "train/loss",
    "train/gap",
    "train/grad_norm",
    "rollout/length",
    "rollout/kept_share",
    "eval/length",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    # A large eps: Adam would blow the rounding noise of gradients that are 0 up to whole steps.
    return write_recipe(
        tmp_path_factory.mktemp("equivalence"),
        tiny_models,
        optim={"lr": 0.1, "eps": 1.0, "max_grad_norm": 100.0},
        # Responses of many lengths: the ranks sample, score and update different numbers of tokens.
        rollout={"max_new_tokens": 12, "stop_token_ids": list(range(7, 512, 8))},
    )


@pytest.fixture(scope="module")
def reference(recipe: Path) -> Path:
    """One rank, one group at a time."""
    return train(recipe, f"out={recipe.parent / 'reference'}")


NOTHING_RESIDENT = "distributed.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
"""Small weights would otherwise stay gathered on every rank, and all weights here are small."""
VARIANTS = {
    "one micro-batch": (1, ["distributed.micro_groups=4"]),
    "two ranks": (2, []),
    "two ranks, one micro-batch": (2, ["distributed.micro_groups=2"]),
    "ZeRO-1 on two ranks": (2, ["distributed.zero_stage=1"]),
    "ZeRO-2 on two ranks": (2, ["distributed.zero_stage=2"]),
    "ZeRO-3 on two ranks": (2, ["distributed.zero_stage=3", NOTHING_RESIDENT]),
    "ZeRO-3 on two ranks, recomputed, in chunks": (
        2,
        ["distributed.zero_stage=3", "distributed.micro_tokens=12", "student.gradient_checkpointing=true"],
    ),
    "one row per rollout": (1, ["student.shared_prefix=false"]),
    "chunks of one rollout": (1, ["distributed.micro_tokens=1"]),
    "gradient checkpointing": (1, ["student.gradient_checkpointing=true", "distributed.micro_groups=2"]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_trajectory_is_the_same_with(
    name: str, recipe: Path, reference: Path, tiny_models: dict[str, Path]
) -> None:
    ranks, settings = VARIANTS[name]
    run = train(recipe, f"out={recipe.parent / name.replace(' ', '_')}", *settings, ranks=ranks)
    assert_same_trajectory(run, reference, tiny_models["llava"])


def test_a_frozen_tower_run_once_gives_the_trajectory_of_one_run_every_time(
    recipe: Path, tiny_models: dict[str, Path]
) -> None:
    """Two ranks with ZeRO-3, whose images differ, against full rows, which know no memory of images."""
    frozen = ["student.freeze=[vision]"]
    plain = train(recipe, f"out={recipe.parent / 'frozen'}", *frozen, "student.shared_prefix=false")
    zero3 = ["distributed.zero_stage=3", NOTHING_RESIDENT, "distributed.micro_tokens=24"]
    run = train(recipe, f"out={recipe.parent / 'frozen_zero3'}", *frozen, *zero3, ranks=2)
    assert_same_trajectory(run, plain, tiny_models["llava"])


def assert_same_trajectory(run: Path, reference: Path, start: Path) -> None:
    for ours, wanted in zip(metrics(run), metrics(reference), strict=True):
        assert ours["step"] == wanted["step"]
        for key in set(COMPARED) & wanted.keys():
            assert ours[key] == pytest.approx(wanted[key], rel=2e-4, abs=2e-5), (ours["step"], key)
    before = load_file(start / "model.safetensors")
    ours, wanted = weights(run), weights(reference)
    assert ours.keys() == wanted.keys()
    moved = sum((wanted[n] - before[n]).square().sum() for n in wanted).sqrt()
    apart = sum((wanted[n] - ours[n]).square().sum() for n in wanted).sqrt()
    assert apart / moved <= 1e-3


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_responses_differ_in_length(reference: Path) -> None:
    lengths = [row["rollout/length"] for row in metrics(reference) if "rollout/length" in row]
    assert all(2 < length < 12 for length in lengths)


def test_training_changed_the_weights(reference: Path, tiny_models: dict[str, Path]) -> None:
    before = load_file(tiny_models["llava"] / "model.safetensors")
    after = weights(reference)
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert any("vision_tower" in n for n in changed)
    assert any("language_model" in n for n in changed)
