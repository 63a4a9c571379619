"""Balancing and calibration over the global batch: the same on one rank and on two real ones."""

from __future__ import annotations

import os
import random
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from uniopd_mm.config import BalanceConfig, TrainConfig
from uniopd_mm.distributed import World
from uniopd_mm.errors import UniOPDError
from uniopd_mm.rollout import Group, Outcome, Prompt, Rollout, fill
from uniopd_mm.training.credit import assign_advantages

CPU = torch.device("cpu")


def make_config(**calibration: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "out": "unused",
            "steps": 1,
            "student": {"model": "unused"},
            "teachers": {"t": {"model": "unused"}},
            "data": {"train": "unused"},
            "calibration": calibration,
        }
    )


def random_groups(n_groups: int = 6, n: int = 5) -> list[Group]:
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    groups = []
    for slot in range(n_groups):
        rollouts = []
        for _ in range(n):
            length = rng.randint(1, 9)
            rollouts.append(
                Rollout(
                    response_ids=torch.arange(length),
                    sampler_logprobs=torch.zeros(length),
                    student_logprobs=-torch.rand(length, generator=generator),
                    finish="stop",
                    outcome=Outcome(rng.choice([True, False, False, None])),
                    teacher_logprobs=-2 * torch.rand(length, generator=generator),
                    scored=torch.rand(length, generator=generator) > 0.2,
                )
            )
        groups.append(Group(Prompt(id=f"p{slot}", messages=()), None, tuple(rollouts), slot=slot))
    return groups


def run_rank(rank: int, size: int, port: int, folder: str, calibration: dict[str, object]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size)
    world = World(rank, size, rank, CPU)
    groups = random_groups()
    mine = [groups[i] for i in world.share(len(groups))]
    torch.save(assign_advantages(mine, make_config(**calibration), world, step=3), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "calibration",
    [
        {"kind": "shift", "delta": 0.4, "direction": "spread"},
        {"kind": "shift", "scope": "global", "margin": "minmax", "delta": 1.0},
        {"kind": "mask", "scope": "global", "delta": 0.4},
    ],
    ids=["shift group", "shift global", "mask global"],
)
def test_two_ranks_assign_what_one_assigns(tmp_path: Path, calibration: dict[str, object]) -> None:
    whole, stats = assign_advantages(random_groups(), make_config(**calibration), World(0, 1, 0, CPU), step=3)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run_rank, (2, port, str(tmp_path), calibration), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert parts[0][1] == parts[1][1] == stats
    for ours, wanted in zip(parts[0][0] + parts[1][0], whole, strict=True):
        for a, b in zip(ours.rollouts, wanted.rollouts, strict=True):
            assert a.kept == b.kept
            assert torch.equal(a.advantages, b.advantages)
    assert any(not r.kept for g in whole for r in g.rollouts)
    assert any(r.kept and r.advantages.any() for g in whole for r in g.rollouts)


def test_a_step_whose_outcomes_are_mostly_unknown_stops_the_run() -> None:
    groups = fill(random_groups(), "outcome", [Outcome(None, reason="down")] * 30)
    with pytest.raises(UniOPDError, match="max_unknown_share"):
        assign_advantages(groups, make_config(), World(0, 1, 0, CPU), step=0)


@pytest.mark.parametrize("kind", ["shift", "mask", "gc"])
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_unscored_rollouts_change_nothing_for_the_others(kind: str, scope: str) -> None:
    groups = random_groups(8, 6)
    config = make_config(kind=kind).model_copy(
        update={"balance": BalanceConfig.model_validate({"scope": scope})}
    )
    unscored = {(slot, i) for slot in range(8) for i in range(6) if (slot + 3 * i) % 4 == 0}

    def without(rollouts: tuple[Rollout, ...], slot: int) -> tuple[Rollout, ...]:
        return tuple(r for i, r in enumerate(rollouts) if (slot, i) not in unscored)

    def failed(rollout: Rollout) -> Rollout:
        return replace(rollout, scored=torch.zeros_like(rollout.scored), outcome=Outcome(True))

    smaller = [replace(g, rollouts=without(g.rollouts, g.slot)) for g in groups]
    disturbed = [
        replace(
            g,
            rollouts=tuple(failed(r) if (g.slot, i) in unscored else r for i, r in enumerate(g.rollouts)),
        )
        for g in groups
    ]
    world = World(0, 1, 0, CPU)
    wanted, _ = assign_advantages(smaller, config, world, step=3)
    found, _ = assign_advantages(disturbed, config, world, step=3)
    assert any(not r.kept for g in wanted for r in g.rollouts)
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(without(ours.rollouts, ours.slot), theirs.rollouts, strict=True):
            assert a.kept == b.kept and torch.equal(a.advantages, b.advantages)
