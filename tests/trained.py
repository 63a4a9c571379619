"""Tokenizers trained on a few sentences, and how their tokens are laid side by side."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from uniopd_mm.alignment import Aligner, Vocabulary, text_encoder, vocabulary

CORPORA = {
    "english": ["the quick brown fox jumps over the lazy dog. the answer is 42, because 6 * 7 = 42"] * 4,
    "world": [
        "there are three cafés; naïve foxes count 日本語 and 日本 🙂🙂 answer: the sum is 1024",
        "über für\n\n日本",
    ]
    * 4,
}
MARKS = ("<|end|>", "<|pad|>", "<|image|>")


def wrap(tok: Tokenizer, marks: tuple[str, ...] = MARKS) -> PreTrainedTokenizerFast:
    """With special tokens: the end of turn, padding and more."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=marks[0], pad_token=marks[1])
    fast.add_tokens([AddedToken(m, special=True, normalized=False) for m in marks[2:]], special_tokens=True)
    return fast


@functools.cache
def byte_level(
    size: int = 420,
    corpus: str = "english",
    normalizer: str | None = None,
    prefix_space: bool = False,
    marks: tuple[str, ...] = MARKS,
) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tok.decoder = decoders.ByteLevel()
    if normalizer == "nfc":
        tok.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tok.train_from_iterator(CORPORA[corpus], trainer)
    return wrap(tok, marks)


@functools.cache
def sentencepiece(
    size: int = 120, corpus: str = "english", dummy_prefix: bool = True, marks: tuple[str, ...] = MARKS
) -> PreTrainedTokenizerFast:
    """▁ for spaces, <0xNN> for what the vocabulary lacks; ``dummy_prefix``: a space before every text."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if dummy_prefix else "never")
    tok.train_from_iterator(CORPORA[corpus], trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learnt = json.loads(tok.to_str())["model"]
    tokens = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(learnt["vocab"], key=learnt["vocab"].get),
    ]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in learnt["merges"]]
    tok.model = models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    fast = wrap(tok, marks)
    fast.add_special_tokens({"unk_token": "<unk>"})
    return fast


@functools.cache
def facts(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return vocabulary(tokenizer)


def pair(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, **more: Any) -> Aligner:
    """The aligner of two tokenizers whose turns end with their eos tokens."""
    defaults = {
        "student_stop_ids": [student.eos_token_id],
        "teacher_stop_ids": [teacher.eos_token_id],
        "encode_text": text_encoder(teacher),
    }
    return Aligner(student=facts(student), teacher=facts(teacher), **{**defaults, **more})
