"""LLaVA (1.5 layout): every image is cropped to one square and takes a fixed number of placeholders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from uniopd_mm.processors.base import VLMProcessor
from uniopd_mm.processors.errors import ProcessorError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class LlavaAdapter(VLMProcessor):
    """``pixel_values`` [images, 3, H, W]; one placeholder per patch that the vision tower hands on."""

    processor_classes: ClassVar = {"llava": "LlavaProcessor"}

    @property
    def image_slot(self) -> str:
        return f"{self.image_token}\n"

    def load_image_processor(self, min_pixels: int | None, max_pixels: int | None) -> None:
        from transformers import AutoImageProcessor

        if min_pixels is not None or max_pixels is not None:
            raise ProcessorError(
                f"min_pixels and max_pixels do nothing for {self.model_type}: {self.path} resizes all images "
                "to one size.  Leave them out."
            )
        self.image_processor = AutoImageProcessor.from_pretrained(self.path, **self.hub)
        vision = self.config.vision_config
        # For old processor files that lack these.  A CLIP tower puts one class token before the patches.
        defaults = {
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": self.config.vision_feature_select_strategy,
            "num_additional_image_tokens": int(vision.model_type == "clip_vision_model"),
        }
        given = {key: value for key, value in self.processor_settings.items() if value is not None}
        self.processor_settings = {**defaults, **given}

    def process_images(self, images: list[Image]) -> tuple[dict[str, Tensor], list[str]]:
        pixels = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels}, [self.image_token * self._count_tokens(*pixels.shape[-2:])] * len(
            images
        )

    def expected_image_tokens(self, height: int, width: int) -> int:
        processor = self.image_processor
        if processor.do_center_crop:
            return self._count_tokens(processor.crop_size["height"], processor.crop_size["width"])
        from PIL import Image

        pixels = self.image_processor([Image.new("RGB", (width, height))], return_tensors="pt")[
            "pixel_values"
        ]
        return self._count_tokens(*pixels.shape[-2:])

    def write_image_files(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)

    def _count_tokens(self, height: int, width: int) -> int:
        """Placeholders of an image of this size after resizing."""
        settings = self.processor_settings
        patches = (height // settings["patch_size"]) * (width // settings["patch_size"])
        dropped = 1 if settings["vision_feature_select_strategy"] == "default" else 0
        return patches + settings["num_additional_image_tokens"] - dropped
