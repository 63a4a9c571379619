"""Two servers that answer 200 and cannot score: ``transformers serve`` 5.23 and llama-cpp-python 0.3.36."""

from __future__ import annotations

import time
import uuid
from typing import Any

from uniopd_mm.testing.scoring import Refusal, Teacher

JSON = dict[str, Any]

_OPENAI_FIELDS = {
    *("model", "prompt", "suffix", "generation_config", "seed", "n", "best_of", "echo", "logprobs", "user"),
    *("max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "stop"),
    *("stream", "stream_options"),
}


def transformers_serve(teacher: Teacher, payload: JSON) -> JSON:
    """Text in, text out: ``echo`` and ``logprobs`` are accepted and ignored, id prompts are refused."""
    unexpected = set(payload) - _OPENAI_FIELDS
    if unexpected:
        raise Refusal(422, {"detail": f"Unexpected fields in the request: {unexpected}"})
    prompt = payload.get("prompt", "")
    if not isinstance(prompt, str):
        raise Refusal(400, {"detail": "prompt must be a string."})
    ids, tokens = teacher.encode(prompt), [0] * int(payload.get("max_tokens") or 16)
    choice = {"finish_reason": "length", "index": 0, "text": teacher.decode(tokens)}
    return _completion(teacher, choice, len(ids), len(tokens))


def llama_cpp(teacher: Teacher, payload: JSON) -> JSON:
    """Echoed values are log p(token j | tokens up to *and with* j): late by one, and nothing in the reply says so."""
    prompt = payload.get("prompt")
    if not isinstance(prompt, str):
        text = "Input should be a valid string"
        raise Refusal(422, {"detail": [{"type": "string_type", "loc": ["body", "prompt"], "msg": text}]})
    ids, tokens = teacher.encode(prompt), [0] * int(payload.get("max_tokens", 16))
    shown = [*ids, *tokens] if payload.get("echo") else tokens
    logprobs = None
    if payload.get("logprobs") is not None:
        values = [teacher.read([*shown[: at + 1], shown[at]], []).logprobs[-1] for at in range(len(shown))]
        names = [teacher.decode([token]) for token in shown]
        tops: list[JSON | None] = [{name: value} for name, value in zip(names, values, strict=True)]
        if payload.get("echo") and shown:
            values[0], tops[0] = None, None
        offsets = [sum(map(len, names[:at])) for at in range(len(names))]
        logprobs = {"text_offset": offsets, "token_logprobs": values, "tokens": names, "top_logprobs": tops}
    choice = {"text": teacher.decode(shown), "index": 0, "logprobs": logprobs, "finish_reason": "length"}
    return _completion(teacher, choice, len(ids), len(tokens))


def _completion(teacher: Teacher, choice: JSON, prompt_tokens: int, output_tokens: int) -> JSON:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens}
    usage["total_tokens"] = prompt_tokens + output_tokens
    reply = {"id": f"cmpl-{uuid.uuid4()}", "object": "text_completion", "created": int(time.time())}
    return reply | {"model": teacher.model, "choices": [choice], "usage": usage}
