"""Does a server score what it is asked to score?  Few short requests whose answers give away one that does not.

Nothing is assumed of the model but that it is one: its values must not depend on where the prompt ends or on what
comes later, and the probabilities of different next tokens must not exceed 1 together.  Log-probabilities in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uniopd_mm.errors import ConfigError
from uniopd_mm.servers import ScoreRequest, png_uri

if TYPE_CHECKING:
    from PIL.Image import Image

    from uniopd_mm.processors import EncodedPrompt, VLMProcessor

Ask = Callable[[list[ScoreRequest]], list[Tensor | str]]
"""One answer per request: [U] log-probabilities, or the reason why there are none."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Nats by which a value may differ between two requests; the last bit of a bfloat16 logit of 32 is 0.25."""
_WORDS = (
    "red green blue one two three water light small round open day house tree line point sum last left more"
)
_N_DOUBLED, _N_ENDS = 8, 8
_IMAGE_SIZES = ((64, 48), (1280, 960))
"""Width and height, pixels: below and above the usual bounds of processors that resize freely."""


def probe_text(ask: Ask, processor: VLMProcessor, dtype: str) -> str:
    """Score a known text with several endings, and once with the prompt ending elsewhere; ConfigError if the values
    cannot be log-probabilities of these tokens.  Returns what was found, for people."""
    head = processor.encode([{"role": "user", "content": "Continue: red red blue blue"}]).input_ids.tolist()
    words = probe_tokens(processor)
    # Doubled words: a model that copies gives a word right behind itself a high probability.  Servers that are late
    # by one and look a token up behind itself then say that every ending is likely.
    body = [token for word in words[:_N_DOUBLED] for token in (word, word)]
    ends = words[_N_DOUBLED:]
    whole = [ScoreRequest(head, head, [*body, end]) for end in ends]
    cut = len(body) // 2
    prompt = head + body[:cut]
    values = _require_values(ask([*whole, ScoreRequest(prompt, prompt, [*body[cut:], ends[0]])]))
    whole_KU, parts_U = torch.stack(values[:-1]).double(), values[-1].double()
    between = float((whole_KU[0, cut:] - parts_U).abs().max())
    earlier = float((whole_KU[:, :-1].amax(0) - whole_KU[:, :-1].amin(0)).max())
    last_K = whole_KU[:, -1]
    total = float(last_K.exp().sum())
    limit = TOLERANCE[dtype]
    if between > limit:
        raise ConfigError(
            f"the same text scored with the prompt ending in another place differs by {between:.3g} nats (limit {limit})"
        )
    if earlier > limit:
        raise ConfigError(
            f"values change by {earlier:.3g} nats (limit {limit}) with a token that comes after them: they are early by one"
        )
    if float(last_K.max() - last_K.min()) <= max(2 * earlier, 1e-6):
        raise ConfigError(
            f"{len(ends)} different last tokens all have the same value: values are late by one"
        )
    if total > 1.05:
        raise ConfigError(
            f"the probabilities of {len(ends)} different next tokens sum to {total:.2f}, more than 1: each token is "
            "scored behind itself, late by one"
        )
    return f"a known text in two splits agrees within {max(between, earlier):.1e} nats"


def fingerprint(ask: Ask, processor: VLMProcessor) -> list[float]:
    """Log-probabilities of a known text: other weights behind the same name have others."""
    head = processor.encode([{"role": "user", "content": "Continue:"}]).input_ids.tolist()
    (values,) = _require_values(ask([ScoreRequest(head, head, probe_tokens(processor))]))
    return values.tolist()


def probe_images(ask: Ask, processor: VLMProcessor) -> str:
    """Score after a picture and after a blank one, small and large; ConfigError unless the server expands both as
    ``processor`` does and the picture makes a difference.  Returns what was found, for people."""
    response = probe_tokens(processor)[:4]
    counts = []
    for size in _IMAGE_SIZES:
        pictures = [_gradient(size), _blank(size)]
        encoded = [_encode(processor, picture) for picture in pictures]
        asked = [
            ScoreRequest(e.collapsed_ids.tolist(), e.input_ids.tolist(), response, (png_uri(picture),))
            for e, picture in zip(encoded, pictures, strict=True)
        ]
        where = f"after an image of {size[0]} x {size[1]} pixels"
        seen, blank = _require_values(ask(asked), where)
        if torch.equal(seen, blank):
            raise ConfigError(
                f"{where}, a picture and a blank give the same values: the server does not look at it"
            )
        start, end = encoded[0].image_spans[0]
        counts.append(end - start)
    return f"images of {' and '.join(map(str, counts))} tokens expand alike"


def probe_tokens(processor: VLMProcessor) -> list[int]:
    """Different tokens of ordinary words, in any vocabulary."""
    ids = processor.tokenizer.encode(_WORDS, add_special_tokens=False)
    hidden = processor.vision_token_ids() | set(processor.tokenizer.all_special_ids)
    words = [token for token in dict.fromkeys(ids) if token not in hidden]
    if len(words) < _N_DOUBLED + _N_ENDS:
        raise ConfigError(
            f"the tokenizer of {processor.path} makes {len(words)} different tokens of {len(_WORDS.split())} words, "
            f"expected {_N_DOUBLED + _N_ENDS}: does it belong to the model?"
        )
    return words[: _N_DOUBLED + _N_ENDS]


def _require_values(answers: list[Tensor | str], where: str = "for a known text") -> list[Tensor]:
    values = []
    for answer in answers:
        if isinstance(answer, str):
            raise ConfigError(f"{where}, no usable answer: {answer}")
        values.append(answer)
    return values


def _encode(processor: VLMProcessor, picture: Image) -> EncodedPrompt:
    content = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    return processor.encode([{"role": "user", "content": content}], [picture])


def _gradient(size: tuple[int, int]) -> Image:
    from PIL import Image

    ramp = Image.linear_gradient("L")
    return Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180))).resize(size)


def _blank(size: tuple[int, int]) -> Image:
    from PIL import Image

    return Image.new("RGB", size, "white")
