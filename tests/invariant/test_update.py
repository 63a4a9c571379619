"""One update of the trainer against a few lines of plain code on the same rollouts."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from families import FAMILIES
from rooms import load, make_config, make_groups, make_teacher, plain_logprobs, sample

from uniopd_mm.distributed import World
from uniopd_mm.rollout import Group, Outcome, fill
from uniopd_mm.training.credit import assign_advantages
from uniopd_mm.training.trainer import Trainer, accumulation_steps


class RecordingTrainer(Trainer):
    """Keeps the gradients as they are just before the optimizer uses them."""

    def _before_step(self) -> tuple[float | None, float]:
        self.gradients = {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}
        return super()._before_step()


def scored_groups(student, teacher_folder: Path) -> list[Group]:
    """Four groups with 0, 1, 2 and 1 images, alternately correct, incorrect and unknown, scored by another model."""
    groups = sample(student, make_groups(student, (0, 1, 2, 1)), n=4)
    groups = fill(groups, "outcome", [Outcome(True), Outcome(False), Outcome(False), Outcome(None)] * 4)
    return make_teacher(load(teacher_folder), student).score(groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_a_step_equals_that_of_plain_code(
    family: str, tiny_models: dict[str, Path], tmp_path: Path, world: World
) -> None:
    config = make_config(tiny_models[family])
    teacher = families.family(family).build(tmp_path / "teacher", seed=3)
    trainer = RecordingTrainer(config, world)
    groups, _ = assign_advantages(scored_groups(trainer.student, teacher), config, world, step=0)
    assert any(not r.kept for g in groups for r in g.rollouts)  # something was balanced out
    stats = trainer.update(groups, correct_mismatch=False)

    plain = load(tiny_models[family]).requires_grad_(True)
    n_rollouts = sum(len(g.rollouts) for g in groups)
    loss = torch.zeros(())
    for group in groups:
        for rollout in group.rollouts:
            logprobs = plain_logprobs(plain, group, rollout.response_ids)
            ratio = (logprobs - rollout.sampler_logprobs).exp()
            advantage = rollout.advantages * rollout.kept
            token = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.28) * advantage)
            near = (logprobs.detach() - rollout.teacher_logprobs).abs() < 10
            loss = loss + (token * rollout.scored * near).sum() / rollout.scored.sum() / n_rollouts
    loss.backward()

    assert stats["loss"] == pytest.approx(float(loss), rel=1e-4, abs=1e-6)
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    difference = torch.sqrt(sum((trainer.gradients[n] - g).square().sum() for n, g in wanted.items()))
    size = torch.sqrt(sum(g.square().sum() for g in wanted.values()))
    assert size > 1e-3
    assert difference / size <= 1e-5
    assert stats["grad_norm"] == pytest.approx(float(size), rel=1e-4)


def test_a_batch_without_anything_to_train_on_is_no_error(tiny_models: dict[str, Path], world: World) -> None:
    config = make_config(tiny_models["llava"])
    trainer = RecordingTrainer(config, world)
    groups = sample(trainer.student, make_groups(trainer.student, (0, 1, 0, 0)), n=4)  # no teacher scored it
    groups, _ = assign_advantages(fill(groups, "outcome", [Outcome(False)] * 16), config, world, step=0)
    stats = trainer.update(groups, correct_mismatch=False)
    assert stats["loss"] == 0 and stats["grad_norm"] == 0
    assert all((g == 0).all() for g in trainer.gradients.values())


def test_a_text_only_micro_batch_still_reaches_the_vision_tower(
    tiny_models: dict[str, Path], world: World
) -> None:
    """Otherwise ranks with and without images would wait for each other for ever."""
    config = make_config(tiny_models["llava"], rollout={"prompts_per_step": 2, "n": 4})
    trainer = RecordingTrainer(config, world)
    student = trainer.student
    groups = sample(student, make_groups(student, (0, 0)), n=4)
    groups = make_teacher(load(tiny_models["text"]), student).score(groups)
    groups = fill(groups, "outcome", [Outcome(False)] * 8)
    groups, _ = assign_advantages(groups, config, world, step=0)
    trainer.update(groups, correct_mismatch=False)
    vision = {n: g for n, g in trainer.gradients.items() if "vision_tower" in n}
    assert vision and all((g == 0).all() for g in vision.values())
    assert any((g != 0).any() for n, g in trainer.gradients.items() if "language_model" in n)


def test_accumulation_must_divide_the_batch(tiny_models: dict[str, Path]) -> None:
    config = make_config(tiny_models["llava"], rollout={"prompts_per_step": 5, "n": 2})
    with pytest.raises(ValueError, match=r"Try rollout\.prompts_per_step=8"):
        accumulation_steps(config, world_size=2)
