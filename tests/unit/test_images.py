"""Pictures that are damaged, oversized or odd: one typed error that names them, or the picture transformers sees."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from uniopd_mm.engines.base import encode_prompt
from uniopd_mm.errors import DataError
from uniopd_mm.processors import ProcessorError, get_processor
from uniopd_mm.processors import images as adapter_images
from uniopd_mm.processors.images import to_rgb
from uniopd_mm.prompts import open_images
from uniopd_mm.rollout import Prompt

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
COLOUR = tiny.random_image(24, 16, 1)
DEEP_GREY = np.array([[0, 255, 256, 32768], [65535, 4096, 511, 512]], dtype=np.uint16)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def opened(data: bytes) -> ImageFile.ImageFile:
    """Opened, not decoded: Pillow reads pixels when they are first asked for."""
    return Image.open(BytesIO(data))


def row(*images: Any) -> Prompt:
    content = [{"type": "image"} for _ in images]
    return Prompt(
        id="x/1", messages=({"role": "user", "content": content},), images=images, source="x.jsonl:7"
    )


def pixels_of_transformers(image: Image.Image) -> np.ndarray:
    """[H, W, 3] as the image processors of transformers make them of a PIL image."""
    from transformers.image_transforms import convert_to_rgb

    return convert_to_rgb(image, return_numpy=True)


# ---- damaged files


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_image_is_an_error_each_time_it_is_asked_for(format: str) -> None:
    data = encoded(tiny.random_image(200, 200), format)
    with pytest.raises(DataError, match=r"^x\.jsonl:7: image 1 of 1 cannot be decoded"):
        open_images(row(data[: len(data) // 2]))
    if format == "WEBP":  # Pillow looks at the whole file when it opens one
        return
    image = opened(data[: len(data) // 2])
    for _ in range(2):  # of JPEG 2000, Pillow hands out the part that it has when asked again
        with pytest.raises(ProcessorError, match=r"^Image 1 cannot be decoded"):
            to_rgb(image, "Image 1")


@given(
    format=st.sampled_from(FORMATS),
    cut=st.floats(0, 1),
    damage=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=20),
)
@example(format="PNG", cut=1.0, damage=[(0.5, 0)])
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_rgb_or_a_processor_error_and_nothing_else(
    format: str, cut: float, damage: list[tuple[float, int]]
) -> None:
    data = bytearray(encoded(COLOUR, format))
    for place, value in damage:
        data[int(place * len(data))] = value
    try:
        image = opened(bytes(data[: int(cut * len(data))]))
    except Exception:  # not ours: Pillow refuses to open it
        return
    try:
        assert to_rgb(image).mode == "RGB"
    except ProcessorError:
        return


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", b"<html>404</html>", b"\0" * 64]
)
def test_a_text_file_named_png_is_an_error_with_row_and_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"^x\.jsonl:7: image 2 of 2 \(.*a\.png\) cannot be decoded"):
        open_images(row(COLOUR, file))


def test_an_image_whose_file_was_closed_is_an_error() -> None:
    with opened(encoded(COLOUR)) as image:
        pass
    with pytest.raises(ProcessorError, match="cannot be decoded"):
        to_rgb(image)


@pytest.mark.parametrize("size", [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16"])
def test_an_image_without_pixels_is_an_error(mode: str, size: tuple[int, int]) -> None:
    with pytest.raises(ProcessorError, match=rf"no pixels \({size[0]} x {size[1]}\)"):
        to_rgb(Image.new(mode, size))
    with pytest.raises(DataError, match=r"^x\.jsonl:7: image 1 of 1 has no pixels"):
        open_images(row(Image.new(mode, size)))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"garbage", b"II*\0"])
def test_damaged_exif_data_is_an_error(exif: bytes) -> None:
    data = encoded(COLOUR, exif=exif)
    with pytest.raises(ProcessorError, match=r"^Image 1 \(mode RGB\) cannot be turned upright"):
        to_rgb(opened(data), "Image 1")
    with pytest.raises(DataError, match=r"^x\.jsonl:7: image 1 of 1 .* cannot be turned upright"):
        open_images(row(data))


# ---- decompression bombs


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_an_image_that_pillow_only_warns_of_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    data = encoded(Image.new(mode, (50, 30)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = opened(data)
        with pytest.raises(ProcessorError, match=r"50 x 30 pixels.*MAX_IMAGE_PIXELS = 1000"):
            to_rgb(image)
        with pytest.raises(DataError, match=r"^x\.jsonl:7: image 1 of 1 is too large"):
            open_images(row(data))
        undecoded = opened(data)
        with pytest.raises(DataError, match=r"^x\.jsonl:7: image 1 of 1 is too large"):
            open_images(row(undecoded))
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(DataError, match=r"^x\.jsonl:7: image 1 of 1 is too large"):
            open_images(row(data))
    assert image.tile and undecoded.tile, "Pillow has pixels still to decode"


def test_a_bomb_opened_without_a_limit_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    header = b"P6 100000 100000 255\n"
    image = opened(header)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ProcessorError, match="100000 x 100000 pixels"):
        to_rgb(image)
    assert image.tile
    with pytest.raises(DataError, match=r"^x\.jsonl:7: image 1 of 1 is too large"):
        open_images(row(header))


def test_an_icon_that_hides_a_larger_image_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = encoded(Image.new("RGB", (300, 300)))
    entry = b"ic07" + (8 + len(hidden)).to_bytes(4, "big") + hidden  # said to be 128 x 128
    image = opened(b"icns" + (8 + len(entry)).to_bytes(4, "big") + entry)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.raises(ProcessorError, match="90000 pixels"):
        to_rgb(image)


def test_whoever_trusts_a_large_image_can_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (50, 30))
    for limit in (1500, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert to_rgb(image).size == (50, 30)


# ---- odd pictures are those that transformers sees


def _odd_pictures() -> dict[str, bytes]:
    see_through = COLOUR.convert("RGBA")
    see_through.putalpha(tiny.random_image(24, 16, 2).convert("L"))
    palette, frames = COLOUR.quantize(8), [tiny.random_image(24, 16, k) for k in range(3)]
    return {
        "RGB": encoded(COLOUR),
        "RGBA": encoded(see_through),
        "grey": encoded(COLOUR.convert("L")),
        "grey with alpha": encoded(see_through.convert("LA")),
        "black and white": encoded(COLOUR.convert("1")),
        "palette": encoded(palette),
        "palette, one colour transparent": encoded(palette, transparency=3),
        "palette, every colour with its own alpha": encoded(
            palette, transparency=bytes(range(0, 256, 36))[:8]
        ),
        "RGB, one colour transparent": encoded(COLOUR, transparency=COLOUR.getpixel((0, 0))),
        "CMYK JPEG": encoded(COLOUR.convert("CMYK"), "JPEG"),
        "CMYK TIFF": encoded(COLOUR.convert("CMYK"), "TIFF"),
        "YCbCr TIFF": encoded(COLOUR.convert("YCbCr"), "TIFF"),
        "LAB TIFF": encoded(COLOUR.convert("LAB"), "TIFF"),
        "16-bit grey that 8 bits hold": encoded(Image.fromarray(DEEP_GREY % 256)),
        "32-bit grey that 8 bits hold": encoded(COLOUR.convert("L").convert("I"), "TIFF"),
        "float grey that 8 bits hold": encoded(COLOUR.convert("L").convert("F"), "TIFF"),
        "animated GIF": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated GIF with transparency": encoded(
            see_through, "GIF", save_all=True, append_images=frames[1:], disposal=2
        ),
        "animated PNG": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "animated WebP": encoded(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:]),
        "two photos in one file": encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "1 x 1": encoded(Image.new("RGB", (1, 1), "red")),
    }


ODD_PICTURES = _odd_pictures()


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_an_odd_picture_is_the_one_that_transformers_sees(name: str) -> None:
    data = ODD_PICTURES[name]
    expected = pixels_of_transformers(opened(data))
    assert np.array_equal(np.array(to_rgb(opened(data))), expected)
    if "16-bit" not in name:  # a row's 16 bits are scaled, whatever they hold: see below
        (image,) = open_images(row(data))
        assert np.array_equal(np.array(image), expected)


@pytest.mark.parametrize("name", ["animated GIF", "animated PNG", "animated WebP", "two photos in one file"])
def test_the_first_frame_stands_for_an_animation(name: str) -> None:
    image = opened(ODD_PICTURES[name])
    assert image.n_frames == 3
    difference = np.abs(
        np.array(to_rgb(image), dtype=int) - np.array(tiny.random_image(24, 16, 0), dtype=int)
    )
    assert (
        difference.mean() < 8
    )  # JPEG and the GIF's palette are not exact; other frames differ by more than 50


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_is_turned_upright_as_transformers_turns_it(tmp_path: Path, orientation: int) -> None:
    from transformers.image_utils import load_image

    exif, file = Image.Exif(), tmp_path / "a.png"
    exif[0x0112] = orientation
    COLOUR.save(file, exif=exif)
    expected = np.array(load_image(str(file)))
    assert np.array_equal(np.array(to_rgb(Image.open(file))), expected)
    assert np.array_equal(np.array(open_images(row(file))[0]), expected)


# ---- more than 8 bits


def _deep_grey(kind: str) -> bytes:
    image = Image.fromarray(DEEP_GREY)
    if kind == "TIFF, big-endian":
        image = Image.frombytes("I;16B", image.size, DEEP_GREY.astype(">u2").tobytes())
    return encoded(image, kind.partition(",")[0])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, big-endian", "JPEG2000", "PPM"])
def test_brightness_beyond_8_bits_is_refused_not_cut_off(kind: str) -> None:
    data = _deep_grey(kind)
    assert pixels_of_transformers(opened(data)).min(axis=-1).tolist()[0][1:] == [255, 255, 255]
    with pytest.raises(ProcessorError, match=r"from 0 to 65535 \(mode I.*expected 0 to 255"):
        to_rgb(opened(data))


def test_the_advice_for_16_bits_works() -> None:
    image = opened(_deep_grey("TIFF, big-endian"))
    with pytest.raises(ProcessorError) as caught:
        to_rgb(image)
    advice = str(caught.value).rpartition("16 bits: ")[2].rstrip(".")
    assert np.array_equal(np.array(to_rgb(eval(advice, {"image": image})))[..., 0], DEEP_GREY >> 8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, big-endian", "JPEG2000"])
def test_16_bit_grey_of_a_row_is_scaled_to_8_bits(kind: str) -> None:
    (image,) = open_images(row(_deep_grey(kind)))
    assert np.array_equal(np.array(image)[..., 0], DEEP_GREY >> 8)


def test_16_bit_grey_of_a_row_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(DEEP_GREY), exif=exif)
    assert opened(data).size == (4, 2) and open_images(row(data))[0].size == (2, 4)


def test_a_row_whose_scale_nobody_knows_is_an_error() -> None:
    for data in (_deep_grey("PPM"), encoded(Image.fromarray(DEEP_GREY.astype(np.float32)), "TIFF")):
        with pytest.raises(
            DataError, match=r"^x\.jsonl:7: image 1 of 1 has brightness values from 0 to 65535"
        ):
            open_images(row(data))
    with pytest.raises(DataError, match="from -1 to 0"):
        open_images(row(Image.fromarray(np.array([[-1, 0]], dtype=np.int32))))


# ---- extreme shapes


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def build(name: str) -> Path:
        module = families.family(name)
        return module.build(tmp_path_factory.mktemp(name), chat_template=module.CHAT_TEMPLATE)

    return build


SHAPES = ((1, 1), (3, 1), (1, 3), (3, 3), (10_000, 1), (1, 2000))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_any_shape_gives_what_the_familys_own_processor_gives_or_a_processor_error(
    family_folder: Callable[[str], Path], name: str
) -> None:
    folder = family_folder(name)
    adapter, reference = get_processor(folder), families.family(name).reference(folder)
    for size in SHAPES:
        image = tiny.random_image(*size)
        messages = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        try:
            prompt = adapter.encode(messages, [image], add_generation_prompt=False)
        except ProcessorError as error:
            assert f"{size[0]} x {size[1]}" in str(error)
            with pytest.raises(ProcessorError, match=f"{size[0]} x {size[1]}"):
                adapter.expected_image_tokens(size[1], size[0])
            continue
        expected = reference.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
        assert torch.equal(prompt.model_inputs["pixel_values"], expected["pixel_values"])
        placeholders = int((prompt.input_ids == adapter.image_token_id).sum())
        assert placeholders == adapter.expected_image_tokens(size[1], size[0])


def test_a_row_whose_shape_the_family_refuses_is_named(family_folder: Callable[[str], Path]) -> None:
    adapter = get_processor(family_folder("qwen2_5_vl"))
    prompt = row(encoded(Image.new("RGB", (10_000, 1))))
    with pytest.raises(DataError, match=r"^x\.jsonl:7: .*10000 x 1 pixels"):
        encode_prompt(adapter, prompt, open_images(prompt))


# ---- the library that images are processed with


@pytest.mark.parametrize(
    ("torch_version", "command"),
    [
        ("2.13.0+cpu", "torch==2.13.0+cpu torchvision --index-url https://download.pytorch.org/whl/cpu"),
        (
            "2.13.0+cu130",
            "torch==2.13.0+cu130 torchvision --index-url https://download.pytorch.org/whl/cu130",
        ),
        ("2.13.0", "torch==2.13.0 torchvision"),
        ("2.14.0a0+34c6371", "torch==2.14.0a0+34c6371 torchvision"),
    ],
)
def test_a_broken_torchvision_comes_with_the_command_that_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_version: str, command: str
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    versions = {"torch": torch_version, "torchvision": "0.28.0"}
    monkeypatch.setattr(adapter_images.metadata, "version", versions.__getitem__)
    with pytest.raises(ProcessorError, match=r"torchvision 0\.28\.0.*pip uninstall torchvision") as caught:
        adapter_images.require_working_torchvision()
    assert str(caught.value).endswith(f"pip install {command}")
