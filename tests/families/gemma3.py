"""Gemma 3.  An image is 56 pixels wide and 4 soft tokens; line breaks in a row are one token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from families import auto_processor
from families.internvl import with_named_tokens

MODEL_TYPE = "gemma3"
CHAT_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
SIMPLE_TEMPLATE = "{{ bos_token }}" + tiny.LLAVA_TEMPLATE.replace("<image>\n", "<start_of_image>")

SIDE, PATCH, SOFT_TOKENS = 56, 14, 4


def build(
    folder: str | Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    chat_template: str = SIMPLE_TEMPLATE,
    layers: int = 2,
    tie: bool = False,
    pan_and_scan: bool | None = None,
) -> Path:
    """SigLIP tower -> average pooling -> linear projector -> Gemma 3, layers with and without a window in turn.

    ``pan_and_scan``: crops from 20 pixels on; None as published, off.
    """
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    tokenizer = _make_tokenizer(tokenizer or tiny.make_tokenizer())
    kinds = ("sliding_attention", "full_attention")
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vision_use_head=False,
        ),
        text_config=Gemma3TextConfig(
            **tiny._text_settings(tokenizer, layers, tie),
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=32,
            layer_types=[kinds[layer % 2] for layer in range(layers)],
        ),
        mm_tokens_per_image=SOFT_TOKENS,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=tie,
    )
    images = {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_convert_rgb": None,
        "do_pan_and_scan": pan_and_scan,
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None if pan_and_scan is None else 20,
        "pan_and_scan_min_ratio_to_activate": None,
    }
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": SOFT_TOKENS}
    files = {"preprocessor_config.json": images, "processor_config.json": processor}
    return tiny._save(folder, Gemma3ForConditionalGeneration, config, tokenizer, chat_template, files, seed)


def reference(folder: Path) -> Any:
    """Told in every call what preprocessor_config.json says of pan and scan, which it ignores by itself."""
    from transformers import Gemma3Processor

    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    defaults = Gemma3Processor.images_kwargs
    given = {name: settings[name] for name in defaults if settings.get(name) is not None}
    if not given.get("do_pan_and_scan"):
        return auto_processor(folder)

    class PanAndScan(Gemma3Processor):
        images_kwargs = defaults | given

    return PanAndScan.from_pretrained(folder)


def _make_tokenizer(tokenizer: Any) -> Any:
    """Like the published one: it puts <bos> before every text, and line breaks in a row are one token."""
    from tokenizers import AddedToken

    tokenizer = with_named_tokens(
        tokenizer,
        bos_token=tokenizer.bos_token or "<bos>",
        add_bos_token=True,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in range(2, 6)])
    return tokenizer
