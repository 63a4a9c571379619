"""Qwen2.5-VL and Qwen3-VL: an image keeps its shape, resized to a number of pixels between two bounds.

The family's own AutoProcessor also builds a video processor, which exists only beside torchvision.  Images
need the image processor alone, so this adapter works with and without torchvision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from uniopd_mm.processors.base import VLMProcessor, write_json
from uniopd_mm.processors.errors import ProcessorError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_VIDEO_FILE = "video_preprocessor_config.json"


class QwenVLAdapter(VLMProcessor):
    """``pixel_values`` [patches of all images, values], ``image_grid_thw`` [images, 3] in patches and
    ``mm_token_type_ids`` [P], 1 at image placeholders; the last one also for prompts without images."""

    token_inputs = ("mm_token_type_ids",)
    processor_classes: ClassVar = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
    video_processor_types: ClassVar = {
        "qwen2_5_vl": "Qwen2VLVideoProcessor",
        "qwen3_vl": "Qwen3VLVideoProcessor",
    }

    @property
    def image_slot(self) -> str:
        config = self.config
        ids = [config.vision_start_token_id, self.image_token_id, config.vision_end_token_id]
        return "".join(self.tokenizer.convert_ids_to_tokens(ids))

    def load_image_processor(self, min_pixels: int | None, max_pixels: int | None) -> None:
        from transformers import AutoImageProcessor

        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        given = {name: value for name, value in bounds.items() if value is not None}
        self.image_processor = AutoImageProcessor.from_pretrained(self.path, **self.hub, **given)
        least, most = self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]
        if least < 1 or least > most:
            raise ProcessorError(
                f"{self.path} cannot resize images to at least min_pixels={least} and at most "
                f"max_pixels={most} (given here: {given}).  Set both so that 1 <= min_pixels <= max_pixels."
            )

    def process_images(self, images: list[Image]) -> tuple[dict[str, Tensor], list[str]]:
        tensors = self.image_processor(images=images, return_tensors="pt")
        counts = tensors["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2
        return dict(tensors), [self.image_token * count for count in counts.tolist()]

    def expected_image_tokens(self, height: int, width: int) -> int:
        try:
            patches = self.image_processor.get_number_of_image_patches(height, width)
        except ValueError as error:
            raise ProcessorError(f"An image of {width} x {height} pixels has no tokens: {error}") from error
        return patches // self.image_processor.merge_size**2

    def make_token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (input_ids == self.image_token_id).long()}

    def write_image_files(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        write_json(folder / _VIDEO_FILE, self._video_settings())

    def _video_settings(self) -> dict[str, Any]:
        """The model's own video settings; without them AutoProcessor and servers refuse the saved folder."""
        from transformers.utils.hub import cached_file

        nested = self.read_processor_files().get("video_processor")
        if nested:
            return nested
        try:
            file = cached_file(self.path, _VIDEO_FILE, **self.hub)
        except OSError:  # older folders have none: the family's defaults with the image processor's geometry
            names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
            geometry = {name: getattr(self.image_processor, name) for name in names}
            kind = self.video_processor_types.get(self.model_type, "Qwen2VLVideoProcessor")
            return {"video_processor_type": kind, **geometry}
        return json.loads(Path(str(file)).read_text(encoding="utf-8"))
