"""Helpers for tests that go through several rooms: prompts with pictures, loaded models, plain reference code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tiny
import torch
from families import family

from uniopd_mm.config import ModelConfig, SamplingConfig, TeacherConfig, TrainConfig
from uniopd_mm.engines import LocalEngine, encode_groups
from uniopd_mm.models import MultimodalLM, load_model
from uniopd_mm.rollout import Group, Prompt, fill
from uniopd_mm.teachers import LocalTeacher

CPU = torch.device("cpu")
REPRESENTATIVES = ("llava", "qwen3_vl", "gemma3", "qwen3_5")
"""The kinds of families there are: plain attention, M-RoPE with features in several layers, sliding windows, linear
attention."""


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """A tiny random model of a family, or ``text``: a causal LM with the vocabulary that all families share."""
    return tiny.build_text(folder, seed) if name == "text" else family(name).build(folder, seed)


def load(folder: Path, shared_prefix: bool = True) -> MultimodalLM:
    return load_model(ModelConfig(model=str(folder), dtype="float32", shared_prefix=shared_prefix), CPU)


def rebuild(
    source: Path,
    folder: Path,
    text: dict[str, Any],
    *,
    model_type: str | None = None,
    **settings: Any,
) -> Path:
    """A copy of a tiny model with other settings (``text``: of its language model), or another type, and new weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    shutil.copytree(source, folder)
    old = json.loads((source / "config.json").read_text(encoding="utf-8"))
    own_type = old.pop("model_type")
    if model_type is not None:
        del old["text_config"]["model_type"], old["vision_config"]["model_type"]
    old |= {"text_config": old["text_config"] | text, **settings}
    config = AutoConfig.for_model(model_type or own_type, **old)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    shutil.copy(source / "generation_config.json", folder)
    return folder


def make_prompt(n_images: int, seed: int = 0, domain: str = "default") -> Prompt:
    content = [{"type": "image"}] * n_images + [
        {"type": "text", "text": f"what is shown? {seed} " + "red " * seed}
    ]
    return Prompt(
        id=f"p{seed}",
        messages=({"role": "user", "content": content},),
        images=tuple(tiny.random_image(60 + 20 * seed, 90, seed + i) for i in range(n_images)),
        image_text=tuple(f"picture {i}" for i in range(n_images)) or None,
        answer="7",
        domain=domain,
    )


def make_config(folder: Path, **changes: object) -> TrainConfig:
    """Settings of a trainer whose student lies in ``folder``; no other file is read."""
    settings = {
        "out": "unused",
        "steps": 1,
        "student": {"model": str(folder), "dtype": "float32", "freeze": []},
        "teachers": {"t": {"model": "unused"}},
        "data": {"train": "unused"},
        "rollout": {"prompts_per_step": 4, "n": 4},
        "calibration": {"kind": "shift", "direction": "spread", "delta": 0.4},
        "distributed": {"zero_stage": 0, "micro_groups": 2},
        "optim": {"max_grad_norm": 1e9},
    }
    return TrainConfig.model_validate({**settings, **changes})


def make_groups(model: MultimodalLM, n_images: tuple[int, ...]) -> list[Group]:
    prompts = [make_prompt(n, seed) for seed, n in enumerate(n_images)]
    return encode_groups([(i, p, p.images) for i, p in enumerate(prompts)], model.processor)


def sample(
    model: MultimodalLM, groups: list[Group], n: int = 3, seed: int = 0, **sampling: object
) -> list[Group]:
    settings = SamplingConfig(**{"max_new_tokens": 10, **sampling})
    sampled = LocalEngine(model).sample(groups, n, settings, (seed,))
    return fill(sampled, "student_logprobs", [r.sampler_logprobs for g in sampled for r in g.rollouts])


def make_teacher(
    model: MultimodalLM, student: MultimodalLM, name: str = "t", **settings: object
) -> LocalTeacher:
    return LocalTeacher(name, TeacherConfig(model="unused", **settings), model, student.processor)


def plain_logprobs(model: MultimodalLM, group: Group, response_ids: torch.Tensor) -> torch.Tensor:
    """[T] log p of a response by one unpadded forward pass of the stock model: obviously right, slow."""
    inputs = model.collate([group.encoded])
    n_prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], response_ids[None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in model.processor.token_inputs:
        inputs[name] = torch.cat([inputs[name], torch.zeros_like(response_ids[None])], dim=1)
    if hasattr(model.transformer.base_model, "rope_deltas"):
        model.transformer.base_model.rope_deltas = None  # state that an earlier generate() leaves behind
    logits = model.transformer(**inputs, use_cache=False).logits[0, n_prompt - 1 : -1]
    return logits.log_softmax(-1).gather(-1, response_ids[:, None])[:, 0]
