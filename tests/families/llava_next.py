"""LLaVA-NeXT.  A tile is 42 pixels wide and 3 x 3 features, an image has 2 to 4 of them beside the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import tiny

from families import auto_processor

MODEL_TYPE = "llava_next"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '<\\\\s> '}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

TILE = 42
PATCH = 14
PINPOINTS = [[TILE * high, TILE * wide] for high, wide in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]
Tower = Literal["clip", "siglip"]


def build(
    folder: str | Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    chat_template: str = tiny.LLAVA_TEMPLATE,
    layers: int = 2,
    tie: bool = False,
    tower: Tower = "clip",
) -> Path:
    """Tower -> two-layer projector -> Llama; an image takes 12 to 51 tokens."""
    from transformers import LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    tokenizer = tokenizer or tiny.make_tokenizer()
    config = LlavaNextConfig(
        vision_config=vision_config(tower),
        text_config=LlamaConfig(**tiny._text_settings(tokenizer, layers, tie)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(TILE // PATCH) ** 2,
        vision_feature_select_strategy=strategy(tower),
        tie_word_embeddings=tie,
    )
    images = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": TILE},
        "crop_size": {"height": TILE, "width": TILE},
        "image_grid_pinpoints": PINPOINTS,
    }
    processor = {
        "processor_class": "LlavaNextProcessor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": strategy(tower),
        "num_additional_image_tokens": class_tokens(tower),
        "image_token": "<image>",
    }
    files = {"preprocessor_config.json": images, "processor_config.json": processor}
    return tiny._save(
        folder, LlavaNextForConditionalGeneration, config, tokenizer, chat_template, files, seed
    )


def reference(folder: Path) -> Any:
    return auto_processor(folder)


def vision_config(tower: Tower) -> Any:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    size: dict[str, Any] = {
        "image_size": TILE,
        "patch_size": PATCH,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    if tower == "clip":
        return CLIPVisionConfig(**size, projection_dim=32)
    return SiglipVisionConfig(**size, vision_use_head=False)


def class_tokens(tower: Tower) -> int:
    """What the tower puts before the patches."""
    return 1 if tower == "clip" else 0


def strategy(tower: Tower) -> Literal["default", "full"]:
    """``default`` drops the first feature, which must be a class token."""
    return "default" if tower == "clip" else "full"
