"""What stub servers sample, and the weights that they are told to load."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image
from stubs import (
    EXPANDED,
    STOP,
    TEXT,
    asked_for_answers,
    asked_of,
    get,
    post,
    request_for,
    stub,
    two_answers,
)


def sample(
    ids: list[int], images: list[Image.Image], params: dict[str, Any]
) -> list[tuple[list[int], list[float]]]:
    return [([len(ids), len(images), 5 + i], [-0.1, -0.2, -0.3]) for i in range(params.get("n", 1))]


def test_n_answers_are_sampled_by_the_callable() -> None:
    with stub("vllm", sample=sample) as server:
        choices = post(server, *request_for("vllm", n=2, max_tokens=8, logprobs=0))[1]["choices"]
        path, body = asked_of("vllm_text", [TEXT, TEXT], n=2, max_tokens=3)
        texts = post(server, path, body)[1]["choices"]
    assert [choice["token_ids"] for choice in choices] == [[len(EXPANDED), 1, 5], [len(EXPANDED), 1, 6]]
    assert [one["logprob"] for one in choices[0]["logprobs"]["content"]] == [-0.1, -0.2, -0.3]
    assert choices[0]["finish_reason"] == "stop"
    assert [choice["index"] for choice in texts] == [0, 1, 2, 3] and texts[0]["finish_reason"] == "length"
    with stub("sglang", sample=sample) as server:
        replies = post(server, *request_for("sglang", sampling_params={"max_new_tokens": 8, "n": 2}))[1]
    assert [reply["output_ids"][-1] for reply in replies] == [5, 6]
    assert replies[0]["meta_info"]["output_token_logprobs"][0] == [-0.1, len(EXPANDED), None]


@pytest.mark.parametrize("kind", ["vllm", "vllm_text", "sglang"])
def test_an_answer_ends_with_a_stop_token_or_at_the_limit(kind: str) -> None:
    with stub(kind, sample=two_answers()) as server:
        reply = post(server, *asked_for_answers(kind))[1]
    if kind == "sglang":
        reasons = [one["meta_info"]["finish_reason"] for one in reply]
        assert reasons == [{"type": "stop", "matched": STOP}, {"type": "length", "length": 3}]
    else:
        assert [choice["finish_reason"] for choice in reply["choices"]] == ["stop", "length"]


def test_several_greedy_answers_are_refused_by_vllm() -> None:
    with stub("vllm") as server:
        status, reply = post(server, *request_for("vllm", n=2, temperature=0))
    assert status == 400 and "n must be 1" in reply["error"]["message"]


def test_vllm_loads_weights_in_development_mode_alone_and_names_them() -> None:
    loaded: list[tuple[str, str | None]] = []
    load = {"method": "reload_weights", "kwargs": {"weights_path": "/disk/12"}}
    with stub("vllm") as server:
        assert post(server, "/collective_rpc", load)[0] == 404
    with stub("vllm", dev_mode=True, on_load=lambda *args: loaded.append(args)) as server:
        assert post(server, "/collective_rpc", load) == (200, {"results": [None]})
        assert post(server, "/reset_prefix_cache?reset_running_requests=true", {}) == (200, {"success": True})
        for path in ("/reset_mm_cache", "/reset_encoder_cache"):
            with pytest.raises(ValueError):  # an empty body is no JSON
                post(server, path, {})
        assert json.loads(get(server, "/weight_info")) == {"weight_version": "default"}
        assert post(server, "/update_weight_version", {"new_version": "12"})[1]["success"]
        assert json.loads(get(server, "/weight_info")) == {"weight_version": "12"}
        reply = post(server, *request_for("vllm"))[1]
    assert loaded == [("/disk/12", None)]
    assert reply["choices"][0]["weight_versions"] == [{"version": "12", "start": 0, "end": 1}]


def test_sglang_loads_weights_and_names_them() -> None:
    loaded: list[tuple[str, str | None]] = []
    with stub("sglang", on_load=lambda *args: loaded.append(args)) as server:
        body = {"model_path": "/disk/12", "flush_cache": True, "weight_version": "12"}
        assert post(server, "/update_weights_from_disk", body)[1]["success"]
        assert post(server, *request_for("sglang"))[1]["meta_info"]["weight_version"] == "12"
        assert json.loads(get(server, "/model_info"))["weight_version"] == "12"
    assert loaded == [("/disk/12", "12")]


def test_without_max_tokens_the_context_is_filled() -> None:
    with stub("vllm", max_model_len=50) as server:
        reply = post(server, *request_for("vllm", max_tokens=None))[1]
    assert len(reply["choices"][0]["token_ids"]) == 50 - len(EXPANDED)
