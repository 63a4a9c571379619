"""Qwen-VL, from Qwen2-VL on: an image keeps its shape, resized to a number of pixels between two bounds.

The family's own AutoProcessor also builds a video processor, which exists only beside torchvision.  Images
need the image processor alone, so this adapter works with and without torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from uniopd_mm.processors.base import VLMProcessor
from uniopd_mm.processors.errors import ProcessorError
from uniopd_mm.processors.images import to_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_SINCE_QWEN_3 = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp")
"""Model types that share one processor."""


class QwenVLAdapter(VLMProcessor):
    """``pixel_values`` [patches of all images, values], ``image_grid_thw`` [images, 3] in patches and
    ``mm_token_type_ids`` [P], 1 at image placeholders; the last one also for prompts without images.

    ``min_pixels`` and ``max_pixels`` bound height x width after resizing; one placeholder is
    ``(patch_size * merge_size) ** 2`` pixels.
    """

    token_inputs = ("mm_token_type_ids",)
    processor_classes: ClassVar = {
        "qwen2_vl": "Qwen2VLProcessor",
        "qwen2_5_vl": "Qwen2_5_VLProcessor",
        **dict.fromkeys(_SINCE_QWEN_3, "Qwen3VLProcessor"),
    }
    video_processor_types: ClassVar = {
        "qwen2_vl": "Qwen2VLVideoProcessor",
        "qwen2_5_vl": "Qwen2VLVideoProcessor",
        **dict.fromkeys(_SINCE_QWEN_3, "Qwen3VLVideoProcessor"),
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

    def resize_image(self, image: Image) -> Image | None:
        """Whole placeholders between the bounds.  Narrow bounds do not settle every shape: a long strip may be resized
        to more than ``max_pixels``, and its result once more."""
        processor = self.image_processor
        if not processor.do_resize:
            return None
        side = processor.patch_size * processor.merge_size
        pixels = processor.process_image(image)
        return to_picture(processor.resize(pixels, processor.size, processor.resample, factor=side))

    def position_ids(self, batch: Mapping[str, Tensor]) -> Tensor:
        """M-RoPE positions [3, B, P], see :func:`mrope_positions`."""
        return mrope_positions(
            batch["input_ids"],
            batch["attention_mask"],
            batch.get("image_grid_thw"),
            image_token_id=self.config.image_token_id,
            merge_size=self.image_processor.merge_size,
        )

    def write_image_files(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        kind = self.video_processor_types.get(self.model_type, "Qwen2VLVideoProcessor")
        geometry = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
        self.write_video_settings(folder, kind, geometry)


def mrope_positions(
    input_ids_BP: Tensor,
    attention_mask_BP: Tensor,
    image_grid_thw: Tensor | None,
    *,
    image_token_id: int,
    merge_size: int,
) -> Tensor:
    """Positions [3, B, P] int64: time, height and width, counted from the first real token, 0 at padding.

    A text token moves all three on by one.  An image's placeholders lie in a box whose near corner is the
    position behind the text before it; the text behind it goes on past the longer side of the box.
    ``image_grid_thw`` [images, 3] is in patches, all rows' images in order; None where there is none.
    """
    import torch

    real_BP = attention_mask_BP.bool()
    is_image_BP = real_BP & (input_ids_BP == image_token_id)
    grids = input_ids_BP.new_zeros(0, 3) if image_grid_thw is None else image_grid_thw
    boxes = grids // grids.new_tensor([1, merge_size, merge_size])  # [images, 3], in placeholders
    counts = boxes.prod(-1)
    n_found, n_expected = int(is_image_BP.sum()), int(counts.sum())
    if n_found != n_expected:
        raise ProcessorError(
            f"The batch has {n_found} image placeholders, but its image_grid_thw makes {n_expected} of "
            f"{len(grids)} images.  Pass ids and image_grid_thw of the same prompts, in the same order."
        )
    # Of every placeholder, in reading order: its image's box and its place among the box's placeholders.
    box = boxes.repeat_interleave(counts, dim=0)
    _, height, width = box.unbind(-1)
    place = torch.arange(n_found, device=box.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    inside = torch.stack([place // (height * width), place // width % height, place % width])
    is_last = place == box.prod(-1) - 1

    steps_BP = real_BP.long()
    steps_BP[is_image_BP] = torch.where(is_last, torch.maximum(height, width), 0)
    positions = (steps_BP.cumsum(-1) - steps_BP).expand(3, -1, -1).clone()
    positions[:, is_image_BP] += inside
    return positions * real_BP
