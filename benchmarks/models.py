"""Small LLaVA models with random weights, their tokenizer, and prompts with pictures: the same folder for both systems.

A folder ``<size>-<image tokens>`` holds ``student/``, ``teacher/`` (the same family and vocabulary, more weights),
``prompts.jsonl`` and ``images/``.  Same versions of the libraries, same bytes.

Responses are forced to their full length on both sides.  The peer is told so when it generates; our sampler stops only
at the stop tokens of the model's generation settings, so those name one id that no sampler can draw: the last row of
the head, which the tokenizer has no token for, and which our sampler leaves out for that reason.  The chat template
puts no special token behind an answer either, as LLaVA-1.5's.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cases import Case

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Tower:
    """A transformer's measures."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


@dataclass(frozen=True)
class Size:
    """A student, and the size its teacher has."""

    text: Tower
    vision: Tower
    vocabulary: int
    """Rows of the head: one more than the tokenizer has tokens."""
    teacher: str


SIZES = {
    "5m": Size(Tower(192, 6, 6, 2, 512), Tower(128, 6, 4, 4, 512), vocabulary=8192, teacher="15m"),
    "15m": Size(Tower(288, 8, 6, 2, 768), Tower(192, 8, 6, 6, 768), vocabulary=8192, teacher="15m"),
    "50m": Size(Tower(512, 8, 8, 2, 1408), Tower(320, 12, 5, 5, 1280), vocabulary=32768, teacher="50m"),
}
PATCH = 14
MAX_POSITIONS = 8192
N_PROMPTS = 64
SEED = 0
VERSION = 1
"""Raised with every change to what is built, so that folders of an older recipe are built anew."""

SPECIAL = ("<|endoftext|>", "<|pad|>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT = (
    "above answer area below blue bottom box chart circle colour corner count dark difference does edge "
    "first green half how large left light line many object orange part picture purple red right second "
    "shape side small square sum than third top total what where white why with yellow"
)
WORDS = TEXT.split()


# ------------------------------------------------------------------ folders


def ensure(case: Case, work: Path) -> Path:
    """The case's folder below ``work``, built if it is not there or was built by another recipe."""
    folder, recipe = work / case.folder, _recipe(case)
    stamp = folder / "recipe.json"
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == recipe:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    build(case, folder)
    stamp.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")  # last: what is here is complete
    return folder


def build(case: Case, folder: Path) -> None:
    """Write models, processor and prompts."""
    student = SIZES[case.size]
    teacher = SIZES[student.teacher]
    side = _image_side(case.image_tokens)
    tokenizer = build_tokenizer(student.vocabulary)
    for offset, (name, size) in enumerate({"student": student, "teacher": teacher}.items()):
        model = build_model(size, student.vocabulary, tokenizer, side, seed=SEED + 1 + offset)
        model.save_pretrained(folder / name)
        build_processor(tokenizer, side).save_pretrained(folder / name)
    write_prompts(folder, side)


def read_prompts(folder: Path) -> list[dict[str, str]]:
    """Rows of ``id``, ``question``, ``answer`` and ``image``, the picture's path."""
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**row, "image": str(folder / row["image"])} for row in map(json.loads, lines)]


def _recipe(case: Case) -> dict[str, object]:
    student = SIZES[case.size]
    return {
        "version": VERSION,
        "seed": SEED,
        "image_tokens": case.image_tokens,
        "student": asdict(student),
        "teacher": asdict(SIZES[student.teacher]),
    }


def _image_side(image_tokens: int) -> int:
    """Pixels along one side of the picture; one patch is one token."""
    patches = math.isqrt(image_tokens)
    if patches**2 != image_tokens:
        raise ValueError(
            f"{image_tokens} image tokens are no square; try {patches**2} or {(patches + 1) ** 2}"
        )
    return patches * PATCH


# ------------------------------------------------------------------ what is in them


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly ``vocabulary - 1`` tokens, its merges learnt from made-up sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences(3 * vocabulary), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=MAX_POSITIONS,
    )
    if len(tokenizer) != vocabulary - 1:
        raise ValueError(f"the corpus gives {len(tokenizer)} tokens, expected {vocabulary - 1}")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def sentences(n: int) -> Iterator[str]:
    """Words, numbers, and enough made-up words that there is something to merge for any vocabulary."""
    draw = random.Random(SEED)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for _ in range(n):
        words = draw.choices(WORDS, k=8)
        words += [str(draw.randrange(10_000)) for _ in range(2)]
        words += ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(3)]
        draw.shuffle(words)
        yield " ".join(words) + draw.choice(".?!")


def build_processor(tokenizer: PreTrainedTokenizerFast, side: int) -> LlavaProcessor:
    """Pictures of ``side`` x ``side`` pixels."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def build_model(
    size: Size, vocabulary: int, tokenizer: PreTrainedTokenizerFast, side: int, seed: int
) -> LlavaForConditionalGeneration:
    """CLIP tower, projector and Qwen2 language model with tied embeddings; random by ``seed``."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
    )

    special_ids = {
        "bos_token_id": None,
        "eos_token_id": vocabulary - 1,  # no token: see the head of this file
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=size.vision.hidden,
        num_hidden_layers=size.vision.layers,
        num_attention_heads=size.vision.heads,
        intermediate_size=size.vision.ffn,
        image_size=side,
        patch_size=PATCH,
    )
    text = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=size.text.hidden,
        num_hidden_layers=size.text.layers,
        num_attention_heads=size.text.heads,
        num_key_value_heads=size.text.kv_heads,
        intermediate_size=size.text.ffn,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        **special_ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special_ids)
    return model


def write_prompts(folder: Path, side: int) -> None:
    """``prompts.jsonl`` and one picture each: coloured shapes, and a wordy question about them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    draw = random.Random(SEED)
    rows = []
    for index in range(N_PROMPTS):
        path = f"images/{index:03d}.png"
        n_shapes = draw.randint(1, 6)
        draw_picture(draw, side, n_shapes).save(folder / path)
        question = f"how many shapes are there in the picture? {' '.join(draw.choices(WORDS, k=24))}?"
        rows.append({"id": f"shapes/{index}", "question": question, "answer": str(n_shapes), "image": path})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")


def draw_picture(draw: random.Random, side: int, n_shapes: int):
    """A PIL image of ``n_shapes`` circles and boxes."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (side, side), tuple(draw.randint(200, 255) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for _ in range(n_shapes):
        x, y, radius = draw.randrange(side), draw.randrange(side), draw.randint(side // 16, side // 6)
        shape = draw.choice((pen.ellipse, pen.rectangle))
        shape(
            (x - radius, y - radius, x + radius, y + radius),
            fill=tuple(draw.randint(0, 180) for _ in range(3)),
        )
    return picture
