"""Qwen's own image helper, the package qwen-vl-utils, against the Qwen-VL adapter: who resizes what to which size.

Training code for Qwen often passes images through ``qwen_vl_utils.fetch_image`` first.  The adapter needs no such
step.  These tests say where the two agree, where they do not, and what becomes of an image that went through both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from uniopd_mm.processors import ProcessorError, get_processor
from uniopd_mm.processors.qwen_vl import QwenVLAdapter

pytestmark = pytest.mark.skipif(util.find_spec("qwen_vl_utils") is None, reason="needs qwen-vl-utils")

SIDES = {"qwen2_5_vl": 28, "qwen3_vl": 32}
"""Family -> pixels along one side of a placeholder; patches of 14 and of 16 pixels."""
BOUNDS = ((4, 16), (1, 64), (20, 40), (4, 16384))
"""Fewest and most placeholders; the last are the defaults of qwen-vl-utils."""

# The package imports torchvision at its head, for videos alone; images need nothing of it.
_SERVER = """
import json, sys, types
for name in ("torchvision", "torchvision.io", "torchvision.transforms"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torchvision"].io = sys.modules["torchvision.io"]
sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
sys.modules["torchvision.transforms"].InterpolationMode = None
from qwen_vl_utils.vision_process import fetch_image, smart_resize

def answer(kind, *question):
    if kind == "resize":
        return smart_resize(*question)
    path, patch, bounds, target = question
    fetch_image({"image": path, **bounds}, image_patch_size=patch).save(target)

for line in sys.stdin:
    try:
        reply = {"answer": answer(*json.loads(line))}
    except ValueError as error:
        reply = {"error": str(error)}
    print(json.dumps(reply), flush=True)
"""


class QwenVLUtils:
    """The real package, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, *question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["answer"]

    def resize(self, height: int, width: int, side: int, least: int, most: int) -> tuple[int, int]:
        """Height and width in pixels by ``smart_resize``; bounds in placeholders of ``side`` x ``side`` pixels."""
        return tuple(self._ask("resize", height, width, side, least * side**2, most * side**2))

    def fetch(self, path: Path, side: int, bounds: tuple[int, int] | None) -> Image.Image:
        """The image by ``fetch_image``; None: its default bounds."""
        pixels = (
            {} if bounds is None else {"min_pixels": bounds[0] * side**2, "max_pixels": bounds[1] * side**2}
        )
        target = self.folder / "fetched.png"
        self._ask("fetch", str(path), side // 2, pixels, str(target))
        return Image.open(target)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QwenVLUtils]:
    package = QwenVLUtils(tmp_path_factory.mktemp("fetched"))
    yield package
    package.process.communicate()


Ours = Callable[[int, int], QwenVLAdapter]


@pytest.fixture(scope="module", params=SIDES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def side(family: str) -> int:
    return SIDES[family]


@pytest.fixture(scope="module")
def ours(family: str, side: int, tmp_path_factory: pytest.TempPathFactory) -> Ours:
    """The adapter with these bounds, in placeholders."""
    folder = families.family(family).build(tmp_path_factory.mktemp(family))

    @lru_cache
    def bounded(least: int, most: int) -> QwenVLAdapter:
        return get_processor(folder, min_pixels=least * side**2, max_pixels=most * side**2)

    return bounded


def resized(adapter: QwenVLAdapter, image: Image.Image) -> tuple[int, int]:
    """Height and width in pixels that the model sees."""
    tensors, _ = adapter.process_images([image])
    _, rows, columns = tensors["image_grid_thw"][0].tolist()
    return rows * adapter.image_processor.patch_size, columns * adapter.image_processor.patch_size


def blank(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height))


# ---- where they agree


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 700), width=st.integers(1, 700), bounds=st.sampled_from(BOUNDS))
def test_images_are_resized_to_the_size_that_qwen_vl_utils_gives(
    theirs: QwenVLUtils, ours: Ours, side: int, height: int, width: int, bounds: tuple[int, int]
) -> None:
    shorter, longer = sorted((height, width))
    assume(shorter > side / 2 and longer < min(bounds[1], 200) * shorter)  # see the differences below
    expected = theirs.resize(height, width, side, *bounds)
    assert resized(ours(*bounds), blank(height, width)) == expected
    assert ours(*bounds).expected_image_tokens(height, width) * side**2 == expected[0] * expected[1]


@pytest.mark.parametrize("factor", [1.5, 2.5, 3.5])
def test_halves_are_rounded_to_even_by_both(
    theirs: QwenVLUtils, ours: Ours, side: int, factor: float
) -> None:
    height, width = int(factor * side), 4 * side
    expected = {1.5: 2, 2.5: 2, 3.5: 4}[factor] * side, 4 * side
    assert theirs.resize(height, width, side, 1, 64) == expected == resized(ours(1, 64), blank(height, width))


def test_both_refuse_an_image_more_than_200_times_as_long_as_wide(
    theirs: QwenVLUtils, ours: Ours, side: int
) -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        theirs.resize(4, 801, side, 4, 16384)
    with pytest.raises(ProcessorError, match="aspect ratio"):
        ours(4, 16384).expected_image_tokens(4, 801)
    message = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(ProcessorError, match="801 x 4"):
        ours(4, 16384).encode(message, [blank(4, 801)])


@pytest.mark.parametrize("bounds", BOUNDS[:3])
@pytest.mark.parametrize("size", [(300, 200), (28, 28), (57, 33), (40, 200), (64, 64), (500, 640)])
def test_an_image_that_fetch_image_resized_passes_unchanged(
    theirs: QwenVLUtils, ours: Ours, side: int, size: tuple[int, int], bounds: tuple[int, int], tmp_path: Path
) -> None:
    image = tiny.random_image(*size)
    image.save(tmp_path / "image.png")
    fetched = theirs.fetch(tmp_path / "image.png", side, bounds)
    adapter = ours(*bounds)
    assert resized(adapter, fetched) == (fetched.height, fetched.width) == resized(adapter, image)
    once, twice = adapter.process_images([image])[0], adapter.process_images([fetched])[0]
    if util.find_spec("torchvision") is None:  # which resizes with other rounding than Pillow
        assert torch.equal(once["pixel_values"], twice["pixel_values"])


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    bounds=st.sampled_from([(least, most) for least, most in BOUNDS if most >= 4 * least]),
)
def test_a_resized_image_is_not_resized_again_where_the_bounds_leave_room(
    ours: Ours, side: int, height: int, width: int, bounds: tuple[int, int]
) -> None:
    assume(min(height, width) > side / 2 and max(height, width) < min(bounds[1], 200) * min(height, width))
    adapter = ours(*bounds)
    size = resized(adapter, blank(height, width))
    assert resized(adapter, blank(*size)) == size


# ---- where they differ


def test_a_side_under_half_a_placeholder_is_widened_by_them_and_scaled_by_us(
    theirs: QwenVLUtils, ours: Ours, side: int
) -> None:
    """transformers rounds the short side to nothing, and scales the image as one with too few pixels."""
    height, width = side // 2, 20 * side
    assert theirs.resize(height, width, side, 4, 16384) == (side, 20 * side)
    assert resized(ours(4, 16384), blank(height, width)) == (side, 13 * side)
    assert ours(4, 16384).expected_image_tokens(height, width) == 13


def test_an_image_longer_than_its_bound_is_nothing_to_them_and_one_row_past_the_bound_to_us(
    theirs: QwenVLUtils, ours: Ours, side: int
) -> None:
    height, width = side, 40 * side
    assert theirs.resize(height, width, side, 4, 16) == (0, 25 * side)
    assert resized(ours(4, 16), blank(height, width)) == (side, 25 * side)
    assert ours(4, 16).expected_image_tokens(height, width) == 25


def test_an_image_fetched_with_other_bounds_is_resized_twice(
    theirs: QwenVLUtils, ours: Ours, side: int, tmp_path: Path
) -> None:
    """Give both the same bounds: those of fetch_image are not those of every published model."""
    image = tiny.random_image(60, 40)
    image.save(tmp_path / "image.png")
    fetched = theirs.fetch(tmp_path / "image.png", side, None)
    adapter = ours(64, 16384)
    assert fetched.size != resized(adapter, fetched)[::-1]
    once, twice = adapter.process_images([image])[0], adapter.process_images([fetched])[0]
    assert not torch.equal(once["pixel_values"], twice["pixel_values"])


def test_bounds_with_no_room_for_rounding_let_neither_keep_an_image_it_resized(
    theirs: QwenVLUtils, ours: Ours, side: int
) -> None:
    height, width, bounds = 10 * side, 10 * side, (15, 15)
    first = theirs.resize(height, width, side, *bounds)
    assert first == (3 * side, 3 * side) == resized(ours(*bounds), blank(height, width))
    second = theirs.resize(*first, side, *bounds)
    assert second == (4 * side, 4 * side) == resized(ours(*bounds), blank(*first))


def test_a_very_long_image_may_be_refused_once_it_was_resized(
    theirs: QwenVLUtils, ours: Ours, side: int
) -> None:
    height, width, bounds = 2 * side, 400 * side, (4, 250)
    first = theirs.resize(height, width, side, *bounds)
    assert first == (side, 223 * side)
    assert ours(*bounds).expected_image_tokens(height, width) == 223
    with pytest.raises(ValueError, match="aspect ratio"):
        theirs.resize(*first, side, *bounds)
    with pytest.raises(ProcessorError, match="aspect ratio"):
        ours(*bounds).expected_image_tokens(*first)


def test_fetch_image_leaves_an_image_on_its_side_that_we_turn_upright(
    theirs: QwenVLUtils, ours: Ours, side: int, tmp_path: Path
) -> None:
    image = tiny.random_image(4 * side, 2 * side)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    image.save(tmp_path / "image.jpg", exif=exif)
    fetched = theirs.fetch(tmp_path / "image.jpg", side, (4, 16))
    message = [{"role": "user", "content": [{"type": "image"}]}]
    prompt = ours(4, 16).encode(message, [Image.open(tmp_path / "image.jpg")])
    assert (fetched.height, fetched.width) == (2 * side, 4 * side)
    assert prompt.model_inputs["image_grid_thw"].tolist() == [[1, 8, 4]]


def test_fetch_image_drops_the_transparency_of_grey_images_that_we_put_on_white(
    theirs: QwenVLUtils, ours: Ours, side: int, tmp_path: Path
) -> None:
    Image.new("LA", (2 * side, 2 * side), (0, 0)).save(tmp_path / "image.png")
    fetched = theirs.fetch(tmp_path / "image.png", side, (4, 16))
    message = [{"role": "user", "content": [{"type": "image"}]}]
    prompt = ours(4, 16).encode(message, [Image.open(tmp_path / "image.png")])
    white, _ = ours(4, 16).process_images([Image.new("RGB", (2 * side, 2 * side), "white")])
    assert fetched.getpixel((0, 0)) == (0, 0, 0)
    assert torch.equal(prompt.model_inputs["pixel_values"], white["pixel_values"])
