"""LLaVA-OneVision, with the tiles of the LLaVA-NeXT of these tests and at most 2 tiles' worth of features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from families import without_video
from families.llava_next import PATCH, PINPOINTS, TILE, Tower, class_tokens, strategy, vision_config

MODEL_TYPE = "llava_onevision"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SIZE = {"height": TILE, "width": TILE}
_BUDGET = "anyres_max_2"


def build(
    folder: str | Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    chat_template: str = tiny.LLAVA_TEMPLATE,
    layers: int = 2,
    tie: bool = False,
    tower: Tower = "siglip",
) -> Path:
    """Tower -> two-layer projector -> Qwen2; an image takes 12 to 37 tokens, one of several 10."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config

    tokenizer = tokenizer or tiny.make_tokenizer()
    config = LlavaOnevisionConfig(
        vision_config=vision_config(tower),
        text_config=Qwen2Config(**tiny._text_settings(tokenizer, layers, tie)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=_BUDGET,
        vision_feature_select_strategy=strategy(tower),
        tie_word_embeddings=tie,
    )
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (TILE // PATCH) ** 2 + class_tokens(tower),
        "vision_feature_select_strategy": strategy(tower),
        "vision_aspect_ratio": _BUDGET,
        "image_token": "<image>",
        "video_token": "<|video_pad|>",
    }
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": _SIZE,
            "image_grid_pinpoints": PINPOINTS,
        },
        "processor_config.json": processor,
        "video_preprocessor_config.json": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "size": _SIZE,
        },
    }
    return tiny._save(
        folder, LlavaOnevisionForConditionalGeneration, config, tokenizer, chat_template, files, seed
    )


def reference(folder: Path) -> Any:
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    del settings["processor_class"]
    return without_video("LlavaOnevisionProcessor", folder, **settings)
