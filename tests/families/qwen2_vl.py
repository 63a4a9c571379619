"""Qwen2-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

from families import without_video

MODEL_TYPE = "qwen2_vl"
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in "
    "messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ "
    "message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value "
    "}}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value "
    "}}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(
    folder: str | Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    chat_template: str = tiny.QWEN_VL_TEMPLATE,
    min_pixels: int = 4 * 28 * 28,
    max_pixels: int = 16 * 28 * 28,
    layers: int = 2,
    tie: bool = False,
) -> Path:
    """Full attention in the vision tower, multimodal rotary positions; 4 to 16 tokens an image."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = tokenizer or tiny.make_tokenizer()
    config = Qwen2VLConfig(
        text_config={**tiny._text_settings(tokenizer, layers, tie), "rope_parameters": tiny._MROPE},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 14,
        },
        tie_word_embeddings=tie,
        **tiny._qwen_token_ids(tokenizer),
    )
    size = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    files = tiny._qwen_files("Qwen2VLProcessor", 14, tiny._CLIP_MEAN, tiny._CLIP_STD, size)
    return tiny._save(folder, Qwen2VLForConditionalGeneration, config, tokenizer, chat_template, files, seed)


def reference(folder: Path) -> Any:
    return without_video("Qwen2VLProcessor", folder)
