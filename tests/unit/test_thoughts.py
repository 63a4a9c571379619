"""A think block that the chat template opens belongs to the answer for whoever reads the answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from rooms import make_prompt

from uniopd_mm.engines import encode_groups
from uniopd_mm.engines.base import answered
from uniopd_mm.processors import VLMProcessor, get_processor
from uniopd_mm.processors.thoughts import thinking
from uniopd_mm.rollout import Group, Rollout
from uniopd_mm.verifiers import get_verifier


def processor_of(folder: Path, source: Path, ending: str) -> VLMProcessor:
    processor = get_processor(source)
    processor.tokenizer.chat_template = tiny.TEXT_TEMPLATE + ending
    processor.tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return get_processor(folder)


def read(processor: VLMProcessor, said: str) -> str:
    (group,) = encode_groups([(0, make_prompt(0), ())], processor)
    ids = torch.tensor(processor.tokenizer.encode(said, add_special_tokens=False))
    (rollout,) = answered(processor, group, [Rollout(ids, torch.zeros(len(ids)), "length")]).rollouts
    return rollout.text


@pytest.mark.parametrize(("ending", "hidden"), [("<think>\n", True), ("", False)])
def test_an_unfinished_thought_is_no_answer_whoever_opened_it(
    ending: str, hidden: bool, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    processor = processor_of(tmp_path, tiny_models["text"], ending)
    verifier = get_verifier("exact")
    prompt = make_prompt(0)  # its answer is 7
    assert verifier.verify(prompt, read(processor, "7")).correct is not hidden
    assert verifier.verify(prompt, read(processor, "9 </think> 7")).correct


def test_blocks_are_told_apart() -> None:
    assert thinking("answer:\n<think>\n") == "an open"
    assert thinking("<think>\n\n</think>\n\n") == "an empty"
    assert thinking("I <think> so") == thinking("") == "no"


def test_texts_of_groups_without_a_thought_are_the_decoded_response(tiny_models: Mapping[str, Path]) -> None:
    processor = get_processor(tiny_models["llava"])
    group = Group(make_prompt(0), processor.encode(list(make_prompt(0).messages)), ())
    ids = torch.tensor([40, 50, processor.stop_token_ids()[0]])
    (rollout,) = answered(processor, group, [Rollout(ids, torch.zeros(3), "stop")]).rollouts
    assert rollout.text == processor.decode(ids)
