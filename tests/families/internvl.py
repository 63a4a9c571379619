"""InternVL 3.  A tile is 56 pixels wide and 4 tokens, an image has up to 4 of them beside the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from families import without_video

MODEL_TYPE = "internvl"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
SIMPLE_TEMPLATE = tiny.LLAVA_TEMPLATE.replace("<image>", "<IMG_CONTEXT>")

TILE, PATCH, TOKENS_PER_TILE = 56, 14, 4
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def build(
    folder: str | Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    chat_template: str = SIMPLE_TEMPLATE,
    layers: int = 2,
    tie: bool = False,
) -> Path:
    """InternViT -> pixel shuffle -> two-layer projector -> Qwen2."""
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        Qwen2Config,
    )

    tokenizer = with_named_tokens(
        tokenizer or tiny.make_tokenizer(),
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            image_size=TILE,
            patch_size=PATCH,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        text_config=Qwen2Config(**tiny._text_settings(tokenizer, layers, tie)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=0.5,
        tie_word_embeddings=tie,
    )
    shared = {"size": {"height": TILE, "width": TILE}, "image_mean": _MEAN, "image_std": _STD}
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": False,  # as published; the family's processor turns it on in every call
            "min_patches": 1,
            "max_patches": 4,
            **shared,
        },
        "processor_config.json": {
            "processor_class": "InternVLProcessor",
            "image_seq_length": TOKENS_PER_TILE,
        },
        "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", **shared},
    }
    return tiny._save(folder, InternVLForConditionalGeneration, config, tokenizer, chat_template, files, seed)


def reference(folder: Path) -> Any:
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    return without_video("InternVLProcessor", folder, image_seq_length=settings["image_seq_length"])


def with_named_tokens(tokenizer: Any, **settings: Any) -> Any:
    """A copy whose special tokens have names (``start_image_token="<img>"``): the families' own processors look
    them up as attributes.  Tokens that it lacks are put behind its vocabulary."""
    from transformers import PreTrainedTokenizerFast

    kept = ("bos_token", "eos_token", "pad_token", "unk_token", "extra_special_tokens", "model_max_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{**{name: getattr(tokenizer, name) for name in kept}, **settings},
    )
