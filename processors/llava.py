"""LLaVA (1.5 layout): every image is cropped to one square and takes a fixed number of placeholders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from uniopd_mm.processors.base import VLMProcessor
from uniopd_mm.processors.errors import ProcessorError
from uniopd_mm.processors.images import require_pixels

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

        self.refuse_pixel_bounds(min_pixels, max_pixels)
        self.image_processor = AutoImageProcessor.from_pretrained(self.path, **self.hub)
        vision = self.config.vision_config
        if vision.model_type == "pixtral":  # rows and end of an image are tokens of their own, sizes differ
            raise ProcessorError(
                f"{self.path} is a Pixtral model under the model type llava; this adapter would give it wrong tokens.  "
                "Register an adapter for it: processors/README.md shows one."
            )
        # For old processor files that lack these.  A CLIP tower puts one class token before the patches.
        defaults = {
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": self.config.vision_feature_select_strategy,
            "num_additional_image_tokens": int(vision.model_type == "clip_vision_model"),
        }
        self.fill_processor_settings(defaults)

    def process_images(self, images: list[Image]) -> tuple[dict[str, Tensor], list[str]]:
        for image in images:
            self._require_size_after_resizing(image.width, image.height)
        pixels = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels}, [self.image_token * self._count_tokens(*pixels.shape[-2:])] * len(
            images
        )

    def expected_image_tokens(self, height: int, width: int) -> int:
        self._require_size_after_resizing(width, height)
        processor = self.image_processor
        if processor.do_center_crop:
            return self._count_tokens(processor.crop_size["height"], processor.crop_size["width"])
        from PIL import Image

        pixels = self.image_processor([Image.new("RGB", (width, height))], return_tensors="pt")[
            "pixel_values"
        ]
        return self._count_tokens(*pixels.shape[-2:])

    def resize_image(self, image: Image) -> Image | None:
        """The square, cropped; the image processor takes it as it is if it crops to the size that it resizes to."""
        self._require_size_after_resizing(image.width, image.height)
        return self.processed_picture(image)

    def write_image_files(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)

    def _require_size_after_resizing(self, width: int, height: int) -> None:
        """The shorter side is resized before the crop: to 336 pixels, a line of 10000 x 1 takes 11 GB."""
        edge = self.image_processor.size.shortest_edge
        if self.image_processor.do_resize and edge:
            scale = edge / min(width, height)
            label = f"An image of {width} x {height} pixels, its shorter side resized to {edge},"
            require_pixels(round(width * scale), round(height * scale), label)

    def _count_tokens(self, height: int, width: int) -> int:
        """Placeholders of an image of this size after resizing."""
        settings = self.processor_settings
        patches = (height // settings["patch_size"]) * (width // settings["patch_size"])
        dropped = 1 if settings["vision_feature_select_strategy"] == "default" else 0
        return patches + settings["num_additional_image_tokens"] - dropped
