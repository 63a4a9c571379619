"""Replies of vLLM 0.33: ``/inference/v1/generate``, ``/v1/completions``, ``/v1/models``; with VLLM_SERVER_DEV_MODE=1
also the orders to load weights and to forget caches."""

from __future__ import annotations

import base64
import math
import struct
import time
import uuid
from array import array
from collections.abc import Callable
from typing import Any

from uniopd_mm.testing.faults import scale_out_disabled
from uniopd_mm.testing.scoring import Disturb, Images, Refusal, Scored, Teacher, open_image

JSON = dict[str, Any]


def models(teacher: Teacher) -> JSON:
    entry = {"id": teacher.model, "object": "model", "created": int(time.time()), "owned_by": "vllm"}
    entry |= {"root": teacher.model, "parent": None, "max_model_len": teacher.max_model_len, "permission": []}
    return {"object": "list", "data": [entry]}


def order(
    teacher: Teacher, path: str, payload: JSON, on_load: Callable[[str, str | None], None]
) -> JSON | None:
    """The reply to an order of the development mode, None = an empty body; Refusal for any other path."""
    if path == "/collective_rpc":
        if payload.get("method") != "reload_weights":
            raise Refusal(400, {"detail": f"unknown method {payload.get('method')!r}"})
        folder = payload["kwargs"]["weights_path"]
        on_load(folder, None)
        teacher.weights.folder = folder
        return {"results": [None]}
    if path == "/reset_prefix_cache":
        return {"success": True}
    if path in ("/reset_mm_cache", "/reset_encoder_cache"):
        return None
    if path == "/update_weight_version":
        teacher.weights.version = payload["new_version"]
        return {"success": True, "new_version": teacher.weights.version}
    raise Refusal(404, {"detail": "Not Found"})


# ---- /inference/v1/generate --------------------------------------------------------------------------------------


def generate(teacher: Teacher, payload: JSON, disturb: Disturb, scale_out: bool) -> JSON:
    """The reply, its sparse scores still a matrix."""
    if not scale_out:
        raise scale_out_disabled()
    _check_model(teacher, payload)
    params = payload.get("sampling_params") or {}
    ids = payload.get("token_ids")
    if ids is None or not _is_ids(ids):
        raise Refusal.openai(400, "token_ids: Input should be a valid list", "token_ids")
    _check_caps(teacher, params)
    images, spans = _media(payload)
    whole = teacher.read(ids, images)
    scored = disturb(whole)
    asked = params.get("prompt_logprob_token_ids") is not None
    sparse = _sparse(teacher, scored, params) if asked else None
    room = teacher.max_model_len - len(scored.ids)
    count = room if params.get("max_tokens") is None else min(room, int(params["max_tokens"]))
    _check_greedy(params)
    answers = teacher.generate(whole, params, count)
    told = bool(payload.get("return_token_ids"))
    return {
        "request_id": f"generate-tokens-{payload.get('request_id') or uuid.uuid4().hex[:16]}",
        "model": teacher.model,
        "created": int(time.time()),
        "usage": _usage(len(scored.ids), sum(len(tokens) for tokens, _ in answers)),
        "prompt_logprobs": _entries(scored, params.get("prompt_logprobs")),
        "prompt_token_id_logprobs": sparse,
        "prompt_token_ids": scored.ids if told else None,
        "mm_placeholders": _placeholders(spans or scored.spans) if told else None,
        "metrics": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "output_mode": "tokens",
        "choices": [_token_choice(teacher, i, answer, count, params) for i, answer in enumerate(answers)],
    }


def encode_sparse(reply: JSON) -> None:
    """Write the matrix of sparse scores as vLLM does: a .npy file in base64."""
    rows = reply.get("prompt_token_id_logprobs")
    if isinstance(rows, list):
        reply["prompt_token_id_logprobs"] = base64.b64encode(_npy(rows)).decode()


def _npy(rows: list[list[float]]) -> bytes:
    width = len(rows[0]) if rows else 0
    values = array("f", [value for row in rows for value in row])
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({len(rows)}, {width}), }}"
    header = header.ljust(64 * math.ceil((len(header) + 11) / 64) - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + values.tobytes()


def _media(payload: JSON) -> tuple[Images, list[tuple[int, int]]]:
    """Images to expand, or the spans of ``features``, whose ids are expanded already.  Unknown parts are skipped."""
    parts, features = payload.get("content_parts"), payload.get("features")
    if parts and features:
        raise Refusal.openai(400, "content_parts and features are mutually exclusive.")
    if features:
        spans = features["mm_placeholders"].get("image", [])
        return [], [(span["offset"], span["length"]) for span in spans]
    images: Images = []
    for part in parts or ():
        if part.get("type") != "image_url":
            continue
        if part.get("url") is None:  # {"image_url": {"url": ...}} is what chat takes, not this endpoint
            at = len(images)
            what = "is missing" if part.get("uuid") is None else "is not in the cache"
            raise Refusal.openai(
                400, f"multi_modal_data['image'][{at}] is empty but multi_modal_uuids['image'][{at}] {what}."
            )
        images.append(_open(part["url"]))
    return images, []


def _open(url: str) -> Any:
    try:
        return open_image(url)
    except ValueError as error:
        raise Refusal.openai(400, str(error)) from error


def _placeholders(spans: list[tuple[int, int]]) -> JSON | None:
    return {"image": [{"offset": offset, "length": length} for offset, length in spans]} if spans else None


def _sparse(teacher: Teacher, scored: Scored, params: JSON) -> list[list[float]]:
    """[rows][n] log p; row i scores its ids as predictions of token start + i + 1."""
    table, start = params["prompt_logprob_token_ids"], int(params.get("prompt_logprob_start") or 0)
    rows = len(scored.ids) - 1 - start
    name = "prompt_logprob_token_ids"
    if len(table) != rows:
        text = f"{name} must have {rows} rows (prompt length - 1 - prompt_logprob_start), got {len(table)}."
        raise Refusal.openai(400, f"{text} (parameter={name})", name)
    width = max(map(len, table), default=0)
    if 0 <= teacher.max_logprobs < width:
        raise _over_cap(teacher, "prompt", width, name)
    padded = [[*row, *[-1] * (width - len(row))] for row in table]
    return [scored.of(start + i + 1, row) for i, row in enumerate(padded)]


def _token_choice(
    teacher: Teacher, index: int, answer: tuple[list[int], list[float]], count: int, params: JSON
) -> JSON:
    tokens, values = answer
    content = [
        {"token_id": token, "logprob": _number(value), "rank": 1, "top_logprobs": [_top(token, value)]}
        for token, value in zip(tokens, values, strict=True)
    ]
    return {
        "index": index,
        "finish_reason": finish_reason(tokens, count, params),
        "stop_reason": None,
        "token_ids": list(tokens),
        "routed_experts": None,
        "sampling_mask": None,
        "weight_versions": [{"version": teacher.weights.version, "start": 0, "end": len(tokens)}],
        "logprobs": None if params.get("logprobs") is None else {"content": content},
    }


def _top(token: int, value: float) -> JSON:
    return {"token_id": token, "logprob": _number(value), "rank": 1}


# ---- /v1/completions ---------------------------------------------------------------------------------------------


def completions(teacher: Teacher, payload: JSON, disturb: Disturb) -> JSON:
    """One choice per prompt and answer; those of prompt i have the indices from i * n on."""
    _check_model(teacher, payload)
    _check_caps(teacher, payload)
    _check_greedy(payload)
    prompts = _prompts(teacher, payload.get("prompt"))
    n = int(payload.get("n") or 1)
    choices, prompt_tokens, output_tokens = [], 0, 0
    for row, ids in enumerate(prompts):
        whole = teacher.read(ids, [])
        scored = disturb(whole)
        asked = payload.get("max_tokens", 16)
        count = min(int(asked), teacher.max_model_len - len(ids))
        answers = teacher.generate(whole, payload, count)
        choices += [
            _text_choice(row * n + i, scored, answer, count, payload) for i, answer in enumerate(answers)
        ]
        prompt_tokens += len(scored.ids)
        output_tokens += sum(max(1, len(tokens)) for tokens, _ in answers)  # vLLM counts one for max_tokens=0
    return {
        "id": f"cmpl-{uuid.uuid4().hex[:16]}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": teacher.model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": "vllm-0.33.0-stub",
        "usage": _usage(prompt_tokens, output_tokens),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _prompts(teacher: Teacher, prompt: Any) -> list[list[int]]:
    """One text or id list, or a list of either."""
    if _is_ids(prompt) or isinstance(prompt, str):
        prompt = [prompt]
    rows = [teacher.encode(one) if isinstance(one, str) else one for one in prompt or ()]
    if not rows or not all(_is_ids(row) for row in rows):
        raise Refusal.openai(400, "Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    return rows


def _text_choice(
    index: int, scored: Scored, answer: tuple[list[int], list[float]], count: int, payload: JSON
) -> JSON:
    tokens, _ = answer
    echo, k = bool(payload.get("echo")), payload.get("logprobs")
    shown = [*scored.ids, *tokens] if echo else tokens
    logprobs = None
    if k is not None:
        logprobs = _openai_logprobs(scored, answer, payload)
    prompt_k = payload.get("prompt_logprobs")
    told = bool(payload.get("return_token_ids"))
    return {
        "index": index,
        "text": scored.teacher.decode(shown),
        "logprobs": logprobs,
        "finish_reason": finish_reason(tokens, count, payload),
        "stop_reason": None,
        "token_ids": list(tokens) if told else None,
        "prompt_logprobs": _entries(scored, k if echo and prompt_k is None else prompt_k),
        "prompt_token_ids": scored.ids if told else None,
        "routed_experts": None,
    }


def _openai_logprobs(scored: Scored, answer: tuple[list[int], list[float]], payload: JSON) -> JSON:
    """Lists over the shown tokens: of the prompt as well with ``echo``, its first value null."""
    decode, k = scored.teacher.decode, int(payload["logprobs"])
    by_id = bool(payload.get("return_tokens_as_token_ids"))

    def name(token: int) -> str:
        return f"token_id:{token}" if by_id else decode([token])

    rows: list[tuple[int, float | None, list[tuple[int, float]]]] = []
    if payload.get("echo"):
        for at, (token, value) in enumerate(zip(scored.ids, scored.logprobs, strict=True)):
            rows.append((token, value, scored.top(at, k) if k and at else []))
    rows += [(token, value, []) for token, value in zip(*answer, strict=True)]
    names, offsets, position = [name(token) for token, _, _ in rows], [], 0
    for text in names:
        offsets.append(position)
        position += len(text)
    is_first = [bool(payload.get("echo")) and at == 0 for at in range(len(rows))]
    return {
        "text_offset": offsets,
        "token_logprobs": [_number(value) for _, value, _ in rows],
        "tokens": names,
        # keyed by text, ids that decode alike overwrite each other, as they do in vLLM
        "top_logprobs": [
            None if first else {name(token): _number(value), **{name(t): _number(v) for t, v in top}}
            for first, (token, value, top) in zip(is_first, rows, strict=True)
        ],
    }


# ---- common parts ------------------------------------------------------------------------------------------------


def _entries(scored: Scored, k: int | None) -> list[JSON | None] | None:
    """``prompt_logprobs``: the actual id of each position first, then the k likeliest that it is not among."""
    if k is None:
        return None
    k = (scored.teacher.vocab_size or 0) if k == -1 else k
    return [None, *(_entry(scored, at, k) for at in range(1, len(scored.ids)))]


def _entry(scored: Scored, at: int, k: int) -> JSON:
    token, value = scored.ids[at], scored.logprobs[at]
    top = scored.top(at, k) if k else []
    ranks = {other: rank for rank, (other, _) in enumerate(top, 1)}
    # Without the whole vocabulary the rank is not known; the worst one tempts nobody to look entries up by rank.
    rank = ranks.get(token, scored.teacher.vocab_size or len(ranks) + 2)
    values = {token: (value, rank), **{other: (v, ranks[other]) for other, v in top if other != token}}
    decode = scored.teacher.decode
    return {
        str(other): {"logprob": _number(v), "rank": r, "decoded_token": decode([other])}
        for other, (v, r) in values.items()
    }


def finish_reason(tokens: list[int], count: int, params: JSON) -> str:
    """vLLM looks at stop tokens first, then at the length."""
    stopped = bool(tokens) and tokens[-1] in (params.get("stop_token_ids") or ())
    return "length" if len(tokens) >= count and not stopped else "stop"


def _check_greedy(params: JSON) -> None:
    n = int(params.get("n") or 1)
    if params.get("temperature") == 0 and n > 1:
        raise Refusal.openai(400, f"n must be 1 when using greedy sampling, got {n}.")


def _number(value: float | None) -> float | None:
    return -9999.0 if value == -math.inf else value


def _usage(prompt_tokens: int, output_tokens: int) -> JSON:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "completion_tokens": output_tokens,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def _check_model(teacher: Teacher, payload: JSON) -> None:
    asked = payload.get("model")
    if asked is not None and asked != teacher.model:
        raise Refusal.openai(404, f"The model `{asked}` does not exist.", "model")


def _check_caps(teacher: Teacher, params: JSON) -> None:
    for name, what in (("prompt_logprobs", "prompt"), ("logprobs", "sample")):
        k = params.get(name)
        if k is None:
            continue
        k = teacher.vocab_size or 1 << 17 if k == -1 else int(k)
        if 0 <= teacher.max_logprobs < k:
            raise _over_cap(teacher, what, k, name)


def _over_cap(teacher: Teacher, what: str, k: int, name: str) -> Refusal:
    text = f"Requested {what} logprobs of {k}, which is greater than max allowed: {teacher.max_logprobs}"
    return Refusal.openai(400, f"{text} (parameter={name}, value={k})", name)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
