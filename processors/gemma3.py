"""Gemma 3: every image is squeezed into one square and takes a fixed number of soft tokens.

With pan and scan, a long image is followed by crops of itself, each a square with as many soft tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from uniopd_mm.processors.base import VLMProcessor

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_PAN_AND_SCAN = {
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
"""Pixels, crops, longer by shorter side: the family's values, which its published files leave empty."""

_NAMED_TOKENS = (
    '{"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}'
)


class Gemma3Adapter(VLMProcessor):
    """``pixel_values`` [images and their crops, 3, H, W] and ``token_type_ids`` [P], 1 at soft tokens (they see
    each other both ways); the last one also for prompts without images.

    The chat template writes the start token alone; line breaks, soft tokens and the end token come around it.
    Pan and scan is on if preprocessor_config.json says ``"do_pan_and_scan": true``; the family's own processor
    leaves that out of account and wants ``do_pan_and_scan=True`` in every call.  ``min_pixels`` and
    ``max_pixels`` are errors: there is one size.
    """

    token_inputs = ("token_type_ids",)
    processor_classes: ClassVar = {"gemma3": "Gemma3Processor"}

    @property
    def image_marker(self) -> str:
        return self.named_token("boi_token", _NAMED_TOKENS)

    def load_image_processor(self, min_pixels: int | None, max_pixels: int | None) -> None:
        from transformers import AutoImageProcessor

        self.refuse_pixel_bounds(min_pixels, max_pixels)
        self.image_processor = AutoImageProcessor.from_pretrained(self.path, **self.hub)
        for name, value in _PAN_AND_SCAN.items():
            if getattr(self.image_processor, name) is None:
                setattr(self.image_processor, name, value)
        self.fill_processor_settings({"image_seq_length": self.config.mm_tokens_per_image})
        soft_tokens = self.image_token * self.processor_settings["image_seq_length"]
        end = self.named_token("eoi_token", _NAMED_TOKENS)
        self._square = f"\n\n{self.image_marker}{soft_tokens}{end}\n\n"

    def process_images(self, images: list[Image]) -> tuple[dict[str, Tensor], list[str]]:
        tensors = self.image_processor(images, return_tensors="pt")
        texts = [self._image_text(crops) for crops in tensors["num_crops"].tolist()]
        return {"pixel_values": tensors["pixel_values"]}, texts

    def expected_image_tokens(self, height: int, width: int) -> int:
        return (1 + self._count_crops(height, width)) * self.processor_settings["image_seq_length"]

    def resize_image(self, image: Image) -> Image | None:
        """The square; None for an image with crops of its own."""
        return None if self._count_crops(image.height, image.width) else self.processed_picture(image)

    def write_image_files(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)

    def _image_text(self, crops: int) -> str:
        if not crops:
            return self._square
        return (
            f"Here is the original image {self._square} and here are some crops to help you see better "
            + " ".join([self._square] * crops)
        )

    def _count_crops(self, height: int, width: int) -> int:
        """Crops along the longer side, by the arithmetic and roundings of the family's image processor."""
        processor = self.image_processor
        longer, shorter = max(height, width), min(height, width)
        if not processor.do_pan_and_scan or longer / shorter < processor.pan_and_scan_min_ratio_to_activate:
            return 0
        smallest = processor.pan_and_scan_min_crop_size
        crops = max(2, min(math.floor(longer / shorter + 0.5), longer // smallest))
        crops = min(crops, processor.pan_and_scan_max_num_crops)
        return crops if min(math.ceil(longer / crops), shorter) >= smallest else 0
