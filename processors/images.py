"""Images before a family's own image processor sees them, and the check of the library it runs on."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import metadata, util
from typing import TYPE_CHECKING, Any

from uniopd_mm.processors.errors import ProcessorError

if TYPE_CHECKING:
    from PIL.Image import Image


def to_rgb(image: Any, label: str = "The image") -> Image:
    """Upright RGB copy: EXIF rotation applied, transparency on white, as transformers' image processors do.

    ``label`` names the image in errors.
    """
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        found = type(image).__name__
        raise ProcessorError(f"{label} is a {found}; expected a PIL image: PIL.Image.open(path).")
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright.convert("RGBA"))
        upright = upright.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's, for truncated and malformed files
        raise ProcessorError(f"{label} cannot be decoded: {error}.") from error
    if 0 in upright.size:
        raise ProcessorError(f"{label} has no pixels ({upright.width} x {upright.height}).")
    return upright


def to_rgb_all(images: Sequence[Any]) -> list[Image]:
    return [to_rgb(image, f"Image {index + 1} of {len(images)}") for index, image in enumerate(images)]


def require_working_torchvision() -> None:
    """Error if torchvision is installed but broken; transformers would fail later and say something else.

    Without torchvision, images are processed with Pillow, so its absence is fine.
    """
    if util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        import torch

        raise ProcessorError(
            f"torchvision {_version('torchvision')} is installed but cannot be imported beside torch "
            f"{torch.__version__} ({type(error).__name__}: {error}).  Either remove it, and images are "
            "processed with Pillow: pip uninstall torchvision.  Or install the build made for this torch, "
            "from the same index as torch."
        ) from error


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(unknown version)"
