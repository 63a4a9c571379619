"""Stub servers with a small model of their own, and the requests of a good client."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from uniopd_mm.testing import Faults, StubServer

RECORDED = Path(__file__).parent / "fixtures" / "vllm_http"
VOCABULARY = 512
MARKER, IMAGE_TOKENS = 300, 3
PROMPT = [10, 20, MARKER, 30]
RESPONSE = [40, 41, 42]
COLLAPSED = [*PROMPT, *RESPONSE]
EXPANDED = [10, 20, *[MARKER] * IMAGE_TOKENS, 30, *RESPONSE]
TEXT = [10, 20, 30, *RESPONSE]
GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"


def score(ids: list[int], images: list[Image.Image]) -> list[float]:
    """Depends on the token, the one before it, the position and the first pixel: a wrong index or picture shows."""
    light = sum(image.getpixel((0, 0))[0] for image in images) / 1000
    return [-0.01 - ((7 * b + 3 * a + at) % 97) / 20 - light for at, (a, b) in enumerate(pairwise(ids))]


def expand(ids: list[int], n_images: int) -> list[int]:
    assert ids.count(MARKER) >= n_images
    return [token for one in ids for token in [one] * (IMAGE_TOKENS if one == MARKER else 1)]


def picture(light: int = 100, wrap: bool = True) -> str:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (light, 0, 0)).save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/png;base64,{data}" if wrap else data


def opened(light: int = 100) -> Image.Image:
    return Image.new("RGB", (1, 1), (light, 0, 0))


def post(server: StubServer, path: str, payload: Any, timeout: float = 10, **headers: str) -> tuple[int, Any]:
    asked = urllib.request.Request(server.url + path, json.dumps(payload).encode(), headers)
    try:
        with urllib.request.urlopen(asked, timeout=timeout) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def get(server: StubServer, path: str) -> bytes:
    with urllib.request.urlopen(server.url + path, timeout=10) as reply:
        return reply.read()


def stub(kind: str, fault: str | None = None, **options: Any) -> StubServer:
    faults = Faults(schedule={0: fault}, hang_s=0.3) if fault else None
    options = {"expand": expand, "vocab_size": VOCABULARY, "marker": MARKER} | options
    return StubServer(kind, score, faults=faults, **options)


def asked_of(kind: str, ids: Any = COLLAPSED, images: int = 1, **params: Any) -> tuple[str, dict[str, Any]]:
    """The request of a good client, as the kind of server wants it."""
    if kind == "vllm":
        parts = [{"type": "image_url", "url": picture(), "uuid": str(i)} for i in range(images)]
        body = {"token_ids": ids, "return_token_ids": True}
        body |= {"sampling_params": {"max_tokens": 1, "prompt_logprobs": 0} | params}
        return GENERATE, body | ({"content_parts": parts} if images else {})
    if kind == "sglang":
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
        body |= {"logprob_start_len": 0, "return_prompt_token_ids": True} | params
        return "/generate", body | ({"image_data": [picture() for _ in range(images)]} if images else {})
    body = {"prompt": ids, "max_tokens": 1, "return_token_ids": True, "return_tokens_as_token_ids": True}
    body |= {"prompt_logprobs": 0} if kind == "vllm_text" else {"echo": True, "logprobs": 0, "max_tokens": 0}
    return COMPLETIONS, body | params


def request_for(kind: str, **params: Any) -> tuple[str, dict[str, Any]]:
    has_images = kind in ("vllm", "sglang")
    return asked_of(kind, COLLAPSED if has_images else TEXT, int(has_images), **params)


STOP = 7


def two_answers(first_stops: bool = True) -> Callable[..., list[tuple[list[int], list[float]]]]:
    """One of two tokens that stops, and one that is cut at three."""
    answers = [([5, STOP], [-0.1, -0.2]), ([6, 5, 6], [-0.3, -0.4, -0.5])]
    return lambda ids, images, params: answers if first_stops else answers[::-1]


def asked_for_answers(kind: str) -> tuple[str, dict[str, Any]]:
    """Two answers of at most three tokens."""
    params = {"n": 2, "stop_token_ids": [STOP], "logit_bias": {str(MARKER): -100}}
    if kind == "sglang":
        return request_for(kind, sampling_params={"max_new_tokens": 3, **params})
    return request_for(kind, max_tokens=3, logprobs=0, echo=False, **params)
