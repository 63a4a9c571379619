"""Text-only causal language models with a chat template (Qwen3, Llama, ...)."""

from __future__ import annotations

from uniopd_mm.processors.base import VLMProcessor
from uniopd_mm.processors.errors import ProcessorError


class TextAdapter(VLMProcessor):
    """No images; vision tokens that its vocabulary inherited from a multimodal family are known all the
    same."""

    sees_images = False

    @property
    def image_slot(self) -> str:
        return ""

    def load_image_processor(self, min_pixels: int | None, max_pixels: int | None) -> None:
        if min_pixels is not None or max_pixels is not None:
            raise ProcessorError(
                f"{self.path} ({self.model_type}) is text-only; leave out min_pixels and max_pixels."
            )

    def expected_image_tokens(self, height: int, width: int) -> int:
        raise ProcessorError(f"{self.path} ({self.model_type}) is text-only: an image has no tokens in it.")

    def _adds_special_tokens(self, rendered: str) -> bool:
        """Hugging Face's rule for tokenizers: the template writes all special tokens itself."""
        return False
