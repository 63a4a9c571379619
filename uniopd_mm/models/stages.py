"""Which of the three stages (vision, projector, language) a parameter belongs to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_LLAVA = {
    "vision": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector", "model.image_newline"),
}
_QWEN = {
    "vision": ("model.visual",),
    "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
}
_IDEFICS = {"vision": ("model.vision_model",), "projector": ("model.connector",)}

STAGE_PREFIXES: dict[str, dict[str, tuple[str, ...]]] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "internvl": _LLAVA,
    "gemma3": _LLAVA,
    "gemma4": {
        "vision": ("model.vision_tower",),
        "projector": ("model.embed_vision",),
        "audio": ("model.audio_tower", "model.embed_audio"),
    },
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen4_exp": _QWEN,
}
"""``config.model_type`` -> stage -> module prefixes; the longest match wins, everything else is ``language``.

``audio`` is no stage of ours: no prompt has sound, so what reads it is never trained and gets no adapter."""


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
    """Take the parameters of ``stages``, and those that no prompt reaches, out of training."""
    frozen = {*stages, "audio"}
    for name, parameter in model.named_parameters():
        if stage_of(model_type, name) in frozen:
            parameter.requires_grad_(False)
