"""One step's numbers: what was asked for, what came, what a teacher could score, and how old the weights were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from uniopd_mm.distributed import World
from uniopd_mm.report import find_metric
from uniopd_mm.rollout import Group, Prompt, Rollout
from uniopd_mm.training.metrics import rollout_metrics

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


@dataclass(frozen=True)
class BesideAnother(World):
    """Rank 0 of two, whose neighbour has already said what it counted."""

    neighbour: Callable[[], dict[str, float]] = dict

    def gather(self, items: Any) -> list[Any]:
        return [*items, self.neighbour()]


def rollout(scored: list[int], teacher: str = "math", reason: str = "", n: int = 4) -> Rollout:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[scored] = True
    lp = torch.full((n,), -1.0)
    return Rollout(
        torch.arange(n),
        lp,
        "stop",
        student_logprobs=lp,
        teacher=teacher,
        teacher_logprobs=torch.where(mask, -2.0, 0.0),
        scored=mask,
        unscored_reason=reason,
    )


def group(*rollouts: Rollout, weight_version: int = 0) -> Group:
    prompt = Prompt(id="p", messages=())
    return Group(prompt, SimpleNamespace(), rollouts, weight_version=weight_version)  # pyright: ignore


def test_each_teacher_has_the_share_of_tokens_that_it_scored():
    groups = [group(rollout([0, 1, 2]), rollout([0, 1, 2, 3])), group(rollout([3], "charts", n=8))]
    metrics = rollout_metrics(groups, ALONE)
    assert metrics["scored/math"] == 7 / 8
    assert metrics["scored/charts"] == 1 / 8
    assert metrics["rollout/scored_share"] == 8 / 16
    assert metrics["train/gap"] == -1


def test_unscored_rollouts_are_counted_by_what_left_them_so():
    whys = ["server: no answer", "reply: one id changed", "reply: too short", "the text is changed", ""]
    groups = [group(*(rollout([] if why else [0], reason=why) for why in whys))]
    metrics = rollout_metrics(groups, ALONE)
    shares = {key: value for key, value in metrics.items() if key.startswith("unscored/")}
    assert shares == {"unscored/server": 1 / 5, "unscored/reply": 2 / 5, "unscored/alignment": 1 / 5}


def test_rollouts_that_never_came_are_a_share_of_all_that_were_asked_for():
    groups = [group(*[rollout([0])] * 3)]
    assert rollout_metrics(groups, ALONE, n_failed=1)["rollout/failed_share"] == 1 / 4
    assert "rollout/failed_share" not in rollout_metrics(groups, ALONE)
    assert rollout_metrics([], ALONE, n_failed=2) == {"rollout/failed_share": 1}


@pytest.mark.parametrize("here", [0, 2])
def test_failures_on_any_rank_count_on_every_rank(here: int):
    there = {"rollout/failed_share": 1.0, "rollout/length": 8.0, "#rollout/length": 2.0}
    world = BesideAnother(0, 2, 0, CPU, neighbour=lambda: there)
    metrics = rollout_metrics([group(*[rollout([0])] * 3)], world, n_failed=here)
    assert metrics["rollout/failed_share"] == (here + 1) / (here + 1 + 5)


def test_staleness_is_how_far_training_is_ahead_of_the_weights_that_sampled():
    groups = [
        group(*[rollout([0])] * 3, weight_version=7),
        group(rollout([0]), weight_version=5),
    ]
    assert rollout_metrics(groups, ALONE, updates=7)["rollout/staleness"] == 2 / 4
    assert "rollout/staleness" not in rollout_metrics(groups[:1], ALONE, updates=7)
    assert "rollout/staleness" not in rollout_metrics(groups, ALONE)


def test_every_number_of_a_step_is_documented():
    names = rollout_metrics([group(rollout([0]), rollout([], reason="x"))], ALONE, n_failed=1, updates=3)
    assert {"rollout/failed_share", "rollout/staleness", "scored/math", "unscored/alignment"} <= set(names)
    assert not [name for name in names if find_metric(name) is None]
