"""The positions an adapter gives a batch are those the family's own model would compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uniopd_mm.processors import EncodedPrompt, ProcessorError, VLMProcessor, get_processor
from uniopd_mm.processors.qwen_vl import mrope_positions

QWEN = tuple(name for name in FAMILIES if name.startswith("qwen"))


@dataclass(frozen=True)
class Family:
    adapter: VLMProcessor
    model: Any


def _load(folder: Path) -> Family:
    from transformers import AutoModelForImageTextToText

    return Family(get_processor(folder), AutoModelForImageTextToText.from_pretrained(folder).eval())


@pytest.fixture(scope="module", params=QWEN)
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return _load(families.family(request.param).build(tmp_path_factory.mktemp(request.param)))


Part = str | tuple[int, int]
"""Text, or the size of an image."""


def encode(adapter: VLMProcessor, parts: list[Part]) -> EncodedPrompt:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
    images = [Image.new("RGB", part) for part in parts if not isinstance(part, str)]
    return adapter.encode([{"role": "user", "content": content}], images)


sizes = st.tuples(st.integers(1, 300), st.integers(1, 300)).filter(lambda size: max(size) <= 150 * min(size))
prompts = st.lists(st.sampled_from(["what", " is the answer? ", "<|image_pad|>"]) | sizes, max_size=4)


@settings(max_examples=30, deadline=None)
@given(batch=st.lists(prompts, min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_mrope_positions_are_the_models_own(qwen: Family, batch: list[list[Part]], side: Any) -> None:
    inputs = qwen.adapter.collate([encode(qwen.adapter, parts) for parts in batch], padding_side=side)
    expected, _ = qwen.model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )
    positions, real = qwen.adapter.position_ids(inputs), inputs["attention_mask"].bool()
    assert positions.dtype == torch.int64 and positions.shape == (3, *inputs["input_ids"].shape)
    assert torch.equal(positions[:, real], expected[:, real])
    assert not positions[:, ~real].any()


def test_an_images_positions_are_a_box_and_the_text_goes_on_past_its_longer_side() -> None:
    text, image = 1, 9
    ids = torch.tensor([[0, text, text, *[image] * 6, text], [text, *[image] * 2, text, image, *[text] * 5]])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    grids = torch.tensor([[1, 4, 6], [1, 4, 2], [1, 2, 2]])  # 2 x 3, 2 x 1 and 1 x 1 placeholders
    time, height, width = mrope_positions(ids, mask, grids, image_token_id=image, merge_size=2).tolist()
    assert time[0] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 5]
    assert height[0] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 5]
    assert width[0] == [0, 0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert time[1] == [0, 1, 1, 3, 4, 5, 6, 7, 8, 9]
    assert height[1] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert width[1] == time[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [[["a"], ["what is the answer?"]], [["a"], [(60, 90), "b"]]])
def test_explicit_positions_give_the_logits_of_the_prompt_alone(
    qwen: Family, batch: list[list[Part]], side: Any
) -> None:
    _assert_alone_and_together_agree(qwen, batch, side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_positions_count_from_the_first_real_token(tmp_path: Path, side: Any) -> None:
    llava = _load(families.family("llava").build(tmp_path))
    batch: list[list[Part]] = [["a"], [(60, 90), "what is the answer?"]]
    inputs = llava.adapter.collate([encode(llava.adapter, parts) for parts in batch], padding_side=side)
    positions = llava.adapter.position_ids(inputs)
    for row, mask in zip(positions, inputs["attention_mask"].bool(), strict=True):
        assert row[mask].tolist() == list(range(int(mask.sum())))
    _assert_alone_and_together_agree(llava, batch, side)


def _assert_alone_and_together_agree(family: Family, batch: list[list[Part]], side: Any) -> None:
    encoded = [encode(family.adapter, parts) for parts in batch]
    inputs = family.adapter.collate(encoded, padding_side=side)
    last = inputs["attention_mask"].cumsum(-1).argmax(-1)
    with torch.no_grad():
        logits = family.model(**inputs, position_ids=family.adapter.position_ids(inputs)).logits
        alone = [family.model(**family.adapter.collate([prompt])).logits[0, -1] for prompt in encoded]
    together = logits[torch.arange(len(batch)), last]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-4)


def test_placeholders_and_images_of_different_prompts_are_an_error(tmp_path: Path) -> None:
    adapter = get_processor(tiny.build_qwen2_5_vl(tmp_path))
    inputs = adapter.collate([encode(adapter, [(60, 90)])])
    without = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ProcessorError, match=r"image placeholders.*makes 0 of 0 images"):
        adapter.position_ids(without)
    twice = {**without, "image_grid_thw": inputs["image_grid_thw"].repeat(2, 1)}
    with pytest.raises(ProcessorError, match="of 2 images"):
        adapter.position_ids(twice)
