"""Tokenizer, processor and models of the quickstart: real transformers architectures, a few hundred thousand weights.

All models share one tokenizer.  Everything is saved with ``save_pretrained``, so it loads like any hub model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from task import CANVAS_SIDE, PHRASES, SCAN_SIDE, Question, chain, image_text

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedModel, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|pad|>"
PIECES = r" ?\\boxed\{| ?[A-Za-z]+|\d|\s|[^\sA-Za-z\d]+"
"""What the tokenizer never merges across: the opening of a boxed answer, words, single digits, blanks, the rest."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML; the parts of a turn stand on lines of their own."""


FULL_INK_VALUE = -4.0
"""Pixel value of full ink after the processor."""
PLACE_STD = 0.3
"""Initial spread of the tower's position embeddings: that of a patch's own embedding, so that places show at once."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of one model; the vision sizes are unused by a text-only one."""

    kind: Literal["llava", "text"]
    hidden: int
    layers: int
    heads: int
    mlp: int
    vision_hidden: int = 0
    vision_layers: int = 0
    vision_heads: int = 1
    vision_mlp: int = 0
    patch: int = SCAN_SIDE
    """Pixels of a patch's side after resizing."""


def corpus() -> list[str]:
    """The text the tokenizer's merges are learnt from: every phrase and a few chains, in our own chat format."""
    texts = [phrase for phrases in PHRASES.values() for phrase in phrases]
    texts += [chain(Question(kind, (5, 1, 3))) for kind in PHRASES]
    texts += [image_text((3, 5)), "user\n", "assistant\n", "system\n"]
    return texts


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text tokenizes, common words of the task are single tokens, every digit is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    bpe.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (TURN_START, TURN_END, PAD, IMAGE_TOKEN)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor(tokenizer: PreTrainedTokenizerFast, patch: int) -> LlavaProcessor:
    """Picture -> pixel values of exactly one pixel per scan pixel: paper 0, full ink ``FULL_INK_VALUE``.

    With paper at zero an empty cell tells its place and nothing else, which a fresh tower learns from much faster.
    """
    from PIL import Image
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(
        size={"shortest_edge": CANVAS_SIDE},
        crop_size={"height": CANVAS_SIDE, "width": CANVAS_SIDE},
        resample=Image.Resampling.BOX,
        image_mean=[1.0, 1.0, 1.0],
        image_std=[-1 / FULL_INK_VALUE] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def build_model(shape: ModelShape, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A freshly initialised model of ``shape``: LLaVA (CLIP tower + Llama) or a plain Qwen3."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(seed)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    language = dict(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=256,
        initializer_range=shape.hidden**-0.5 / 2,
        tie_word_embeddings=True,
        **special,
    )
    if shape.kind == "text":
        model = Qwen3ForCausalLM(Qwen3Config(**language))
    else:
        vision = CLIPVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=shape.vision_mlp,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=CANVAS_SIDE,
            patch_size=shape.patch,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**language),
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=(CANVAS_SIDE // shape.patch) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
        model = LlavaForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=PLACE_STD)
    model.generation_config = GenerationConfig(**special)
    return model


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shape: ModelShape, folder: Path) -> None:
    """Everything that ``from_pretrained`` needs: weights, configs, tokenizer, chat template, and the processor."""
    model.save_pretrained(folder)
    if shape.kind == "llava":
        build_processor(tokenizer, shape.patch).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
