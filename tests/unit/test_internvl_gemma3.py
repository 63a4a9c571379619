"""Settings of InternVL and Gemma 3 that the common tests do not reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import family
from families.internvl import TILE, TOKENS_PER_TILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from uniopd_mm.processors import ProcessorError, VLMProcessor, get_processor

AREA = TILE * TILE
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}]}]


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family("internvl").build(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def panning(tmp_path_factory: pytest.TempPathFactory) -> VLMProcessor:
    return get_processor(family("gemma3").build(tmp_path_factory.mktemp("gemma3"), pan_and_scan=True))


@pytest.mark.parametrize(("least", "most"), [(1, 1), (3, 6), (7, 7)])
@pytest.mark.parametrize("size", [(20, 20), (300, 300), (40, 400)])
def test_internvl_pixel_bounds_are_numbers_of_tiles(
    internvl: Path, least: int, most: int, size: tuple[int, int]
) -> None:
    adapter = get_processor(internvl, min_pixels=least * AREA, max_pixels=(most + 1) * AREA - 1)
    tiles = adapter.expected_image_tokens(*size) // TOKENS_PER_TILE
    assert least <= (tiles - 1 if tiles > 1 else 1) <= most  # without the view of the whole
    prompt = adapter.encode(MESSAGES, [Image.new("RGB", size[::-1])])
    assert len(prompt.model_inputs["pixel_values"]) == tiles


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_pixels": AREA - 1},
        {"min_pixels": 5 * AREA},
        {"min_pixels": AREA + 1, "max_pixels": 2 * AREA - 1},
    ],
)
def test_internvl_bounds_between_two_numbers_of_tiles_are_an_error(
    internvl: Path, bounds: dict[str, int]
) -> None:
    with pytest.raises(ProcessorError, match="Set both"):
        get_processor(internvl, **bounds)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 200), height=st.integers(1, 200))
def test_gemma3_crops_are_counted_without_running_the_image_through(
    panning: VLMProcessor, width: int, height: int
) -> None:
    prompt = panning.encode(MESSAGES, [Image.new("RGB", (width, height))])
    found = int((prompt.input_ids == panning.image_token_id).sum())
    assert found == panning.expected_image_tokens(height, width)


@pytest.mark.parametrize(("name", "token"), [("internvl", "start_image_token"), ("gemma3", "boi_token")])
def test_a_tokenizer_without_the_familys_named_tokens_is_an_error(
    name: str, token: str, tmp_path: Path
) -> None:
    file = family(name).build(tmp_path) / "tokenizer_config.json"
    content = json.loads(file.read_text())
    del content[token]
    file.write_text(json.dumps(content))
    with pytest.raises(ProcessorError, match=rf"None as its {token}.*extra_special_tokens"):
        get_processor(tmp_path)


def test_a_saved_internvl_folder_has_video_settings_even_if_its_model_had_none(
    internvl: Path, tmp_path: Path
) -> None:
    for source in internvl.iterdir():
        if not source.name.startswith("video"):
            (tmp_path / source.name).write_bytes(source.read_bytes())
    get_processor(tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "video_preprocessor_config.json").read_text())
    assert saved == json.loads((internvl / "video_preprocessor_config.json").read_text())
