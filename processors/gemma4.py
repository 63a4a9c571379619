"""Gemma 4: an image keeps its shape and is resized to fill a budget of placeholders.

The family's own AutoProcessor also builds a video processor, which exists only beside torchvision.  Images
need the image processor alone, so this adapter works with and without torchvision.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from uniopd_mm.processors.base import VLMProcessor
from uniopd_mm.processors.errors import ProcessorError
from uniopd_mm.processors.images import to_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_BUDGETS = (70, 140, 280, 560, 1120)
"""Most placeholders of one image; the image processor takes no other."""


class Gemma4Adapter(VLMProcessor):
    """``pixel_values`` [images, patches, values], ``image_position_ids`` [images, patches, 2] (column and row of
    each patch, -1 at padding) and ``mm_token_type_ids`` [P], 1 at image placeholders; the last one also for
    prompts without images.

    Small images are scaled up: every image comes as close to its budget as whole placeholders of 48 x 48 pixels
    allow.  So ``min_pixels`` and ``max_pixels`` bound the budget: the model's own is kept if it lies within
    them, else the nearest that does is taken.
    """

    token_inputs = ("mm_token_type_ids",)
    vision_tokens = ("<|image>", "<image|>", "<|audio>", "<|audio|>", "<audio|>")
    """Audio among them: a sampled ``<|audio|>`` is a placeholder as well."""
    processor_classes: ClassVar = {"gemma4": "Gemma4Processor"}

    def load_image_processor(self, min_pixels: int | None, max_pixels: int | None) -> None:
        from transformers import AutoImageProcessor

        self.image_processor = AutoImageProcessor.from_pretrained(self.path, **self.hub)
        budget = self._choose_budget(min_pixels, max_pixels)
        self.image_processor.max_soft_tokens = budget
        # The template writes the placeholder alone; these go around an image's placeholders.
        self.around_image = [self._require_vision_token(name) for name in ("boi_token_id", "eoi_token_id")]
        # A folder may say nothing of audio, yet the family's processor is not built without its audio half.
        audio = {"feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}}
        self.processor_settings = {**audio, **self.processor_settings, "image_seq_length": budget}

    def process_images(self, images: list[Image]) -> tuple[dict[str, Tensor], list[str]]:
        tensors = dict(self.image_processor(images, return_tensors="pt"))
        counts = tensors.pop("num_soft_tokens_per_image").tolist()
        start, end = self.around_image
        return tensors, [f"{start}{self.image_token * count}{end}" for count in counts]

    def expected_image_tokens(self, height: int, width: int) -> int:
        from transformers.models.gemma4.processing_gemma4 import get_aspect_ratio_preserving_size

        resized = get_aspect_ratio_preserving_size(height=height, width=width, **self._geometry())
        return math.prod(resized) // self._pixels_per_token()

    def resize_image(self, image: Image) -> Image | None:
        """Whole placeholders within the budget.  Rounding down may leave room for one more row or column in the shape
        that it made; then there is no picture that the image processor would not scale up once more."""
        processor = self.image_processor
        if not processor.do_resize:
            return None
        pixels = processor.aspect_ratio_preserving_resize(
            processor.process_image(image), resample=processor.resample, **self._geometry()
        )
        return to_picture(pixels)

    def write_image_files(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        self.write_video_settings(folder, "Gemma4VideoProcessor", ("patch_size", "pooling_kernel_size"))

    def _geometry(self) -> dict[str, int]:
        processor = self.image_processor
        return {
            "patch_size": processor.patch_size,
            "max_patches": processor.max_soft_tokens * processor.pooling_kernel_size**2,
            "pooling_kernel_size": processor.pooling_kernel_size,
        }

    def _pixels_per_token(self) -> int:
        return (self.image_processor.patch_size * self.image_processor.pooling_kernel_size) ** 2

    def _choose_budget(self, min_pixels: int | None, max_pixels: int | None) -> int:
        own, area = self.image_processor.max_soft_tokens, self._pixels_per_token()
        least = 0 if min_pixels is None else min_pixels
        most = math.inf if max_pixels is None else max_pixels
        fitting = [budget for budget in _BUDGETS if least <= budget * area <= most]
        if not fitting:
            sizes = ", ".join(str(budget * area) for budget in _BUDGETS)
            raise ProcessorError(
                f"{self.path} resizes every image to one of {sizes} pixels, of which none lies between "
                f"min_pixels={min_pixels} and max_pixels={max_pixels}.  Set them around one of these."
            )
        return min(fitting, key=lambda budget: abs(budget - own))

    def _require_vision_token(self, name: str) -> str:
        token_id = getattr(self.config, name)
        for token, known_id in self._vision.items():
            if known_id == token_id:
                return token
        expected = " or ".join(self.vision_tokens[:2])
        raise ProcessorError(
            f"config.json of {self.path} says that {name} is {token_id}, which is no vision token of the "
            f"tokenizer; expected {expected} as an added token.  Model and tokenizer do not belong together."
        )
