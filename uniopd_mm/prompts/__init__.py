"""Dataset rows -> Prompt: mixtures, checks at load time, a seeded resumable order, images opened late and once.

``load_prompts`` reads and checks; ``PromptOrder`` says which prompts a step sees; ``PromptReader`` opens them.
The row forms and the mixture file are described in ``data/README.md``.
"""

from uniopd_mm.prompts.images import open_images
from uniopd_mm.prompts.load import BadRow, MixtureConfig, PromptSet, load_prompts
from uniopd_mm.prompts.order import DrawnPrompt, PromptOrder, PromptReader, replacement

__all__ = [
    "BadRow",
    "DrawnPrompt",
    "MixtureConfig",
    "PromptOrder",
    "PromptReader",
    "PromptSet",
    "load_prompts",
    "open_images",
    "replacement",
]
