"""X-OPD's mix: part of the advantage is measured against the student that reads what its teacher reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rooms import load, make_config, make_groups, make_teacher, plain_logprobs, sample

from uniopd_mm.alignment import teacher_messages
from uniopd_mm.config import TeacherConfig
from uniopd_mm.distributed import World
from uniopd_mm.errors import ConfigError
from uniopd_mm.rollout import Group, Outcome, fill
from uniopd_mm.teachers import TeacherPool
from uniopd_mm.training.credit import assign_advantages
from uniopd_mm.training.trainer import Trainer

WEIGHT = 0.25


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_the_advantage_is_the_mix_of_both_differences(
    family: str, tiny_models: dict[str, Path], world: World
) -> None:
    config = make_config(tiny_models[family], balance={"ratio": None}, calibration={"kind": "none"})
    trainer = Trainer(config, world)
    student = trainer.student
    settings = {"in_modal_weight": WEIGHT, "view": "text"}
    pool = TeacherPool(
        {"t": TeacherConfig(model="unused", **settings)},
        {"t": make_teacher(load(tiny_models["text"]), student, **settings)},
    )
    groups = sample(student, make_groups(student, (1, 0, 2, 0)), n=3)
    groups = trainer.score_in_modal(groups, pool.in_modal_weight)
    groups = fill(groups, "outcome", [Outcome(True)] * 12)
    groups, _ = assign_advantages(pool.score(groups), config, world, step=0)
    for group in groups:
        for rollout in group.rollouts:
            seeing = plain_logprobs(student, group, rollout.response_ids)
            expected = rollout.teacher_logprobs - seeing
            if group.images:
                reading = plain_logprobs(student, as_text(student, group), rollout.response_ids)
                in_modal = rollout.teacher_logprobs - reading
                assert (in_modal - expected).abs().max() > 1e-3  # the picture makes a difference
                expected = (1 - WEIGHT) * expected + WEIGHT * in_modal
            torch.testing.assert_close(rollout.advantages, expected, atol=2e-4, rtol=0)


def as_text(student, group: Group) -> Group:
    messages, _ = teacher_messages(group.prompt, "text", sees_images=True)
    return replace(group, encoded=student.processor.encode(list(messages)), images=())


def test_it_has_a_meaning_only_where_the_view_is_text(tiny_models: dict[str, Path]) -> None:
    student, reader = load(tiny_models["llava"]), load(tiny_models["text"])
    prompt = make_groups(student, (1,))[0].prompt

    def weight(teacher, **settings: object) -> float:
        made = make_teacher(teacher, student, in_modal_weight=WEIGHT, **settings)
        return TeacherPool({"t": made.settings}, {"t": made}).in_modal_weight(prompt)

    assert (
        weight(reader) == weight(student, view="text") == weight(student, view={"default": "text"}) == WEIGHT
    )
    assert weight(student, view={"other": "text"}) == 0
    for settings in ({}, {"view": "image"}):
        with pytest.raises(ConfigError, match=r"Type teachers.t.view=text, or teachers.t.in_modal_weight=0"):
            weight(student, **settings)
