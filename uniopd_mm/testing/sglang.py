"""Replies of SGLang 0.5.23: ``/generate`` for one row or a batch, ``/model_info``, ``/update_weights_from_disk``."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from typing import Any

from uniopd_mm.testing.faults import retokenise
from uniopd_mm.testing.scoring import Disturb, Images, Refusal, Scored, Teacher, open_image

JSON = dict[str, Any]


def model_info(teacher: Teacher) -> JSON:
    return {
        "model_path": teacher.model,
        "tokenizer_path": teacher.model,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": teacher.weights.version,
        "has_image_understanding": teacher.expand is not None,
        "has_audio_understanding": False,
    }


def load(teacher: Teacher, payload: JSON, on_load: Callable[[str, str | None], None]) -> JSON:
    """The reply to ``/update_weights_from_disk``."""
    weights = teacher.weights
    on_load(payload["model_path"], payload.get("weight_version"))
    weights.folder, weights.version = payload["model_path"], payload.get("weight_version") or weights.version
    return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}


def generate(teacher: Teacher, payload: JSON, disturb: Disturb) -> JSON | list[JSON]:
    """One reply, or a list of them for a batch or n > 1."""
    ids = payload.get("input_ids")
    if not isinstance(ids, list) or not ids:
        raise _refuse("Either text, input_ids or input_embeds should be provided.")
    if not isinstance(ids[0], list):
        replies = _one(teacher, payload, _images(payload.get("image_data")), disturb)
        return replies[0] if len(replies) == 1 else replies
    return [reply for row, images in _rows(payload) for reply in _one(teacher, row, images, disturb)]


def _rows(payload: JSON) -> list[tuple[JSON, Images]]:
    """A batch taken apart: every value may be a list with one element per row."""
    size = len(payload["input_ids"])
    pictures = payload.get("image_data")
    if not isinstance(pictures, list):
        pictures = [pictures] * size
    rid = payload.get("rid")
    if isinstance(rid, str):
        payload = {**payload, "rid": [f"{rid}_{i}" for i in range(size)]}
    for name, value in {**payload, "image_data": pictures}.items():
        if isinstance(value, list) and len(value) != size and name != "token_ids_logprob":
            raise _refuse(
                f"The length of {name} should be equal to the batch size: {size}, got {len(value)}."
            )
    rows = []
    for i in range(size):
        row = {name: value[i] if isinstance(value, list) else value for name, value in payload.items()}
        row["token_ids_logprob"] = payload.get("token_ids_logprob")
        rows.append((row, _images(pictures[i])))
    return rows


def _images(data: Any) -> Images:
    if data is None:
        return []
    try:
        return [open_image(one) for one in (data if isinstance(data, list) else [data])]
    except ValueError as error:
        raise _refuse(str(error)) from error


def _one(teacher: Teacher, payload: JSON, images: Images, disturb: Disturb) -> list[JSON]:
    params = payload.get("sampling_params") or {}
    count = int(params.get("max_new_tokens", 128))
    if count < 0:
        raise _refuse(f"max_new_tokens must be at least 0, got {count}.")
    whole, kept_ids = _read(teacher, payload["input_ids"], images)
    scored = disturb(whole)
    if not kept_ids:  # decoded and tokenised again: nothing promises the same ids
        scored = retokenise(scored)
    start = int(payload.get("logprob_start_len", -1))
    if start > len(scored.ids):
        raise _refuse(
            f"req.logprob_start_len={start} is higher than the number of input tokens "
            f"len(req.origin_input_ids)={len(scored.ids)}. Please use a smaller logprob_start_len."
        )
    if start < 0:
        start = len(scored.ids) - (count > 0)
    asked = {**params, "return_logprob": payload.get("return_logprob")}
    answers = teacher.generate(whole, asked, count)
    return [_reply(payload, scored, start, answer, count) for answer in answers]


def _read(teacher: Teacher, ids: list[int], images: Images) -> tuple[Scored, bool]:
    """The expanded prompt, and whether its ids are the client's: only with exactly one marker per image."""
    marker = teacher.marker
    if not images or marker is None or ids.count(marker) == len(images):
        return teacher.read(ids, images), True
    runs = [token for at, token in enumerate(ids) if token != marker or at == 0 or ids[at - 1] != marker]
    if runs.count(marker) != len(images):
        raise _refuse(f"{len(images)} images were given for {runs.count(marker)} image tokens.")
    return teacher.read(runs, images), False


def _reply(
    payload: JSON, scored: Scored, start: int, answer: tuple[list[int], list[float]], count: int
) -> JSON:
    tokens, values = answer
    size = len(scored.ids)
    kind = (
        {"type": "length", "length": len(tokens)}
        if len(tokens) >= count
        else {"type": "stop", "matched": tokens[-1] if tokens else 0}
    )
    meta: JSON = {
        "id": payload.get("rid") or uuid.uuid4().hex,
        "finish_reason": kind,
        "prompt_tokens": size,
        "completion_tokens": len(tokens),
        "cached_tokens": 0,
        "weight_version": scored.teacher.weights.version,
        "num_retractions": 0,
        "e2e_latency": time.process_time() % 1,
    }
    if payload.get("return_logprob"):
        positions = range(start, size)
        meta["input_token_logprobs"] = [
            [None if at == start else _number(scored.logprobs[at]), _clip(scored, at), None]
            for at in positions
        ]
        meta["output_token_logprobs"] = [[_number(v), t, None] for t, v in zip(tokens, values, strict=True)]
        meta["output_token_logprobs_length"] = len(tokens)
        k, ids = payload.get("top_logprobs_num") or 0, payload.get("token_ids_logprob")
        if k:
            meta["input_top_logprobs"] = [
                _pairs(scored.top(at, k)) if at > start else None for at in positions
            ]
        if ids:
            meta["input_token_ids_logprobs"] = [
                _pairs(zip(ids, scored.of(at, ids), strict=True)) if at > start else None for at in positions
            ]
    reply = {"text": scored.teacher.decode(list(tokens)), "output_ids": list(tokens), "meta_info": meta}
    if payload.get("return_prompt_token_ids"):
        reply["prompt_token_ids"] = scored.ids
    return reply


def _clip(scored: Scored, at: int) -> int:
    """Ids from the last one of the vocabulary on are written as 0, and so are those that stand for an image."""
    size = scored.teacher.vocab_size
    return 0 if scored.is_image(at) or (size is not None and scored.ids[at] >= size - 1) else scored.ids[at]


def _pairs(values: Any) -> list[list[Any]]:
    return [[_number(value), token, None] for token, value in values]


def _number(value: float | None) -> float | None:
    """-inf has no place in JSON: null.  NaN stays, for clients have to survive it."""
    return None if value == -math.inf else value


def _refuse(message: str) -> Refusal:
    return Refusal(400, {"error": {"message": message}})
