"""A model folder or hub id -> a ready :class:`MultimodalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from uniopd_mm.errors import ConfigError
from uniopd_mm.models.stages import STAGE_PREFIXES, freeze_stages, stage_of
from uniopd_mm.models.wrapper import MultimodalLM
from uniopd_mm.processors import get_processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        model = _add_lora(model, model_type, settings.lora, settings.freeze)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"student.freeze={settings.freeze} leaves nothing to train in {settings.model}")
    return model


def attention_implementation(choice: str) -> str:
    """``auto`` -> flash_attention_2 on a GPU where it is installed, else sdpa; an explicit choice is kept."""
    if choice != "auto":
        return choice
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"


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
        attn_implementation=attention_implementation(settings.attention),
    )


def _assert_no_dropout(model: PreTrainedModel) -> None:
    for name, value in model.config.to_dict().items():
        if "dropout" in name and value:
            raise ConfigError(
                f"{name}={value} in the student's config: sampling and training would differ; set it to 0"
            )


def _add_lora(
    model: PreTrainedModel, model_type: str, lora: LoraConfig, frozen: list[str]
) -> PreTrainedModel:
    try:
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError('student.lora needs peft: pip install "uniopd-mm[lora]"') from error
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and stage_of(model_type, name) in lora.stages
        and module is not model.get_output_embeddings()
        and (lora.targets is None or name.rsplit(".", 1)[-1] in lora.targets)
    ]
    if not names:
        raise ConfigError(
            f"student.lora: no linear layer matches stages={lora.stages}, targets={lora.targets}"
        )
    trained = {
        n for n, p in model.named_parameters() if stage_of(model_type, n) not in {*lora.stages, *frozen}
    }
    peft_model = get_peft_model(
        model,
        PeftLoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names),
    )
    for (
        name,
        parameter,
    ) in peft_model.named_parameters():  # stages without an adapter stay as `freeze` left them
        if name.removeprefix("base_model.model.") in trained:
            parameter.requires_grad_(True)
    return peft_model
