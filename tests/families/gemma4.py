"""Gemma 4, with the image attention of its large sizes and the per-layer embeddings of its small ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tiny

MODEL_TYPE = "gemma4"
CHAT_TEMPLATE = """{%- macro strip_thinking(text) -%}
    {%- set ns = namespace(result='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- if '<|channel>' in part -%}
            {%- set ns.result = ns.result + part.split('<|channel>')[0] -%}
        {%- else -%}
            {%- set ns.result = ns.result + part -%}
        {%- endif -%}
    {%- endfor -%}
    {{- ns.result | trim -}}
{%- endmacro -%}
{%- set loop_messages = messages -%}
{{- bos_token -}}
{%- if (enable_thinking is defined and enable_thinking) or messages[0]['role'] in ['system', 'developer'] -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking is defined and enable_thinking -%}
        {{- '<|think|>\\n' -}}
    {%- endif -%}
    {%- if messages[0]['role'] in ['system', 'developer'] -%}
        {%- if messages[0]['content'] is string -%}
            {{- messages[0]['content'] | trim -}}
        {%- elif messages[0]['content'] is sequence -%}
            {%- for item in messages[0]['content'] -%}
                {{- item['text'] | trim + ' '-}}
            {%- endfor -%}
        {%- endif -%}
        {%- set loop_messages = messages[1:] -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endif %}
{%- for message in loop_messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' }}
    {%- if message['content'] is string -%}
        {%- if role == 'model' -%}
            {{- strip_thinking(message['content']) -}}
        {%- else -%}
            {{- message['content'] | trim -}}
        {%- endif -%}
    {%- elif message['content'] is sequence -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {%- if role == 'model' -%}
                    {{- strip_thinking(item['text']) -}}
                {%- else -%}
                    {{- item['text'] | trim -}}
                {%- endif -%}
            {%- elif item['type'] == 'image' -%}
                {{- '<|image|>' -}}
            {%- elif item['type'] == 'audio' -%}
                {{- '<|audio|>' -}}
            {%- elif item['type'] == 'video' -%}
                {{- '<|video|>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
    {%- if not enable_thinking | default(false) -%}
        {{- '<|channel>thought\\n<channel|>' -}}
    {%- endif -%}
{%- endif -%}
"""
_TEMPLATE = tiny._TEMPLATE.replace("IMAGE_SLOT", "<|image|>")
_NAMED_TOKENS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
}
_CONFIG_TOKENS = {
    "image_token_id": "<|image|>",
    "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>",
    "video_token_id": "<|video|>",
    "audio_token_id": "<|audio|>",
    "boa_token_id": "<|audio>",
    "eoa_token_index": "<audio|>",
}
_GEOMETRY = {"patch_size": 4, "pooling_kernel_size": 3}


def build(
    folder: str | Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    chat_template: str = _TEMPLATE,
    layers: int = 2,
    tie: bool = False,
) -> Path:
    """Pooled vision tower -> Gemma 4 without audio tower; every image takes up to 70 tokens of 12 x 12 pixels.

    The tokenizer gets the family's special tokens behind its vocabulary.
    """
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    tokenizer = _with_named_tokens(tokenizer or tiny.make_tokenizer())
    layers = max(layers, 2)
    config = Gemma4Config(
        text_config={
            **tiny._text_settings(tokenizer, layers, tie),
            "head_dim": tiny._HEAD_DIM,
            "global_head_dim": 2 * tiny._HEAD_DIM,
            "layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"],
            "sliding_window": 128,
            "use_bidirectional_attention": "vision",
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": len(tokenizer),
            "final_logit_softcapping": 30.0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 256,
            **_GEOMETRY,
        },
        tie_word_embeddings=tie,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in _CONFIG_TOKENS.items()},
    )
    processor = {
        "processor_class": "Gemma4Processor",
        "image_seq_length": 70,
        "audio_seq_length": 750,
        "audio_ms_per_token": 40,
        "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor", "feature_size": 16},
        "image_processor": {
            "image_processor_type": "Gemma4ImageProcessor",
            "max_soft_tokens": 70,
            **_GEOMETRY,
        },
        "video_processor": {"video_processor_type": "Gemma4VideoProcessor", "num_frames": 4, **_GEOMETRY},
    }
    files = {"processor_config.json": processor}
    return tiny._save(folder, Gemma4ForConditionalGeneration, config, tokenizer, chat_template, files, seed)


def _with_named_tokens(tokenizer: Any) -> Any:
    """Copy of the tokenizer that names its tokens as Gemma 4's does."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer),
        bos_token=tokenizer.bos_token or "<bos>",
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=[*tokenizer.extra_special_tokens, "<|video|>"],
        model_specific_special_tokens=_NAMED_TOKENS,
        model_max_length=tokenizer.model_max_length,
    )


def reference(folder: Path) -> Any:
    """Gemma 4's processor with its audio half, and without its video half, which needs torchvision."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, Gemma4Processor

    class WithoutVideo(Gemma4Processor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return WithoutVideo(
        AutoFeatureExtractor.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        None,
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )
