"""LLaVA-NeXT (1.6): the whole image as one tile, then the image again as a grid of tiles that fits its shape.

The grid is the entry of ``image_grid_pinpoints`` (heights and widths in pixels) that keeps the most of the image.
What the image does not fill of it is cut away after the vision tower, so the number of placeholders follows from
the size of the image alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from uniopd_mm.processors.base import VLMProcessor
from uniopd_mm.processors.errors import ProcessorError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class LlavaNextAdapter(VLMProcessor):
    """``pixel_values`` [images, tiles, 3, H, W], padded with zeros to the most tiles, and ``image_sizes``
    [images, 2]: height and width in pixels as given.

    ``min_pixels`` and ``max_pixels`` are errors: the model finds the tiles of an image in the
    ``image_grid_pinpoints`` of its own config, and a processor that drops some of them would disagree with it.
    """

    processor_classes: ClassVar = {"llava_next": "LlavaNextProcessor"}

    @property
    def image_slot(self) -> str:
        return f"{self.image_token}\n"

    def load_image_processor(self, min_pixels: int | None, max_pixels: int | None) -> None:
        from transformers import AutoImageProcessor

        if min_pixels is not None or max_pixels is not None:
            raise ProcessorError(
                f"min_pixels and max_pixels cannot be set for {self.model_type}: the model itself arranges an "
                "image's tiles by the image_grid_pinpoints of its config.json, and would not follow.  Leave them "
                "out; for other resolutions write the same image_grid_pinpoints into config.json and "
                f"preprocessor_config.json of {self.path}."
            )
        self.image_processor = AutoImageProcessor.from_pretrained(self.path, **self.hub)
        self._check_pinpoints()
        self.fill_processor_settings(self.default_settings())

    def default_settings(self) -> dict[str, Any]:
        """For old processor files that lack these.  A CLIP tower puts one class token before the patches."""
        return {
            "patch_size": self.config.vision_config.patch_size,
            "vision_feature_select_strategy": self.config.vision_feature_select_strategy,
            "num_additional_image_tokens": int(self.config.vision_config.model_type == "clip_vision_model"),
        }

    def process_images(self, images: list[Image]) -> tuple[dict[str, Tensor], list[str]]:
        tensors = self.image_processor(images, do_pad=True, return_tensors="pt")
        counts = [self.expected_image_tokens(image.height, image.width) for image in images]
        return dict(tensors), [self.image_token * count for count in counts]

    def expected_image_tokens(self, height: int, width: int) -> int:
        rows, columns = self.tiled_features(height, width)
        return self.tile_tokens() + rows * (columns + 1)  # the model ends every row with a newline

    def join_vision(self, name: str, tensors: list[Tensor]) -> Tensor:
        if name == "pixel_values":
            from torch.nn.functional import pad

            most = max(pixels.shape[1] for pixels in tensors)
            tensors = [pad(pixels, (0, 0) * 3 + (0, most - pixels.shape[1])) for pixels in tensors]
        return super().join_vision(name, tensors)

    def write_image_files(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)

    def tile_side(self) -> int:
        """Features along one side of a tile."""
        return self.config.vision_config.image_size // self.processor_settings["patch_size"]

    def tile_tokens(self) -> int:
        """Features that the model keeps of one whole tile."""
        settings = self.processor_settings
        dropped = settings["vision_feature_select_strategy"] == "default"
        return self.tile_side() ** 2 + settings["num_additional_image_tokens"] - dropped

    def tiled_features(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of features of all tiles together, without those that only see padding.

        Rounds where the model rounds (its ``unpad_image``): a row more or less is a missing placeholder.
        """
        from transformers.image_processing_utils import select_best_resolution

        grid = select_best_resolution((height, width), self.image_processor.image_grid_pinpoints)
        rows, columns = (pixels // self.config.vision_config.image_size * self.tile_side() for pixels in grid)
        if width / height > columns / rows:
            filled = int(round(height * (columns / width), 7))
            return rows - (rows - filled) // 2 * 2, columns
        filled = int(round(width * (rows / height), 7))
        return rows, columns - (columns - filled) // 2 * 2

    def _check_pinpoints(self) -> None:
        """The order counts too: of two grids that fit equally well the first one is taken."""
        ours, models = (
            [tuple(size) for size in source.image_grid_pinpoints]
            for source in (self.image_processor, self.config)
        )
        if ours != models:
            raise ProcessorError(
                f"image_grid_pinpoints of {self.path} differ: {ours} in the image processor's file, {models} in "
                "config.json.  The model would put the tiles together in another shape than they were cut; make "
                "the two lists equal, in the same order."
            )
