"""Images of a row: what may stand for one, and how it is opened.

A row names images early and cheaply (:func:`image_source`); they are decoded once, late, by :func:`open_images`.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniopd_mm.errors import DataError
from uniopd_mm.processors import ProcessorError
from uniopd_mm.processors.images import require_pixels, to_rgb
from uniopd_mm.rollout import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Decoders that may run on data; Pillow's EPS and PDF readers, for one, start other programs."""
_BASE64_HEADS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0A")
"""How base64 text of a PNG, JPEG, GIF, WebP or TIFF (two byte orders) begins."""


def image_source(value: Any, root: str | Path = "") -> Path | str | bytes | Image:
    """One image of a row in the form a Prompt stores: a file, a base64 / data-URI string, bytes or a PIL image.

    Relative paths start from ``root``.  Nothing is read; a ValueError says why ``value`` cannot be an image.
    """
    if callable(value):  # a picture that stays where it is until it is opened
        return image_source(value(), root)
    if isinstance(value, dict):  # the Image feature of `datasets`, undecoded: {"bytes": ..., "path": ...}
        inner = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
        if inner is None:
            raise ValueError(f"holds neither bytes nor path (keys: {', '.join(map(str, value)) or 'none'})")
        return image_source(inner, root)
    if isinstance(value, bytes | bytearray | memoryview):
        if len(value) == 0:
            raise ValueError("is empty (0 bytes)")
        return bytes(value)
    if isinstance(value, str):
        return _from_text(value, root)
    if isinstance(value, Path):
        return Path(root) / value
    from PIL import Image

    if isinstance(value, Image.Image):
        return value
    found = "null" if value is None else type(value).__name__
    raise ValueError(f"is {found}; expected a path, bytes or base64 text")


def _from_text(text: str, root: str | Path) -> Path | str:
    if not text.strip():
        raise ValueError("is an empty string; expected a path")
    if text.startswith(("http://", "https://")):
        raise ValueError(
            f"is a URL ({text[:80]}); URLs are not fetched while training: save it and give the path"
        )
    if text.startswith("data:") or (len(text) > 64 and text.startswith(_BASE64_HEADS)):
        return text
    return Path(os.path.normpath(os.path.join(root, text.removeprefix("file://"))))


def open_images(prompt: Prompt) -> tuple[Image, ...]:
    """The prompt's images in order: decoded, upright (EXIF), RGB, transparency on white, first frame of animations.

    A missing, empty, truncated, oversized or undecodable image is a :class:`DataError` that names ``prompt.source``.
    """
    where, count = prompt.source or prompt.id, len(prompt.images)
    return tuple(_open(value, f"{where}: image {k + 1} of {count}") for k, value in enumerate(prompt.images))


def _open(value: Any, where: str) -> Image:
    from PIL import Image

    try:
        source = image_source(value)
    except ValueError as error:
        raise DataError(f"{where} {error}.") from error
    label = f"{where} ({source})" if isinstance(source, Path) else where
    try:
        return _decode(source, label)
    except ProcessorError as error:
        raise DataError(f"{error} Mend it or remove the row.") from error
    except FileNotFoundError as error:
        raise DataError(f"{label} does not exist. Restore it, or set image_root.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what_to_do = "Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS."
        raise DataError(f"{label} is too large: {error} {what_to_do}") from error
    # Decoders fail with anything at all on damaged bytes: struct.error, SyntaxError, zlib.error, IndexError, ...
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{label} cannot be decoded: {reason}. Re-encode it or remove the row.") from error


def _decode(source: Path | str | bytes | Image, label: str) -> Image:
    from PIL import Image

    if isinstance(source, Image.Image):
        return _rgb(source, label)
    if isinstance(source, str):
        source = _base64_bytes(source)
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    Image.init()
    with Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        return _rgb(image, label)


def _rgb(image: Image, label: str) -> Image:
    """Grey of 16 bits is scaled to 8, as Pillow itself does with colours of 16 bits: it keeps the upper byte."""
    if image.mode.startswith("I;16"):
        require_pixels(image.width, image.height, label)  # before it is decoded
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    return to_rgb(image, label)


def _base64_bytes(text: str) -> bytes:
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(f"data URI '{head[:40]}' is not base64")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"not valid base64 ({error})") from error
