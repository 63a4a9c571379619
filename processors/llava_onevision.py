"""LLaVA-OneVision: an image alone in its prompt is tiled as in LLaVA-NeXT, several images get one tile each.

The family's own AutoProcessor also builds a video processor, which exists only beside torchvision.  Images
need the image processor alone, so this adapter works with and without torchvision.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from uniopd_mm.processors.errors import ProcessorError
from uniopd_mm.processors.llava_next import LlavaNextAdapter

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_ANYRES = "anyres_max_"
_MOST_OVER = 1.1
"""Tiles of one image are scaled down when their side exceeds the budget by more than this; set in the model."""


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """As LLaVA-NeXT, and ``batch_num_images`` [prompts with images], int64: one image is tiled, several are not.

    ``min_pixels`` and ``max_pixels`` are errors, for LLaVA-NeXT's reason.
    """

    processor_classes: ClassVar = {"llava_onevision": "LlavaOnevisionProcessor"}

    def load_image_processor(self, min_pixels: int | None, max_pixels: int | None) -> None:
        super().load_image_processor(min_pixels, max_pixels)
        budget = self.processor_settings["vision_aspect_ratio"]
        if not budget.startswith(_ANYRES) or not budget.removeprefix(_ANYRES).isdecimal():
            raise ProcessorError(
                f"vision_aspect_ratio of {self.path} is {budget!r}; expected {_ANYRES!r} and the most tiles' "
                "worth of features an image may take, such as 'anyres_max_9'.  The model knows no other kind."
            )

    def default_settings(self) -> dict[str, Any]:
        vision = self.config.vision_config
        return {
            "num_image_tokens": (vision.image_size // vision.patch_size) ** 2
            + int(vision.model_type == "clip_vision_model"),
            "vision_feature_select_strategy": self.config.vision_feature_select_strategy,
            "vision_aspect_ratio": self.config.vision_aspect_ratio,
        }

    def process_images(self, images: list[Image]) -> tuple[dict[str, Tensor], list[str]]:
        # A list within a list is one prompt; a flat one would be a prompt for each image.
        tensors = self.image_processor([images], do_pad=True, return_tensors="pt")
        if len(images) == 1:
            counts = [self.expected_image_tokens(images[0].height, images[0].width)]
        else:
            counts = [self.tile_tokens() + 1] * len(images)  # a newline behind each
        return dict(tensors), [self.image_token * count for count in counts]

    def tile_side(self) -> int:
        return math.isqrt(self.processor_settings["num_image_tokens"])

    def tile_tokens(self) -> int:
        settings = self.processor_settings
        return settings["num_image_tokens"] - (settings["vision_feature_select_strategy"] == "default")

    def tiled_features(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = super().tiled_features(height, width)
        most_tiles = int(self.processor_settings["vision_aspect_ratio"].removeprefix(_ANYRES))
        ratio = math.sqrt(rows * columns / (most_tiles * self.tile_side() ** 2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > _MOST_OVER else (rows, columns)

    def write_image_files(self, folder: Path) -> None:
        super().write_image_files(folder)
        self.write_video_settings(folder, "LlavaOnevisionVideoProcessor", ("size", "image_mean", "image_std"))
