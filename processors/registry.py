"""Which adapter serves which model: found by the ``model_type`` of config.json, never by a name or path."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from uniopd_mm.processors.base import VLMProcessor
from uniopd_mm.processors.errors import ProcessorError

_Adapter = TypeVar("_Adapter", bound=type[VLMProcessor])

_BUILT_IN = {
    "llava": "llava:LlavaAdapter",
    "llava_next": "llava_next:LlavaNextAdapter",
    "llava_onevision": "llava_onevision:LlavaOnevisionAdapter",
    "qwen2_vl": "qwen_vl:QwenVLAdapter",
    "qwen2_5_vl": "qwen_vl:QwenVLAdapter",
    "qwen3_vl": "qwen_vl:QwenVLAdapter",
    "qwen3_vl_moe": "qwen_vl:QwenVLAdapter",
    "qwen3_5": "qwen_vl:QwenVLAdapter",
    "qwen3_5_moe": "qwen_vl:QwenVLAdapter",
    "qwen4_exp": "qwen_vl:QwenVLAdapter",
    "internvl": "internvl:InternVLAdapter",
    "gemma3": "gemma3:Gemma3Adapter",
    "gemma4": "gemma4:Gemma4Adapter",
    "idefics3": "idefics3:Idefics3Adapter",
    "smolvlm": "idefics3:Idefics3Adapter",
}
"""config.model_type -> module of this package and class."""
_TEXT_ONLY = "text:TextAdapter"
_registered: dict[str, type[VLMProcessor]] = {}


def register_processor(model_type: str, *, replace: bool = False) -> Callable[[_Adapter], _Adapter]:
    """Class decorator: serve models of this ``model_type`` (config.json); ``replace`` takes a family over."""

    def register(adapter: _Adapter) -> _Adapter:
        if not (isinstance(adapter, type) and issubclass(adapter, VLMProcessor)):
            raise ProcessorError(
                f"register_processor({model_type!r}) got {adapter!r}; expected a subclass of VLMProcessor."
            )
        if (model_type in _registered or model_type in _BUILT_IN) and not replace:
            raise ProcessorError(
                f"There is already a processor for model type {model_type!r}.  To take it over: "
                f"@register_processor({model_type!r}, replace=True)."
            )
        _registered[model_type] = adapter
        return adapter

    return register


def get_processor(
    path_or_id: str | Path,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    revision: str | None = None,
    template: dict[str, Any] | None = None,
) -> VLMProcessor:
    """Adapter of the model in a Hugging Face folder or hub repository.

    ``min_pixels`` / ``max_pixels``: image area after resizing, for families that resize freely (Qwen).
    ``template``:
    extra variables of the chat template, e.g. ``{"enable_thinking": False}``.
    """
    model_type = _read_model_type(path_or_id, revision)
    return _find_adapter(model_type).from_pretrained(
        path_or_id, min_pixels=min_pixels, max_pixels=max_pixels, revision=revision, template=template
    )


def _read_model_type(path_or_id: str | Path, revision: str | None) -> str:
    from transformers import PreTrainedConfig

    path = Path(path_or_id).expanduser()
    if not path.exists() and (
        isinstance(path_or_id, Path) or path.is_absolute() or str(path_or_id).startswith(".")
    ):
        raise ProcessorError(
            f"There is no folder {path}.  Pass a Hugging Face model folder, or a hub id such as org/name."
        )
    try:
        settings, _ = PreTrainedConfig.get_config_dict(path_or_id, revision=revision)
    except OSError as error:
        raise ProcessorError(f"No model configuration at {str(path_or_id)!r}: {error}") from error
    if not settings.get("model_type"):
        raise ProcessorError(
            f"{str(path_or_id)!r} has no config.json with a model_type.  Pass the folder that "
            f"save_pretrained wrote "
            "(config.json, tokenizer and processor files), or a hub id."
        )
    return settings["model_type"]


def _find_adapter(model_type: str) -> type[VLMProcessor]:
    if model_type in _registered:
        return _registered[model_type]
    target = _BUILT_IN.get(model_type)
    if target is None and _is_text_only(model_type):
        target = _TEXT_ONLY
    if target is None:
        known = sorted({*_BUILT_IN, *_registered})
        near = difflib.get_close_matches(model_type, known, n=1)
        raise ProcessorError(
            f"No processor for model type {model_type!r}.  There is one for {', '.join(known)} and for "
            f"text-only "
            f"causal language models."
            + (f"  The nearest is {near[0]!r}." if near else "")
            + "  To add a family, see processors/README.md and @register_processor."
        )
    module, name = target.split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def _is_text_only(model_type: str) -> bool:
    """A causal language model of transformers that is not a multimodal model as well."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    return (
        model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )
