"""A step with partitioned weights (ZeRO-3) on two ranks against the same step on one, for every family."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import families
import pytest
import torch
import torch.multiprocessing as mp
from families import FAMILIES
from launching import free_port
from rooms import load, make_groups, make_teacher, sample

from uniopd_mm.config import TrainConfig
from uniopd_mm.distributed import World, close_world, init_world
from uniopd_mm.rollout import Outcome, fill
from uniopd_mm.training.credit import assign_advantages
from uniopd_mm.training.trainer import Trainer

N_IMAGES = (0, 1, 2, 1)
"""Of the prompts of a step: the first two are the first rank's."""


def make_config(folder: Path, zero_stage: int) -> TrainConfig:
    # Small weights would otherwise stay whole on every rank, and all weights here are small.
    nothing_resident = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return TrainConfig.model_validate(
        {
            "out": "unused",
            "steps": 1,
            "student": {"model": str(folder), "dtype": "float32", "freeze": []},
            "teachers": {"t": {"model": "unused"}},
            "data": {"train": "unused"},
            "rollout": {"prompts_per_step": len(N_IMAGES), "n": 2},
            "calibration": {"kind": "outcome"},
            "optim": {"lr": 0.1, "eps": 1.0, "max_grad_norm": 100.0},
            "distributed": {
                "zero_stage": zero_stage,
                "micro_groups": 1,
                "deepspeed": nothing_resident if zero_stage == 3 else {},
            },
        }
    )


def one_step(model: Path, teacher: Path, zero_stage: int, world: World) -> dict[str, torch.Tensor]:
    """The weights after sampling, scoring and updating once."""
    config = make_config(model, zero_stage)
    trainer = Trainer(config, world)
    trainer.release_zero3_config()
    student = trainer.student
    groups = [make_groups(student, N_IMAGES)[i] for i in world.share(len(N_IMAGES))]
    with trainer.whole_weights():
        # Stop tokens of many kinds: responses of different lengths, so that the ranks do different work.
        groups = sample(student, groups, n=2, stop_token_ids=list(range(7, 512, 8)))
    groups = fill(groups, "outcome", [Outcome(True), Outcome(False)] * len(groups))
    groups = make_teacher(load(teacher), student).score(groups)
    groups, _ = assign_advantages(groups, config, world, step=0)
    trainer.update(groups, correct_mismatch=False)
    with trainer.whole_weights():
        return {name: p.detach().clone() for name, p in student.named_parameters()}


def run_rank(rank: int, port: int, models: dict[str, Path], folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = init_world(120)
    for name, model in models.items():
        weights = one_step(model, folder / name, 3, world)
        if world.is_main:
            torch.save(weights, folder / f"{name}.pt")
        gc.collect()
    close_world()


@pytest.fixture(scope="module")
def stepped(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the weights of every family after the step, and its teacher."""
    folder = tmp_path_factory.mktemp("zero3")
    models = {name: tiny_models[name] for name in FAMILIES}
    for name in models:
        families.family(name).build(folder / name, seed=3)
    mp.spawn(run_rank, (free_port(), models, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_two_ranks_that_share_the_weights_equals_that_of_one(
    family: str, tiny_models: dict[str, Path], stepped: Path, world: World
) -> None:
    wanted = one_step(tiny_models[family], stepped / family, 0, world)
    got = torch.load(stepped / f"{family}.pt")
    before = dict(load(tiny_models[family]).named_parameters())
    moved = 0.0
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=2e-6)
        moved += float((weight - before[name]).abs().sum())
    assert moved > 1e-3
