"""LLaVA-NeXT and LLaVA-OneVision: the placeholders of an image are as many as the features the model makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import family
from families.llava_next import PINPOINTS, TILE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from uniopd_mm.processors import ProcessorError, VLMProcessor, get_processor

NAMES = ("llava_next", "llava_onevision")
MOST_TILES = 1 + max(high * wide for high, wide in PINPOINTS) // TILE**2


@pytest.fixture(
    scope="module", params=[(name, tower) for name in NAMES for tower in ("clip", "siglip")], ids="-".join
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[VLMProcessor, Callable[..., Any]]:
    """The adapter, and what the model makes of images."""
    from transformers import AutoModelForImageTextToText

    name, tower = request.param
    folder = family(name).build(tmp_path_factory.mktemp("model"), tower=tower)
    return get_processor(folder), AutoModelForImageTextToText.from_pretrained(
        folder
    ).eval().get_image_features


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
@example(height=1, width=1)
@example(height=1, width=4000)
@example(height=4000, width=1)
@example(height=84, width=85)
def test_expected_image_tokens_is_the_number_of_features_the_model_makes(
    pair: tuple[VLMProcessor, Callable[..., Any]], height: int, width: int
) -> None:
    adapter, get_image_features = pair
    tiles = torch.zeros(1, MOST_TILES, 3, TILE, TILE)
    with torch.no_grad():
        (features,) = get_image_features(tiles, torch.tensor([[height, width]])).pooler_output
    assert len(features) == adapter.expected_image_tokens(height, width)


def test_each_of_several_images_takes_what_the_model_makes_of_it(
    pair: tuple[VLMProcessor, Callable[..., Any]],
) -> None:
    adapter, get_image_features = pair
    images = [tiny.random_image(200, 40), tiny.random_image(60, 90)]
    prompt = adapter.encode([{"role": "user", "content": [{"type": "image"}] * 2}], images)
    with torch.no_grad():
        features = get_image_features(**prompt.model_inputs).pooler_output
    spans = zip(prompt.image_spans, features, strict=True)
    assert all(end - start == len(made) for (start, end), made in spans)


@pytest.mark.parametrize("name", NAMES)
def test_pixel_bounds_that_the_model_would_not_follow_are_an_error(name: str, tmp_path: Path) -> None:
    folder = family(name).build(tmp_path)
    for bound in ("min_pixels", "max_pixels"):
        with pytest.raises(ProcessorError, match=r"image_grid_pinpoints of its config\.json"):
            get_processor(folder, **{bound: 10_000})


@pytest.mark.parametrize("name", NAMES)
def test_grids_in_another_order_than_the_models_are_an_error(name: str, tmp_path: Path) -> None:
    folder = family(name).build(tmp_path)
    _edit(folder / "config.json", image_grid_pinpoints=PINPOINTS[::-1])
    with pytest.raises(ProcessorError, match="in the same order"):
        get_processor(folder)


def test_a_feature_budget_of_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    folder = family("llava_onevision").build(tmp_path)
    _edit(folder / "processor_config.json", vision_aspect_ratio="square")
    with pytest.raises(ProcessorError, match="'square'; expected 'anyres_max_'"):
        get_processor(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_old_folders_without_processor_settings_count_by_the_config(
    name: str, tower: str, tmp_path: Path
) -> None:
    folder = family(name).build(tmp_path, tower=tower)
    expected = get_processor(folder).expected_image_tokens(90, 60)
    (folder / "processor_config.json").unlink()
    assert get_processor(folder).expected_image_tokens(90, 60) == expected


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
