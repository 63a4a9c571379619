"""Idefics3, as the 8B model: the tags of rows, columns and the whole image are spelled as text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny

from families import auto_processor

MODEL_TYPE = "idefics3"
_MESSAGES = (
    "{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHAT_TEMPLATE = f"<|begin_of_text|>{_MESSAGES}"
SMOLVLM_CHAT_TEMPLATE = f"<|im_start|>{_MESSAGES}"
SIMPLE_TEMPLATE = tiny.LLAVA_TEMPLATE.replace("<image>\n", "<image>")
TILE, PATCH, SCALE = 32, 8, 2
"""Pixels, pixels, patches: a tile is (32 / 8 / 2) ** 2 = 4 tokens."""


def build(
    folder: str | Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    chat_template: str = SIMPLE_TEMPLATE,
    layers: int = 2,
    tie: bool = False,
) -> Path:
    """Up to 2 x 2 tiles and the whole image, 4 tokens each."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    tokens = ("<fake_token_around_image>", "<end_of_utterance>")
    tokenizer = add_special_tokens(tokenizer or tiny.make_tokenizer(), tokens)
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    config = make_config(Idefics3Config, tokenizer, layers, tie)
    files = make_files("Idefics3", longest_edge=2 * TILE)
    return tiny._save(folder, Idefics3ForConditionalGeneration, config, tokenizer, chat_template, files, seed)


def reference(folder: Path) -> Any:
    return auto_processor(folder)


def add_special_tokens(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """A copy with more special tokens behind its vocabulary."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def make_config(config_class: Any, tokenizer: Any, layers: int, tie: bool) -> Any:
    return config_class(
        text_config={"model_type": "llama", **tiny._text_settings(tokenizer, layers, tie)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        scale_factor=SCALE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tie,
    )


def make_files(family: str, longest_edge: int, **image_settings: Any) -> dict[str, dict[str, Any]]:
    images = {
        "image_processor_type": f"{family}ImageProcessor",
        "processor_class": f"{family}Processor",
        "do_image_splitting": True,
        "size": {"longest_edge": longest_edge},
        "max_image_size": {"longest_edge": TILE},
        **image_settings,
    }
    processor = {"processor_class": f"{family}Processor", "image_seq_len": (TILE // PATCH // SCALE) ** 2}
    return {"preprocessor_config.json": images, "processor_config.json": processor}
