"""InternVL (the layout of transformers): an image becomes a grid of square tiles, and is shown once more whole.

The family's own AutoProcessor also builds a video processor, which exists only beside torchvision.  Images
need the image processor alone, so this adapter works with and without torchvision.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from uniopd_mm.processors.base import VLMProcessor
from uniopd_mm.processors.errors import ProcessorError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_NAMED_TOKENS = (
    '{"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", '
    '"video_token": "<video>"}'
)


class InternVLAdapter(VLMProcessor):
    """``pixel_values`` [tiles of all images, 3, H, W]; an image of several tiles has one more, the whole of it.

    An image takes its start token, ``image_seq_length`` placeholders for each tile, and its end token.
    ``min_pixels`` and ``max_pixels`` bound the area of its grid: they set the fewest and the most tiles
    (``min_patches``, ``max_patches``).  The view of the whole is not counted.
    """

    processor_classes: ClassVar = {"internvl": "InternVLProcessor"}

    @property
    def image_slot(self) -> str:
        return f"{self.image_token}\n"

    def load_image_processor(self, min_pixels: int | None, max_pixels: int | None) -> None:
        from transformers import AutoImageProcessor

        # The family's processor cuts images into tiles whatever preprocessor_config.json says of it.
        self.image_processor = AutoImageProcessor.from_pretrained(self.path, **self.hub, crop_to_patches=True)
        self._bound_tiles(min_pixels, max_pixels)
        self._start, self._end = (
            self.named_token(f"{end}_image_token", _NAMED_TOKENS) for end in ("start", "end")
        )
        self.fill_processor_settings({"image_seq_length": self.config.image_seq_length})

    def process_images(self, images: list[Image]) -> tuple[dict[str, Tensor], list[str]]:
        tensors = self.image_processor(images, return_tensors="pt")
        per_tile = self.image_token * self.processor_settings["image_seq_length"]
        texts = [f"{self._start}{per_tile * tiles}{self._end}" for tiles in tensors["num_patches"].tolist()]
        return {"pixel_values": tensors["pixel_values"]}, texts

    def expected_image_tokens(self, height: int, width: int) -> int:
        tiles = self.image_processor.get_number_of_image_patches(height, width)
        return tiles * self.processor_settings["image_seq_length"]

    def resize_image(self, image: Image) -> Image | None:
        """The tile of an image that is one; None for more: a grid of tiles cannot hold the view of the whole too."""
        tiles = self.image_processor.get_number_of_image_patches(image.height, image.width)
        return self.processed_picture(image) if tiles == 1 else None

    def write_image_files(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        self.write_video_settings(folder, "InternVLVideoProcessor", ("size", "image_mean", "image_std"))

    def _bound_tiles(self, min_pixels: int | None, max_pixels: int | None) -> None:
        processor = self.image_processor
        height, width = processor.size["height"], processor.size["width"]
        if min_pixels is not None:
            processor.min_patches = max(1, math.ceil(min_pixels / (height * width)))
        if max_pixels is not None:
            processor.max_patches = max_pixels // (height * width)
        if not 1 <= processor.min_patches <= processor.max_patches:
            given = f"min_pixels={min_pixels}, max_pixels={max_pixels}"
            raise ProcessorError(
                f"{self.path} cannot cut images into at least {processor.min_patches} and at most "
                f"{processor.max_patches} tiles of {width} x {height} = {height * width} pixels (given here: "
                f"{given}).  Set both so that min_pixels <= n * {height * width} <= max_pixels for a number of "
                "tiles n from 1 on."
            )
