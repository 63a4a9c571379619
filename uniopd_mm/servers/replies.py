"""What every reply is checked for, whoever asked: fields, prompt ids, where the images lie, log-probabilities.

:class:`ReplyError` at the first thing that is not as asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from uniopd_mm.servers.errors import ReplyError

if TYPE_CHECKING:
    from torch import Tensor

_VLLM_MINUS_INFINITY = -9999.0
_ROUNDING = 1e-3  # nats; a log-probability this far above 0 is still the rounding of a sum of exponentials


class Prompted(Protocol):
    """A request with a prompt: of scoring or of sampling."""

    @property
    def collapsed_ids(self) -> list[int]: ...
    @property
    def expanded_ids(self) -> list[int]: ...
    @property
    def images(self) -> tuple[str, ...]: ...


def field(reply: object, name: str, kind: type) -> Any:
    """``reply[name]`` if it is a ``kind``; else ReplyError with the server's own error message if there is one."""
    if not isinstance(reply, Mapping):
        raise ReplyError(f"expected a JSON object with '{name}', got {type(reply).__name__}")
    value = reply.get(name)
    if isinstance(value, kind):
        return value
    error = reply.get("error")
    if error:
        message = error.get("message", error) if isinstance(error, Mapping) else error
        raise ReplyError(f"the server says: {str(message)[:200]}")
    raise ReplyError(f"'{name}' is {'null or missing' if value is None else 'a ' + type(value).__name__}")


def token_id(token: object) -> int | None:
    """17 of ``token_id:17``; None of a token that is given as text."""
    prefix, _, digits = token.partition(":") if isinstance(token, str) else ("", "", "")
    return int(digits) if prefix == "token_id" and digits.isdecimal() else None


def check_ids(ids: object, prompt: list[int], response: Sequence[int] = ()) -> None:
    """ReplyError unless ``ids`` are exactly the expanded prompt and the response."""
    sent = [*prompt, *response]
    if ids == sent:
        return
    if not isinstance(ids, Sequence):
        raise ReplyError(f"prompt_token_ids is a {type(ids).__name__}")
    n_prompt = len(prompt)
    at = next((i for i, pair in enumerate(zip(sent, ids, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        raise ReplyError(f"the server has {len(ids)} ids, expected {len(sent)}")
    lengths = "" if len(ids) == len(sent) else f"; the server has {len(ids)} ids, expected {len(sent)}"
    part, t = ("prompt", at) if at < n_prompt else ("response", at - n_prompt)
    raise ReplyError(f"{part} ids differ at {t}: sent {sent[at]}, got {ids[at]}{lengths}")


def check_placeholders(reply: Mapping[str, Any], asked: Prompted) -> None:
    """ReplyError unless each image stands where its marker stood (vLLM's ``mm_placeholders``)."""
    said = reply.get("mm_placeholders")
    if said is None:
        # Without them, only an expansion that changed the prompt's length proves that the images were seen.
        unproved = reply.get("prompt_token_ids") is not None or len(asked.expanded_ids) == len(
            asked.collapsed_ids
        )
        if asked.images and unproved:
            raise ReplyError(f"'mm_placeholders' is null for {len(asked.images)} images: were they ignored?")
        return
    spans = _image_spans(said)
    if len(spans) != len(asked.images):
        raise ReplyError(f"the server placed {len(spans)} images, expected {len(asked.images)}")
    text, end = [], 0
    for start, length in spans:
        if start < end or length < 1:
            raise ReplyError(f"image at {start} with {length} tokens, after one that ends at {end}")
        text += asked.expanded_ids[end:start]
        end = start + length
    if end > len(asked.expanded_ids):
        raise ReplyError(f"an image ends at {end}, the prompt at {len(asked.expanded_ids)}")
    text += asked.expanded_ids[end:]
    n_text = len(asked.collapsed_ids) - len(asked.images)
    stray = next((i for i in _placeholder_ids(asked, spans) if i in text), None)
    if stray is not None:
        raise ReplyError(f"placeholders {stray} outside the images at (offset, length) {spans[:4]}")
    # Some tokenizers merge the newlines on either side of an image with those of the text.
    if not n_text - 2 * len(spans) <= len(text) <= n_text:
        raise ReplyError(
            f"images at (offset, length) {spans[:4]} leave {len(text)} text tokens, expected {n_text}"
        )


def _placeholder_ids(asked: Prompted, spans: list[tuple[int, int]]) -> set[int]:
    """The id that fills most of each span: its features; the rest are row ends and the like."""
    fillings = (Counter(asked.expanded_ids[start : start + length]) for start, length in spans)
    return {filling.most_common(1)[0][0] for filling in fillings}


def _image_spans(said: object) -> list[tuple[int, int]]:
    """(offset, length) of all placeholders; ReplyError for anything but images."""
    if not isinstance(said, Mapping) or not set(said) <= {"image"}:
        raise ReplyError("'mm_placeholders' tells of something else than images")
    spans = said.get("image", [])
    if not isinstance(spans, list):
        raise ReplyError(f"'mm_placeholders' holds a {type(spans).__name__}, expected a list")
    pairs = [(field(span, "offset", int), field(span, "length", int)) for span in spans]
    return sorted(pairs)


def checked_logprobs(values: list[Any]) -> Tensor:
    """The values [U] float32; ReplyError at the first that is no log-probability."""
    import torch

    for t, value in enumerate(values):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ReplyError(f"value {t} is {'null' if value is None else 'a ' + type(value).__name__}")
        if not _VLLM_MINUS_INFINITY < value <= _ROUNDING:  # false of nan as well
            raise ReplyError(f"value {t} is {value}, not a finite log-probability")
    return torch.tensor(values, dtype=torch.float32)
