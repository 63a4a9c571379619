"""Pictures in the size that the model sees: to the family's own processor they are the images they were made of."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import FAMILIES
from families.internvl import TILE
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from uniopd_mm.processors import VLMProcessor, get_processor
from uniopd_mm.servers import png_uri

ANY_SIZE = ((1, 1), (1, 3), (31, 17), (56, 56), (57, 113), (640, 480), (333, 1200), (4000, 3000))
"""Width and height in pixels."""


@dataclass(frozen=True)
class Family:
    adapter: VLMProcessor
    reference: Any
    """The family's own processor."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    module = families.family(request.param)
    folder = module.build(tmp_path_factory.mktemp("model"))
    return Family(get_processor(folder), module.reference(folder))


def noise(width: int, height: int) -> Image.Image:
    """Any two ways to resize it differ."""
    return Image.frombytes("RGB", (width, height), random.Random(width).randbytes(3 * width * height))


def ask(reference: Any, *images: Image.Image) -> dict[str, torch.Tensor]:
    messages = [{"role": "user", "content": [{"type": "image", "image": image} for image in images]}]
    return reference.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def sent(image: Image.Image) -> Image.Image:
    """What a server reads."""
    data = png_uri(image).removeprefix("data:image/png;base64,")
    return Image.open(BytesIO(base64.b64decode(data)))


# ---- every family


@pytest.mark.parametrize("size", ANY_SIZE, ids=str)
def test_the_familys_own_processor_makes_the_same_of_the_picture_that_is_sent(
    family: Family, size: tuple[int, int]
) -> None:
    image = noise(*size)
    picture = sent(family.adapter.resize(image))
    assert picture.mode == "RGB"
    assert are_equal(ask(family.reference, picture), ask(family.reference, image))
    again = family.adapter.resize(picture)
    assert (again.size, again.tobytes()) == (picture.size, picture.tobytes())


def test_several_images_in_one_prompt_may_all_be_resized(family: Family) -> None:
    images = [noise(64, 64), noise(200, 40), noise(33, 130)]
    resized = [family.adapter.resize(image) for image in images]
    assert are_equal(ask(family.reference, *resized), ask(family.reference, *images))


# ---- sizes at the bounds of Qwen-VL


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], VLMProcessor]:
    """Qwen2.5-VL with so many placeholders at least and at most; one adapter, whose bounds are set anew."""
    adapter = get_processor(families.family("qwen2_5_vl").build(tmp_path_factory.mktemp("bounded")))

    def bound(least: int, most: int) -> VLMProcessor:
        adapter.image_processor.size.shortest_edge = least * 28 * 28
        adapter.image_processor.size.longest_edge = most * 28 * 28
        return adapter

    return bound


def smart_resize(size: tuple[int, int], least: int, most: int) -> tuple[int, int] | None:
    """(height, width); None where Qwen's processor refuses."""
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen

    try:
        return qwen.smart_resize(*size, factor=28, min_pixels=least * 28 * 28, max_pixels=most * 28 * 28)
    except ValueError:
        return None


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    least=st.integers(1, 30),
    room=st.integers(0, 30),
)
@example(height=30, width=600, least=1, room=1)  # a strip of 4 placeholders where 2 are allowed
@example(height=100, width=100, least=15, room=0)  # 16, then 9, then 16
def test_qwen_resizes_to_a_size_that_it_keeps_or_not_at_all(
    bounded: Callable[[int, int], VLMProcessor], height: int, width: int, least: int, room: int
) -> None:
    first = smart_resize((height, width), least, least + room)
    assume(first is not None)
    settles = first is not None and smart_resize(first, least, least + room) == first
    resized = bounded(least, least + room).resize(Image.new("RGB", (width, height)))
    assert (resized.height, resized.width) == (first if settles else (height, width))


@settings(max_examples=300, deadline=None)
@given(height=st.integers(1, 20000), width=st.integers(1, 20000))
@pytest.mark.parametrize(("least", "most"), [(4, 16384), (4, 1280), (256, 1280), (256, 16384)])
def test_qwen_keeps_every_size_that_it_makes_within_the_bounds_of_published_models(
    height: int, width: int, least: int, most: int
) -> None:
    first = smart_resize((height, width), least, most)
    assume(first is not None and max(first) <= 200 * min(first))
    assert first is not None and smart_resize(first, least, most) == first


# ---- settings under which one picture is not enough


def with_settings(folder: Path, **changes: Any) -> VLMProcessor:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return get_processor(folder)


@pytest.mark.parametrize(
    ("name", "changes", "size"),
    [
        ("llava", {}, (56, 56)),
        ("llava", {"size": {"shortest_edge": 70}}, None),  # resized to 70, then cropped, and so once more
        ("llava", {"do_center_crop": False}, (84, 56)),
        ("llava", {"size": {"height": 56, "width": 56}}, (56, 56)),
        ("llava", {"image_processor_type": "LlavaImageProcessor", "do_pad": True}, (56, 56)),
        ("llava", {"do_resize": False, "do_center_crop": False}, None),
        ("idefics3", {"do_image_splitting": False}, None),  # resized twice, to the longest edge and to a tile
        ("idefics3", {"do_resize": False}, None),
        ("idefics3", {"size": {"longest_edge": 70}}, None),  # not a whole number of tiles
        ("qwen2_vl", {"resample": 0}, (84, 56)),
        ("gemma3", {"resample": 1}, (56, 56)),
    ],
)
def test_the_settings_of_the_model_are_followed(
    name: str, changes: dict[str, Any], size: tuple[int, int] | None, tmp_path: Path
) -> None:
    adapter = with_settings(families.family(name).build(tmp_path), **changes)
    image = noise(90, 60)
    resized = adapter.resize(image)
    assert resized.size == (size or image.size)
    (before, texts), (after, texts_after) = (adapter.process_images([x]) for x in (image, resized))
    assert are_equal(before, after) and texts == texts_after


@pytest.mark.parametrize("size", [(40, 400), (90, 60), (TILE, TILE)])
def test_internvl_of_one_tile_shows_that_tile(size: tuple[int, int], tmp_path: Path) -> None:
    adapter = get_processor(families.family("internvl").build(tmp_path), max_pixels=TILE * TILE)
    resized = adapter.resize(noise(*size))
    assert resized.size == (TILE, TILE)
    assert are_equal(adapter.process_images([resized])[0], adapter.process_images([noise(*size)])[0])
