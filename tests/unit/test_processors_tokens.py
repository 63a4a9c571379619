"""What an adapter says of tokens: which stand for vision, which end an answer, what each of them spells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uniopd_mm.processors import VLMProcessor, get_processor

END_OF_TEXT, END_OF_TURN = 0, 2
"""<|endoftext|> and <|im_end|> of tests/tiny.py."""


@pytest.fixture(scope="module")
def adapters(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, VLMProcessor]:
    other = tiny.make_tokenizer(640, kind="byte_fallback")
    folder = tiny.build_text(tmp_path_factory.mktemp("sentencepiece"), family="llama", tokenizer=other)
    return {name: get_processor(path) for name, path in {**tiny_models, "sentencepiece": folder}.items()}


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "text", "sentencepiece"])
def test_every_vision_token_of_the_vocabulary_is_suppressed_also_in_text_models(
    adapters: dict[str, VLMProcessor], name: str
) -> None:
    adapter = adapters[name]
    wanted = set(adapter.tokenizer.convert_tokens_to_ids(list(tiny.VISION_TOKENS)))
    assert adapter.vision_token_ids() == wanted
    assert adapter.suppress_token_ids() == sorted(wanted)


def _with_stops(folder: Path, build: Callable[..., Path], stops: Any, **options: Any) -> VLMProcessor:
    build(folder, **options)
    if stops is None:
        (folder / "generation_config.json").unlink()
    else:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return get_processor(folder)


def test_stop_tokens_are_those_of_the_generation_config_with_the_end_of_turn_first(tmp_path: Path) -> None:
    assert _with_stops(tmp_path, tiny.build_text, [END_OF_TEXT, END_OF_TURN]).stop_token_ids() == [
        END_OF_TURN,
        END_OF_TEXT,
    ]


def test_a_stop_token_only_the_template_knows_comes_first(tmp_path: Path) -> None:
    """A base model's generation_config lists only the end of text, but its template ends turns with
    <|im_end|>."""
    assert _with_stops(tmp_path, tiny.build_llava, END_OF_TEXT).stop_token_ids() == [END_OF_TURN, END_OF_TEXT]


def test_without_a_generation_config_the_tokenizers_stop_token_counts(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
    assert _with_stops(tmp_path, tiny.build_text, None, chat_template=template).stop_token_ids() == [2]


def test_of_several_stop_tokens_that_no_template_writes_the_tokenizers_own_comes_first(
    tmp_path: Path,
) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
    adapter = _with_stops(tmp_path, tiny.build_text, [END_OF_TEXT, END_OF_TURN], chat_template=template)
    assert adapter.stop_token_ids() == [END_OF_TURN, END_OF_TEXT]


def test_a_vision_token_that_was_added_as_an_ordinary_one_is_text_too_when_typed(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<video>"])
    adapter = get_processor(tiny.build_text(tmp_path, tokenizer=tokenizer))
    prompt = adapter.encode(ask("a <video> b"))
    assert not prompt.vision_mask.any()
    assert "a <video> b" in adapter.decode(prompt.input_ids)


def test_a_missing_pad_token_falls_back_to_the_stop_token(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.pad_token = None
    adapter = get_processor(tiny.build_text(tmp_path, tokenizer=tokenizer))
    assert adapter.pad_token_id == adapter.tokenizer.eos_token_id
    batch = adapter.collate([adapter.encode(ask("a")), adapter.encode(ask("a b c"))])
    assert batch["attention_mask"].sum(-1).tolist() == [
        len(adapter.encode(ask(text)).input_ids) for text in ("a", "a b c")
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["text", "sentencepiece"])
def test_token_strings_joined_are_the_decoded_whole(
    adapters: dict[str, VLMProcessor], name: str, data: st.DataObject
) -> None:
    adapter = adapters[name]
    ids = data.draw(st.lists(st.integers(0, len(adapter.tokenizer) - 1), max_size=24))
    texts = adapter.decode_tokens(torch.tensor(ids, dtype=torch.int64))
    assert len(texts) == len(ids)
    assert "".join(texts) == adapter.tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("name", ["text", "sentencepiece"])
def test_a_character_of_several_tokens_belongs_to_the_last_of_them(
    adapters: dict[str, VLMProcessor], name: str
) -> None:
    adapter = adapters[name]
    ids = adapter.tokenizer.encode("the 图\U0001f642.", add_special_tokens=False)
    texts = adapter.decode_tokens(ids)
    assert "".join(texts) == "the 图\U0001f642."
    assert "\ufffd" not in texts
    assert texts[-8:] == ["", "", "图", "", "", "", "\U0001f642", "."]
    assert "\ufffd" in "".join(adapter.decode_tokens(ids[:-2])), "a character that is cut off shows as U+FFFD"


def test_token_strings_of_an_other_kind_of_tokenizer_are_exact_too() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from uniopd_mm.processors.tokens import split_decode

    words = Tokenizer(models.WordLevel({"<unk>": 0, "two": 1, "words": 2}, unk_token="<unk>"))
    assert split_decode(PreTrainedTokenizerFast(tokenizer_object=words), [1, 2, 1]) == [
        "two",
        " words",
        " two",
    ]


def test_decode_leaves_out_special_tokens(adapters: dict[str, VLMProcessor]) -> None:
    ids = adapters["text"].tokenizer.encode("the answer<|im_end|>")
    assert adapters["text"].decode(torch.tensor(ids)) == "the answer"
