"""SmolVLM, as the 256M and 500M models: one token for each row and column, and for the whole image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

from families import idefics3, without_video

MODEL_TYPE = "smolvlm"
CHAT_TEMPLATE = idefics3.SMOLVLM_CHAT_TEMPLATE
_TOKENS = (
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
)


def build(
    folder: str | Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    chat_template: str = idefics3.SIMPLE_TEMPLATE,
    layers: int = 2,
    tie: bool = False,
) -> Path:
    """Up to 3 x 3 tiles and the whole image, 4 tokens each; video settings beside those of images."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    tokenizer = idefics3.add_special_tokens(tokenizer or tiny.make_tokenizer(), _TOKENS)
    config = idefics3.make_config(SmolVLMConfig, tokenizer, layers, tie)
    video = {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": idefics3.TILE}}
    files = idefics3.make_files("SmolVLM", longest_edge=3 * idefics3.TILE, video_sampling=video)
    return tiny._save(folder, SmolVLMForConditionalGeneration, config, tokenizer, chat_template, files, seed)


class WithoutVideo:
    """The family's own processor; its apply_chat_template is the one of all processors, because the family's reads
    frames per second from a video processor first."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        from transformers import ProcessorMixin

        return ProcessorMixin.apply_chat_template(self.processor, *args, **kwargs)


def reference(folder: Path) -> Any:
    from transformers import ProcessorMixin

    settings, _ = ProcessorMixin.get_processor_dict(folder)
    return WithoutVideo(without_video("SmolVLMProcessor", folder, image_seq_len=settings["image_seq_len"]))
