"""Idefics3 and SmolVLM: an image is cut into rows of square tiles, and shown once more as a whole.

SmolVLM's own AutoProcessor also builds a video processor, which exists only beside torchvision, and asks for
num2words.  Images need neither.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from uniopd_mm.processors.base import VIDEO_FILE, VLMProcessor, write_json
from uniopd_mm.processors.errors import ProcessorError
from uniopd_mm.processors.images import to_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"
_LONGEST_EDGE = 4096
"""Pixels; the family resizes no image beyond it, whatever its settings say."""
_MOST_TILES = 12
"""Rows and columns that a tokenizer may have tokens for: the longest edge in the smallest tiles of the family."""


class Idefics3Adapter(VLMProcessor):
    """``pixel_values`` [prompts with images, most tiles of a prompt, 3, side, side] and ``pixel_attention_mask``
    [prompts with images, most tiles, side, side]; tiles that are missing are zeros, which the model leaves out.

    Every image, however small, is resized to n tiles along its longer side (``size.longest_edge`` / tile side) and
    1 to n along the other; so it covers n to n * n tiles, without the view of the whole.  ``min_pixels`` and
    ``max_pixels`` bound that area for all images: n moves from the model's own value as far as they require.
    """

    vision_tokens = (
        _FAKE,
        _GLOBAL,
        *(f"<row_{row}_col_{col}>" for row in range(1, _MOST_TILES + 1) for col in range(1, _MOST_TILES + 1)),
    )
    processor_classes: ClassVar = {"idefics3": "Idefics3Processor", "smolvlm": "SmolVLMProcessor"}

    def load_image_processor(self, min_pixels: int | None, max_pixels: int | None) -> None:
        from transformers import AutoImageProcessor

        self.image_processor = AutoImageProcessor.from_pretrained(self.path, **self.hub)
        self.tile_side: int = self.image_processor.max_image_size["longest_edge"]
        if min_pixels is not None or max_pixels is not None:
            size = {"longest_edge": self._find_longest_edge(min_pixels, max_pixels)}
            self.image_processor = AutoImageProcessor.from_pretrained(self.path, **self.hub, size=size)
        self.fill_processor_settings({"image_seq_len": self._count_features()})
        self._check_tokens_per_tile()

    def process_images(self, images: list[Image]) -> tuple[dict[str, Tensor], list[str]]:
        tensors = dict(self.image_processor([images], return_row_col_info=True, return_tensors="pt"))
        (rows,), (cols,) = tensors.pop("rows"), tensors.pop("cols")
        return tensors, [self._image_text(*grid) for grid in zip(rows, cols, strict=True)]

    def expected_image_tokens(self, height: int, width: int) -> int:
        rows, cols = self._count_tiles(height, width)
        tiles = rows * cols + 1 if rows * cols > 1 else 1
        return tiles * self.processor_settings["image_seq_len"]

    def resize_image(self, image: Image) -> Image | None:
        """All tiles in one picture.  The image processor makes the view of the whole of them, not of the image; that one
        resizing is left to whoever gets the picture."""
        processor = self.image_processor
        if not (processor.do_image_splitting and processor.do_resize):
            return None
        pixels = processor.resize(processor.process_image(image), processor.size, processor.resample)
        return to_picture(
            processor.resize_for_vision_encoder(pixels, self.tile_side, resample=processor.resample)
        )

    def join_vision(self, name: str, tensors: list[Tensor]) -> Tensor:
        import torch
        from torch.nn.functional import pad

        most = max(tensor.shape[1] for tensor in tensors)
        per_tile = (0, 0) * (tensors[0].dim() - 2)
        return torch.cat([pad(tensor, (*per_tile, 0, most - tensor.shape[1])) for tensor in tensors])

    def write_image_files(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        if self.model_type == "smolvlm":
            write_json(folder / VIDEO_FILE, self._video_settings())

    def _image_text(self, rows: int, cols: int) -> str:
        """What stands for an image cut into so many tiles; 0 x 0 is an image of a single tile."""
        tokens = self.image_token * self.processor_settings["image_seq_len"]
        whole = f"{_FAKE}{_GLOBAL}{tokens}{_FAKE}"
        if not rows:
            return whole
        lines = (
            "".join(f"{_FAKE}<row_{row}_col_{col}>{tokens}" for col in range(1, cols + 1))
            for row in range(1, rows + 1)
        )
        return "\n".join(lines) + f"\n\n{whole}"

    def _count_tiles(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns), by the arithmetic and roundings of the family's image processor."""
        processor, side = self.image_processor, self.tile_side
        if not processor.do_image_splitting:
            return 1, 1
        if processor.do_resize:
            height, width = _fit(height, width, processor.size["longest_edge"], even=True)
            if max(height, width) > _LONGEST_EDGE:
                height, width = _fit(height, width, _LONGEST_EDGE)
        height, width = _fit(height, width, math.ceil(max(height, width) / side) * side)
        return math.ceil(height / side), math.ceil(width / side)

    def _find_longest_edge(self, min_pixels: int | None, max_pixels: int | None) -> int:
        processor, area = self.image_processor, self.tile_side**2
        if not (processor.do_image_splitting and processor.do_resize):
            raise ProcessorError(
                f"min_pixels and max_pixels do nothing for {self.path}: its preprocessor_config.json says "
                f"do_image_splitting={processor.do_image_splitting} and do_resize={processor.do_resize}, and "
                "without both, images are not brought to a size.  Leave them out."
            )
        edge = processor.size["longest_edge"]
        own = math.ceil(min(edge, _LONGEST_EDGE) / self.tile_side)
        most = max(own, self._most_tiles())
        lower = 1 if min_pixels is None else max(1, math.ceil(min_pixels / area))
        upper = most if max_pixels is None else min(most, math.isqrt(max(max_pixels, 0) // area))
        if lower > upper:
            raise ProcessorError(
                f"{self.path} cannot resize every image to at least min_pixels={min_pixels} and at most "
                f"max_pixels={max_pixels}: images become n to n * n tiles of {self.tile_side} x {self.tile_side} = "
                f"{area} pixels, n from 1 to {most}.  Set both so that min_pixels <= n * {area} and "
                f"max_pixels >= n * n * {area} for one n."
            )
        tiles = min(max(own, lower), upper)
        return edge if tiles == own else tiles * self.tile_side

    def _most_tiles(self) -> int:
        """Along the longer side: what the largest image has, and what the tokenizer can name.  Where it has no
        tokens for rows and columns, they are spelled as text."""
        most = math.ceil(_LONGEST_EDGE / self.tile_side)
        named = sum(f"<row_{n}_col_{n}>" in self._vision for n in range(1, most + 1))
        return named or most

    def _count_features(self) -> int:
        """What the model reads in the place of a tile."""
        patches = (self.tile_side // self.config.vision_config.patch_size) ** 2
        return patches // self.config.scale_factor**2

    def _check_tokens_per_tile(self) -> None:
        found, expected = self.processor_settings["image_seq_len"], self._count_features()
        if found != expected:
            raise ProcessorError(
                f"processor_config.json of {self.path} says image_seq_len={found}, but config.json makes "
                f"{expected} of a tile of {self.tile_side} x {self.tile_side} pixels (max_image_size in "
                "preprocessor_config.json).  Correct whichever is not the model's own."
            )

    def _video_settings(self) -> dict[str, Any]:
        """The model's own video settings, wherever its folder keeps them; without them AutoProcessor and servers
        refuse the saved folder, or take the settings of images for those of videos."""
        settings = self.read_video_settings()
        kept = {key: value for key, value in settings.items() if key != "image_processor_type"}
        return {"video_processor_type": "SmolVLMVideoProcessor", **kept}


def _fit(height: int, width: int, edge: int, even: bool = False) -> tuple[int, int]:
    """(height, width) in pixels with ``edge`` as the longer side and the other in proportion, rounded down; with
    ``even``, up to an even number."""
    ratio = width / height
    if width >= height:
        other = int(edge / ratio)
        return max(other + (other % 2 if even else 0), 1), edge
    other = int(edge * ratio)
    return edge, max(other + (other % 2 if even else 0), 1)
