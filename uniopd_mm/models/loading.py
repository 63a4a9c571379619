"""A model folder or hub id -> a ready :class:`MultimodalLM`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from uniopd_mm.errors import ConfigError
from uniopd_mm.models.stages import STAGE_PREFIXES, freeze_stages, stage_of
from uniopd_mm.models.wrapper import MultimodalLM
from uniopd_mm.processors import get_processor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from uniopd_mm.config import LoraConfig, ModelConfig, StudentConfig
    from uniopd_mm.processors import VLMProcessor


def load_processor(settings: ModelConfig) -> VLMProcessor:
    """The processor adapter of a model, with the pixel budget and template variables of its settings."""
    return get_processor(
        settings.model,
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
        revision=settings.revision,
        template=settings.template,
    )


def load_model(settings: ModelConfig, device: torch.device) -> MultimodalLM:
    """Weights and processor of one model, in evaluation mode, without gradient."""
    return _wrap(load_weights(settings).to(device).eval().requires_grad_(False), settings)


def load_student(settings: StudentConfig, seed: int = 0) -> MultimodalLM:
    """The student with its frozen stages and adapters (random by ``seed``) set up; weights stay where
    ``from_pretrained`` puts them (DeepSpeed moves, or under ZeRO-3 has already partitioned, them)."""
    return _wrap(build_student(settings, seed), settings)


def _wrap(model: PreTrainedModel, settings: ModelConfig) -> MultimodalLM:
    return MultimodalLM(model, load_processor(settings), settings.shared_prefix, settings.vision_cache_mib)


def build_student(settings: StudentConfig, seed: int = 0) -> PreTrainedModel:
    """The student's transformers model, frozen stages and adapters (random by ``seed``) set up."""
    # Dropout would make the sampler and the trainer different functions: evaluation mode, always.
    model = load_weights(settings).eval()
    model_type = model.config.model_type
    freeze_stages(model, model_type, settings.freeze)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        _assert_no_dropout(model)
    if settings.lora is not None:
        torch.manual_seed(seed)  # here, because loading may or may not have drawn random numbers
        model = _add_lora(model, model_type, settings.lora)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"student.freeze={settings.freeze} leaves nothing to train in {settings.model}")
    return model


def attention_implementation(choice: str, config: PreTrainedConfig) -> dict[str, str]:
    """``auto`` -> flash_attention_2 on a GPU where it is installed, else sdpa; an explicit choice is kept.  For the
    model and its parts, but for one that hears: nothing is said to it, and not every kind of attention runs there."""
    if choice == "auto":
        from transformers.utils import is_flash_attn_2_available

        has_flash = torch.cuda.is_available() and is_flash_attn_2_available()
        choice = "flash_attention_2" if has_flash else "sdpa"
    return {part: choice for part in ("", *config.sub_configs) if part != "audio_config"}


def load_weights(settings: ModelConfig) -> PreTrainedModel:
    """The stock transformers model; partitioned while a ZeRO-3 configuration is held."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    config = AutoConfig.from_pretrained(settings.model, revision=settings.revision)
    is_multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM
    if is_multimodal and config.model_type not in STAGE_PREFIXES:
        raise ConfigError(
            f"{settings.model}: no wrapper for model_type '{config.model_type}'; supported multimodal types: "
            f"{', '.join(STAGE_PREFIXES)}"
        )
    return auto.from_pretrained(
        settings.model,
        revision=settings.revision,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=attention_implementation(settings.attention, config),
    )


def _assert_no_dropout(model: PreTrainedModel) -> None:
    config = model.config
    parts = {"": config} | {f"{name}.": getattr(config, name, None) for name in config.sub_configs}
    for part, settings in parts.items():
        for name, value in settings.to_dict().items() if settings is not None else ():
            if "dropout" in name and value:
                raise ConfigError(
                    f"{part}{name}={value} in the student's config: sampling and training would differ; set it to 0"
                )


def _add_lora(model: PreTrainedModel, model_type: str, lora: LoraConfig) -> PreTrainedModel:
    try:
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError('student.lora needs peft: pip install "uniopd-mm[lora]"') from error
    # Stages without an adapter stay as `freeze` left them; peft freezes all.
    trained = {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and stage_of(model_type, name) not in lora.stages
    }
    peft_model = get_peft_model(
        model,
        PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=_adapted_layers(model, model_type, lora),
        ),
    )
    for name, parameter in peft_model.named_parameters():
        if name.removeprefix("base_model.model.") in trained:
            parameter.requires_grad_(True)
    return peft_model


def _adapted_layers(model: PreTrainedModel, model_type: str, lora: LoraConfig) -> list[str]:
    """Names of the linear layers that get an adapter."""
    linear: dict[str, list[str]] = {stage: [] for stage in lora.stages}
    for name, module in model.named_modules():
        stage = stage_of(model_type, name)
        is_head = module is model.get_output_embeddings()
        if isinstance(module, torch.nn.Linear) and stage in linear and not is_head:
            linear[stage].append(name)
    bare = [stage for stage, names in linear.items() if not names]
    if bare:
        raise ConfigError(
            f"student.lora.stages: {', '.join(bare)} of {model_type} has no linear layer to adapt; take it out of "
            "lora.stages (and of student.freeze to train it whole)"
        )
    names = [
        name
        for name in itertools.chain.from_iterable(linear.values())
        if lora.targets is None or name.rsplit(".", 1)[-1] in lora.targets
    ]
    if not names:
        raise ConfigError(
            f"student.lora: no linear layer matches stages={lora.stages}, targets={lora.targets}"
        )
    return names


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens that prompt and response may have together, of a text configuration: ``max_position_embeddings``, or more
    where YaRN (arXiv 2309.00071) stretches them; None = the model does not say."""
    stated = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if stated is None or rope.get("rope_type") != "yarn":
        return stated
    return max(stated, int(rope["factor"] * rope.get("original_max_position_embeddings", stated)))
