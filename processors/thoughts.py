"""Think blocks that a chat template writes at the end of a prompt."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from uniopd_mm.processors.base import EncodedPrompt, VLMProcessor

Thinking = Literal["no", "an empty", "an open"]

_TAIL_TOKENS = 64
_EMPTY_BLOCK = re.compile(r"<(think\w*|thought)>\s*</\1>\s*$")
_OPEN_BLOCK = re.compile(r"<(think\w*|thought)>\s*$")


def thinking(prompt: str) -> Thinking:
    """What kind of think block a rendered prompt ends with."""
    if _EMPTY_BLOCK.search(prompt):
        return "an empty"
    return "an open" if _OPEN_BLOCK.search(prompt) else "no"


def prompt_tail(processor: VLMProcessor, encoded: EncodedPrompt) -> str:
    """The last of a prompt, as text."""
    return "".join(processor.decode_tokens(encoded.input_ids[-_TAIL_TOKENS:]))


def opened_thought(processor: VLMProcessor, encoded: EncodedPrompt) -> str:
    """``<think>`` and what follows it where the prompt ends with an open think block, else "".

    The model's answer then begins inside the block: whoever reads the answer alone has to know.
    """
    match = _OPEN_BLOCK.search(prompt_tail(processor, encoded))
    return match[0] if match else ""
