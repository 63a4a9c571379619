"""Tokenizer, processor and models of the quickstart: real transformers architectures, a few hundred thousand weights.

All models share one tokenizer.  Everything is saved with ``save_pretrained``, so it loads like any hub model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from task import CANVAS_SIDE, CELLS, PHRASES, SCAN_SIDE, Question, chain, image_text

if TYPE_CHECKING:
    from transformers import (
        CLIPVisionModel,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedModel,
        PreTrainedTokenizerFast,
        Qwen3ForCausalLM,
    )

IMAGE_TOKEN = "<image>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|pad|>"
PIECES = r" ?\\boxed\{| ?[A-Za-z]+|\d|\s|[^\sA-Za-z\d]+"
"""What the tokenizer never merges across: the opening of a boxed answer, words, single digits, blanks, the rest."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML; an image stands on a line of its own, as in LLaVA's templates."""


FULL_INK_VALUE = -4.0
"""Pixel value of full ink after the processor."""
PATCH_STD = 0.1
"""Initial spread of the patch weights; CLIP's 0.02 is swamped by the first steps at the learning rates used here."""
PLACE_STD = 1.0
"""Initial spread of the position embeddings: about that of a patch's own embedding."""


LANGUAGE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION_TOKENS = CELLS**2
"""A patch is one cell of the canvas, so that a picture costs nine tokens."""


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
        [
            AddedToken(token, special=True, normalized=False)
            for token in (TURN_START, TURN_END, PAD, IMAGE_TOKEN)
        ]
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


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Picture -> pixel values, one pixel per scan pixel: paper 0, full ink ``FULL_INK_VALUE``.

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
        patch_size=SCAN_SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def build_language(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A freshly initialised text-only language model; seed torch before."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        **LANGUAGE,
        max_position_embeddings=tokenizer.model_max_length,
        # The usual 0.02 is meant for widths in the thousands and would learn nothing for many steps here.
        initializer_range=LANGUAGE["hidden_size"] ** -0.5 / 2,
        tie_word_embeddings=True,
        **special_ids(tokenizer),
    )
    return finished(Qwen3ForCausalLM(config), tokenizer)


def build_tower() -> CLIPVisionModel:
    """A freshly initialised CLIP vision tower; seed torch before."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        **VISION,
        image_size=CANVAS_SIDE,
        patch_size=SCAN_SIDE,
        initializer_range=PATCH_STD,
    )
    tower = CLIPVisionModel(config)
    # Places as loud as ink: by default they are fifteen times fainter, and "left" is then hard to tell from "right".
    torch.nn.init.normal_(tower.embeddings.position_embedding.weight, std=PLACE_STD)
    return tower


def join(
    language: PreTrainedModel, tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """A LLaVA of copies of the two and a fresh projector between them; seed torch before."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        image_seq_length=VISION_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return finished(model, tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def finished(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The model with generation settings that stop at the end of the turn."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(**special_ids(tokenizer))
    return model


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Everything that ``from_pretrained`` needs: weights, configs, tokenizer, chat template, and the processor."""
    model.save_pretrained(folder)
    if hasattr(model.config, "vision_config"):
        build_processor(tokenizer).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
