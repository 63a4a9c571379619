"""What the checks before training find, on prompts of tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from rooms import CPU, build, load, make_groups, make_teacher, sample

from uniopd_mm.config import ModelConfig, TrainConfig
from uniopd_mm.models import load_model
from uniopd_mm.preflight import Finding, PreflightError, check_context, check_head, null_test, require_ok
from uniopd_mm.rollout import fill

CONFIG = TrainConfig.model_validate(
    {
        "out": "unused",
        "steps": 1,
        "student": {"model": "unused", "dtype": "float32"},
        "teachers": {"t": {"model": "unused"}},
        "data": {"train": "unused"},
    }
)


@pytest.mark.parametrize("family", [*FAMILIES, "text"])
def test_null_test_passes_whatever_the_teachers_weights(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    student = load(tiny_models[family])
    other = load(build(family, tmp_path / "other", seed=9))
    groups = sample(student, make_groups(student, (0, 1, 2) if family != "text" else (0, 0)))
    finding = null_test(student, make_teacher(other, student), groups, CONFIG)
    assert finding.ok is True and "worst |A|" in finding.text


def test_null_test_finds_scores_that_are_shifted_by_one(tiny_models: dict[str, Path]) -> None:
    student = load(tiny_models["llava"])
    groups = sample(student, make_groups(student, (1,)))
    shifted = [r.student_logprobs.roll(1) for g in groups for r in g.rollouts]
    finding = null_test(
        student, make_teacher(student, student), fill(groups, "student_logprobs", shifted), CONFIG
    )
    assert finding.ok is False and "at token" in finding.text
    with pytest.raises(PreflightError, match="null test t"):
        require_ok([finding])


def test_a_template_of_the_teachers_own_is_said_not_failed(tiny_models: dict[str, Path]) -> None:
    folder = str(tiny_models["text"])
    student = load(tiny_models["text"])
    settings = ModelConfig(model=folder, dtype="float32", template={"enable_thinking": False})
    groups = sample(student, make_groups(student, (0,)))
    finding = null_test(student, make_teacher(load_model(settings, CPU), student), groups, CONFIG)
    assert finding.ok is None and "<think>" in finding.text


def test_a_head_that_is_not_plain_is_found(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load(tiny_models["qwen3_vl"])
    groups = make_groups(student, (1,))
    assert check_head(student, groups).ok
    monkeypatch.setattr(student, "logits", lambda hidden: torch.tanh(type(student).logits(student, hidden)))
    assert check_head(student, groups).ok is False


def test_a_response_that_does_not_fit_is_found_before_training(tiny_models: dict[str, Path]) -> None:
    student = load(tiny_models["llava"])
    groups = make_groups(student, (1,))
    assert check_context(student, groups, 100).ok
    finding = check_context(student, groups, 4090)
    assert finding.ok is False and "max_new_tokens" in finding.text


def test_only_failures_stop_a_run() -> None:
    fine = Finding("a", "fine", True)
    require_ok([fine, replace(fine, ok=None)])
    with pytest.raises(PreflightError, match="b: broken"):
        require_ok([fine, Finding("b", "broken", False)])
