"""Images before a family's own image processor sees them, and the check of the library it runs on."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from importlib import metadata, util
from typing import TYPE_CHECKING, Any

from uniopd_mm.processors.errors import ProcessorError

if TYPE_CHECKING:
    from PIL.Image import Image

_TORCH_WHEELS = "https://download.pytorch.org/whl"


def to_rgb(image: Any, label: str = "The image") -> Image:
    """Upright RGB copy: EXIF rotation applied as transformers does to files, transparency on white as its image
    processors do, first frame of an animation.

    A ProcessorError that begins with ``label`` for anything that is no picture, cannot be decoded, is larger than
    Pillow trusts (PIL.Image.MAX_IMAGE_PIXELS) or has brightness values that 8 bits would cut off.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        found = type(image).__name__
        raise ProcessorError(f"{label} is a {found}; expected a PIL image: PIL.Image.open(path).")
    require_pixels(image.width, image.height, label)  # as the file's header says, before anything is decoded
    _decode(image, label)
    _require_8_bits(image, label)
    try:
        return _upright_on_white(image)
    # Damaged EXIF data fails with anything at all, even SyntaxError.
    except Exception as error:
        what = f"(mode {image.mode}) cannot be turned upright and converted to RGB"
        raise ProcessorError(f"{label} {what}: {_say(error)}.") from error


def to_rgb_all(images: Sequence[Any]) -> list[Image]:
    return [to_rgb(image, f"Image {index + 1} of {len(images)}") for index, image in enumerate(images)]


def to_picture(pixels: Any) -> Image:
    """Pixel values [3, H, W] uint8, array or tensor, as an RGB image."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.asarray(pixels).transpose(1, 2, 0))


def are_equal(one: Image, other: Image) -> bool:
    """Whether two RGB images have the same size and the same pixels."""
    from PIL import ImageChops

    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def require_pixels(width: int, height: int, label: str) -> None:
    """ProcessorError unless an image of this size has pixels, and no more than Pillow trusts a file to have.

    Pillow itself warns at the same limit, and refuses only twice as many.
    """
    from PIL import Image

    if width < 1 or height < 1:
        raise ProcessorError(f"{label} has no pixels ({width} x {height}).")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ProcessorError(
            f"{label} is too large: {width} x {height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {limit}.  "
            "Shrink it, or raise that limit if you trust it."
        )


def _decode(image: Image, label: str) -> None:
    try:
        image.load()
    # Decoders fail with anything at all on damaged bytes: struct.error, EOFError, IndexError, ...
    except Exception as error:
        image.close()  # asked a second time, Pillow hands out the part that it had decoded (JPEG 2000)
        raise ProcessorError(f"{label} cannot be decoded: {_say(error)}.") from error


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".")


def _require_8_bits(image: Image, label: str) -> None:
    """Modes I;16, I and F hold any number; converting them to RGB makes white of all above 255."""
    if not image.mode.startswith(("I", "F")):
        return
    wide = image.convert("F") if image.mode.startswith("I;") else image
    extrema: Any = wide.getextrema()  # of the one band that these modes have
    least, most = extrema
    if not (least >= 0 and most <= 255):
        raise ProcessorError(
            f"{label} has brightness values from {least:g} to {most:g} (mode {image.mode}); expected 0 to 255, the "
            "others would be cut off.  Scale it, for 16 bits: "
            'image.convert("I").point(lambda value: value / 256).convert("L").'
        )


def _upright_on_white(image: Image) -> Image:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return upright.convert("RGB")


def require_working_torchvision() -> None:
    """Error if torchvision is installed but broken; transformers would fail later and say something else.

    Without torchvision, images are processed with Pillow, so its absence is fine.
    """
    if util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        torch = _version("torch")
        build = re.search(r"\+(cpu|xpu|cu\d+|rocm[\d.]+)$", torch)  # wheels from elsewhere than PyPI
        index = f" --index-url {_TORCH_WHEELS}/{build[1]}" if build else ""
        raise ProcessorError(
            f"torchvision {_version('torchvision')} is installed but cannot be imported beside torch {torch} "
            f"({type(error).__name__}: {error}).  Remove it, and images are processed with Pillow: pip uninstall "
            f"torchvision.  To have it, install then the build made for this torch: pip install torch=={torch} "
            f"torchvision{index}"
        ) from error


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(unknown version)"
