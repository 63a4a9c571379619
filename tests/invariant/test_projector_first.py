"""The shipped recipe on tiny parts: the projector of an assembled LLaVA learns, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from launching import ROOT, train, write_rows

from uniopd_mm.models.assemble import assemble_llava
from uniopd_mm.models.stages import stage_of
from uniopd_mm.processors import get_processor

RECIPE = ROOT / "scripts" / "recipes" / "projector_first.yaml"
STEPS = 12


def build_tower(folder: Path) -> Path:
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(1)
    config = SiglipVisionConfig(
        image_size=28,
        patch_size=14,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Student and teacher of the same parts, so that only the projector lies between them."""
    root = tmp_path_factory.mktemp("models")
    tower, language = build_tower(root / "tower"), tiny.build_text(root / "language", seed=2, tie=True)
    for name, seed in (("student", 0), ("teacher", 1)):
        assemble_llava(tower, language, root / name, dtype="float32", seed=seed)
    return {name: root / name for name in ("student", "teacher")}


def settings(models: dict[str, Path], folder: Path) -> list[str]:
    given = {
        "out": folder / "run",
        "steps": STEPS,
        "student.model": models["student"],
        "student.dtype": "float32",
        "teachers.teacher.model": models["teacher"],
        "teachers.teacher.dtype": "float32",
        "teachers.teacher.max_pixels": "null",
        "data.train": write_rows(folder / "data"),
        "verifier.default": "exact",
        "rollout.prompts_per_step": 8,
        "rollout.n": 4,
        "rollout.max_new_tokens": 6,
        "optim.warmup_steps": 0,
        "distributed.zero_stage": 0,
        "report.trackers": "[]",
    }
    return [f"{key}={value}" for key, value in given.items()]


def load_stock(folder: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def divergence(student: Any, teacher: Any, folder: Path) -> float:
    """KL(student || teacher) of the first token of an answer about pictures, nats."""
    processor = get_processor(folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is shown ?"}]}]
    encoded = [processor.encode(turns, [tiny.random_image(64, 64, seed)]) for seed in range(16)]
    batch = processor.collate(encoded)
    student_lp, teacher_lp = (m(**batch).logits[:, -1].log_softmax(-1) for m in (student, teacher))
    return float((student_lp.exp() * (student_lp - teacher_lp)).sum(-1).mean())


def test_only_the_projector_is_trained_and_it_learns(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoProcessor

    run = train(RECIPE, *settings(models, tmp_path))
    before, after, teacher = map(load_stock, (models["student"], run / "model", models["teacher"]))
    trained = dict(after.named_parameters())
    for name, value in before.named_parameters():
        is_same = torch.equal(value, trained[name])
        assert is_same == (stage_of("llava", name) != "projector"), name
    far, near = (divergence(student, teacher, models["student"]) for student in (before, after))
    assert near < 0.8 * far, (far, near)
    template = AutoProcessor.from_pretrained(run / "model").chat_template
    assert template == AutoProcessor.from_pretrained(models["student"]).chat_template
