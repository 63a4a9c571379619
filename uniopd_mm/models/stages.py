"""Which of the three stages (vision, projector, language) a parameter belongs to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

STAGE_PREFIXES: dict[str, dict[str, tuple[str, ...]]] = {
    "llava": {"vision": ("model.vision_tower",), "projector": ("model.multi_modal_projector",)},
    "qwen2_5_vl": {"vision": ("model.visual",), "projector": ("model.visual.merger",)},
    "qwen3_vl": {
        "vision": ("model.visual",),
        "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
    },
}
"""``config.model_type`` -> stage -> module prefixes; the longest match wins, everything else is ``language``."""


def stage_of(model_type: str, name: str) -> str:
    """Stage of the parameter or module ``name`` (as in ``model.named_parameters()``, adapters of peft included)."""
    name = name.removeprefix("base_model.model.")
    best, stage = -1, "language"
    for candidate, prefixes in STAGE_PREFIXES.get(model_type, {}).items():
        for prefix in prefixes:
            if len(prefix) > best and (name == prefix or name.startswith(prefix + ".")):
                best, stage = len(prefix), candidate
    return stage


def stage_parameters(model: nn.Module, model_type: str) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters of each stage, in a fixed order."""
    stages: dict[str, list[nn.Parameter]] = {"vision": [], "projector": [], "language": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            stages[stage_of(model_type, name)].append(parameter)
    return stages


def freeze_stages(model: nn.Module, model_type: str, stages: Iterable[str]) -> None:
    """Take the parameters of ``stages`` out of training."""
    frozen = set(stages)
    for name, parameter in model.named_parameters():
        if stage_of(model_type, name) in frozen:
            parameter.requires_grad_(False)
