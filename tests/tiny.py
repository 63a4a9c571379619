"""Tiny random models for the tests of every room: weights, tokenizer, processor, chat template in one folder.

    build_llava(folder, seed=0, *, tokenizer=None, chat_template=..., image_size=56, layers=2, tie=False)
    build_qwen2_5_vl(folder, seed=0, *, tokenizer=None, chat_template=..., min_pixels=..., max_pixels=...,
                     layers=2, tie=False)
    build_qwen3_vl(folder, seed=0, *, the same)
    build_text(folder, seed=0, *, family="qwen3" | "llama", tokenizer=None, chat_template=..., layers=2, tie=False)
    make_tokenizer(vocab_size=512, kind="bytes" | "byte_fallback", seed=0) -> PreTrainedTokenizerFast
    random_image(width, height, seed=0) -> RGB PIL image

Each builder returns its folder as a ``pathlib.Path``; ``get_processor(folder)`` and ``from_pretrained(folder)``
load it.  All models share the vocabulary of ``make_tokenizer()`` unless given another, also across families;
hidden size 64; ``seed`` only changes the weights.  LLaVA: an image is always ``(image_size / 14) ** 2`` = 16
tokens.  Qwen: one token per 28 x 28 (2.5) or 32 x 32 (3) pixels after resizing, 4 to 16 of them by default.
Nothing is downloaded.
"""

from __future__ import annotations

import copy
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS)

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE_SLOT{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAVA_TEMPLATE = _TEMPLATE.replace("IMAGE_SLOT", "<image>\n")
QWEN_VL_TEMPLATE = _TEMPLATE.replace("IMAGE_SLOT", "<|vision_start|><|image_pad|><|vision_end|>")
TEXT_TEMPLATE = _TEMPLATE.replace("IMAGE_SLOT", "")

_WORDS = (
    "the answer is a red green blue square circle triangle on left of right above below how many what colour "
    "shape image "
    "picture chart shows value sum total count digit number because therefore so we see that first second "
    "step equals"
)
_TEXT_SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_HEAD_DIM = 16
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def random_image(width: int, height: int, seed: int = 0) -> Any:
    """Smooth random colours (noise would not survive resizing), the same for the same arguments on every
    machine."""
    import numpy as np
    from PIL import Image

    coarse = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def make_tokenizer(
    vocab_size: int = 512, kind: Literal["bytes", "byte_fallback"] = "bytes", seed: int = 0
) -> Any:
    """Trained BPE tokenizer with the special tokens of every family here; other ``seed`` or size: other
    merges.

    bytes: byte-level, like Qwen and Llama 3.  byte_fallback: SentencePiece style, like Llama 2.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_trained_backend(vocab_size, kind, seed),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", *VISION_TOKENS],
        model_max_length=4096,
    )


def build_llava(
    folder: str | Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    chat_template: str = LLAVA_TEMPLATE,
    image_size: int = 56,
    layers: int = 2,
    tie: bool = False,
) -> Path:
    """CLIP tower -> two-layer projector -> Llama, as in LLaVA 1.5; needs no torchvision."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = tokenizer or make_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=image_size,
            patch_size=14,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=32,
        ),
        text_config=LlamaConfig(**_text_settings(tokenizer, layers, tie)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // 14) ** 2,
        tie_word_embeddings=tie,
    )
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    files = {"preprocessor_config.json": images, "processor_config.json": processor}
    return _save(folder, LlavaForConditionalGeneration, config, tokenizer, chat_template, files, seed)


def build_qwen2_5_vl(
    folder: str | Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    chat_template: str = QWEN_VL_TEMPLATE,
    min_pixels: int = 4 * 28 * 28,
    max_pixels: int = 16 * 28 * 28,
    layers: int = 2,
    tie: bool = False,
) -> Path:
    """Qwen2.5-VL: window attention with one full-attention block, multimodal rotary positions."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = tokenizer or make_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={**_text_settings(tokenizer, layers, tie), "rope_parameters": _MROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=tie,
        **_qwen_token_ids(tokenizer),
    )
    files = _qwen_files(
        "Qwen2_5_VLProcessor", 14, _CLIP_MEAN, _CLIP_STD, {"min_pixels": min_pixels, "max_pixels": max_pixels}
    )
    return _save(folder, Qwen2_5_VLForConditionalGeneration, config, tokenizer, chat_template, files, seed)


def build_qwen3_vl(
    folder: str | Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
    chat_template: str = QWEN_VL_TEMPLATE,
    min_pixels: int = 4 * 32 * 32,
    max_pixels: int = 16 * 32 * 32,
    layers: int = 2,
    tie: bool = False,
) -> Path:
    """Qwen3-VL: interleaved multimodal rotary positions and deepstack features from both vision blocks."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = tokenizer or make_tokenizer()
    config = Qwen3VLConfig(
        text_config={
            **_text_settings(tokenizer, max(layers, 2), tie),
            "head_dim": _HEAD_DIM,
            "rope_parameters": {**_MROPE, "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=tie,
        **_qwen_token_ids(tokenizer),
    )
    size = {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}
    files = _qwen_files("Qwen3VLProcessor", 16, [0.5] * 3, [0.5] * 3, size)
    return _save(folder, Qwen3VLForConditionalGeneration, config, tokenizer, chat_template, files, seed)


def build_text(
    folder: str | Path,
    seed: int = 0,
    *,
    family: Literal["qwen3", "llama"] = "qwen3",
    tokenizer: Any = None,
    chat_template: str | None = TEXT_TEMPLATE,
    layers: int = 2,
    tie: bool = False,
) -> Path:
    """Text-only causal LM; ``chat_template=None`` leaves it without one, like a base model."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = tokenizer or make_tokenizer()
    settings = _text_settings(tokenizer, layers, tie)
    if family == "qwen3":
        config = Qwen3Config(**settings, head_dim=_HEAD_DIM)
        return _save(folder, Qwen3ForCausalLM, config, tokenizer, chat_template, {}, seed)
    return _save(folder, LlamaForCausalLM, LlamaConfig(**settings), tokenizer, chat_template, {}, seed)


def _text_settings(tokenizer: Any, layers: int, tie: bool) -> dict[str, Any]:
    return dict(
        _TEXT_SIZE,
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        tie_word_embeddings=tie,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _qwen_token_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _qwen_files(
    processor: str, patch_size: int, mean: list[float], std: list[float], size: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    common = {
        "processor_class": processor,
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": mean,
        "image_std": std,
    }
    video = "Qwen2VLVideoProcessor" if patch_size == 14 else "Qwen3VLVideoProcessor"
    return {
        "preprocessor_config.json": {**common, **size, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {**common, "video_processor_type": video},
    }


def _save(
    folder: str | Path,
    model_class: Any,
    config: Any,
    tokenizer: Any,
    chat_template: str | None,
    files: dict[str, dict[str, Any]],
    seed: int,
) -> Path:
    """Random weights whose logits differ between tokens and between prompts (without touching the global
    generator), and the processor files laid out as on the hub."""
    import torch

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.08)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


@lru_cache(maxsize=8)
def _training_text(seed: int) -> list[str]:
    draw = random.Random(seed)
    words = _WORDS.split()
    draw.shuffle(words)
    words = words[: 2 * len(words) // 3] if seed else words
    return [
        " ".join(str(draw.randint(0, 99)) if draw.random() < 0.2 else draw.choice(words) for _ in range(12))
        + "."
        for _ in range(400)
    ]


def _trained_backend(vocab_size: int, kind: str, seed: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special, alphabet = list(SPECIAL_TOKENS), pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bytes_ = [f"<0x{value:02X}>" for value in range(256)]
        special, alphabet = (
            ["<unk>", *SPECIAL_TOKENS, *bytes_],
            [chr(c) for c in range(33, 127)] + ["▁", "\n"],
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_training_text(seed), trainer)
    return backend
