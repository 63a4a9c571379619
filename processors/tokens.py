"""Questions to a tokenizer: its vision tokens, a special token's spelling as text, each token's own text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

KNOWN_VISION_TOKENS = (
    "<image>",
    "<video>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image|>",
    "<|video|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<image_soft_token>",
    "<start_of_image>",
    "<end_of_image>",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
)
"""Text-only models of a multimodal family carry these in their vocabulary as well."""


def find_vision_tokens(
    tokenizer: Any, config_ids: Iterable[int | None], names: Iterable[str] = ()
) -> dict[str, int]:
    """Token -> id of the added tokens that stand for vision: by an id of the model's config, or by name.

    A config id that is no added token of this tokenizer is a default that nobody set, and is left out.
    """
    added: dict[str, int] = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    ids, known = set(config_ids), {*KNOWN_VISION_TOKENS, *names}
    return {text: i for text, i in added.items() if i in ids or text in known}


def encode_as_plain_text(tokenizer: Any, marker: str) -> list[int]:
    """Ids of a special token's spelling as ordinary characters in the middle of a text."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + marker, add_special_tokens=False, split_special_tokens=True)
    if ids[: len(newline)] == newline:  # after a newline SentencePiece adds no space of its own
        ids = ids[len(newline) :]
    else:
        ids = tokenizer.encode(marker, add_special_tokens=False, split_special_tokens=True)
    if tokenizer.convert_tokens_to_ids(marker) in ids:  # added, but not marked as special
        return tokenizer.convert_tokens_to_ids(list(marker))
    return ids


def split_decode(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """One string per token; joined, exactly what decoding all of them gives (special tokens kept).

    A character made of several tokens belongs to the last of them; bytes that are no UTF-8 show as U+FFFD.
    """
    ids = [int(i) for i in ids]
    if not ids:
        return []
    whole = _decode(tokenizer, ids)
    texts = _split_by_bytes(tokenizer, ids)
    if texts is not None:
        if texts[0].startswith(" ") and "".join(texts)[1:] == whole:  # SentencePiece drops the first space
            texts[0] = texts[0][1:]
        if "".join(texts) == whole:
            return texts
    return _split_by_prefixes(tokenizer, ids, whole)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _split_by_prefixes(tokenizer: Any, ids: list[int], whole: str) -> list[str]:
    """Token k gets what the first k tokens settle and the first k - 1 did not.  Any tokenizer; slow."""
    texts, settled = [], 0
    for end in range(1, len(ids)):
        prefix = _decode(tokenizer, ids[:end])
        agreed = next((i for i, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), len(prefix))
        agreed = max(settled, min(agreed, len(whole)))
        texts.append(whole[settled:agreed])
        settled = agreed
    return [*texts, whole[settled:]]


def _split_by_bytes(tokenizer: Any, ids: list[int]) -> list[str] | None:
    """From the bytes behind each token; None for a kind of tokenizer whose bytes are not known."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(ids)]
    if decoder.decode(["Ġ"]) == " ":
        return _utf8_pieces([_byte_level_bytes(token) for token in tokens])
    if decoder.decode(["<0x41>"]) == "A":
        return _byte_fallback_texts(tokens)
    return None


def _utf8_pieces(chunks: Iterable[bytes]) -> list[str]:
    """Decode a byte stream chunk by chunk; a character belongs to the chunk that completes it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(chunk) for chunk in chunks]
    texts[-1] += decoder.decode(b"", final=True)
    return texts


def _byte_level_bytes(token: str) -> bytes:
    table = _byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters are themselves, those from 256 on are the other bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    table = {chr(value): value for value in printable}
    return table | {chr(256 + n): value for n, value in enumerate(others)}


_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_fallback_texts(tokens: list[str]) -> list[str]:
    """SentencePiece: ``▁`` is a space, ``<0xE4>`` a byte; bytes that are no UTF-8 show as one U+FFFD each."""
    texts: list[str] = []
    run: list[bytes] = []

    def flush() -> None:
        if not run:
            return
        try:
            b"".join(run).decode()
            texts.extend(_utf8_pieces(run))
        except UnicodeDecodeError:
            texts.extend("\ufffd" for _ in run)
        run.clear()

    for token in tokens:
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            run.append(bytes.fromhex(byte[1]))
        else:
            flush()
            texts.append(token.replace("▁", " "))
    flush()
    return texts


def all_strings(value: Any) -> list[str]:
    """Every string value in nested dicts and lists."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    map_strings(value, note)
    return found


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Copy of nested dicts and lists with every string value changed; keys and other objects stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value
