"""One file per model family: a tiny random model, the published chat template, and the family's own processor.

Every module has

    MODEL_TYPE      config.model_type
    CHAT_TEMPLATE   the published one, without tool calls, as the parity tests use it
    build(folder, seed=0, *, tokenizer=None, chat_template=..., layers=2, tie=False) -> Path
                    weights, tokenizer, processor files and chat template laid out as on the hub
    reference(folder)
                    the family's own Hugging Face processor, built without torchvision

``FAMILIES`` names them all; ``family(name)`` imports one.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "internvl",
    "gemma3",
    "gemma4",
    "idefics3",
    "smolvlm",
)


def family(name: str) -> ModuleType:
    return importlib.import_module(f"families.{name}")


def auto_processor(folder: Any) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def without_video(processor_class: str, folder: Any, **settings: Any) -> Any:
    """The family's processor class without its video half, which exists only beside torchvision."""
    import transformers

    base = getattr(transformers, processor_class)

    class WithoutVideo(base):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return WithoutVideo(
        transformers.AutoImageProcessor.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
        None,
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings,
    )
