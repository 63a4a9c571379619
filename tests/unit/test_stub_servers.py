"""The stub servers answer in the recorded shapes, score exactly what they are asked, and fail only as they are told."""

from __future__ import annotations

import base64
import doctest
import http.client
import io
import json
import math
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stubs import (
    COLLAPSED,
    COMPLETIONS,
    EXPANDED,
    GENERATE,
    IMAGE_TOKENS,
    MARKER,
    PROMPT,
    RECORDED,
    RESPONSE,
    TEXT,
    VOCABULARY,
    asked_for_answers,
    asked_of,
    expand,
    get,
    opened,
    picture,
    post,
    request_for,
    score,
    stub,
    two_answers,
)

import uniopd_mm.testing
from uniopd_mm.errors import ConfigError
from uniopd_mm.testing import FAULTS, Faults, StubServer, names
from uniopd_mm.testing.faults import EVERY


def unpack(kind: str, reply: Any) -> tuple[list[int], list[float | None]]:
    """Ids and values as a client without any check reads them."""
    if kind == "sglang":
        return reply["prompt_token_ids"], [entry[0] for entry in reply["meta_info"]["input_token_logprobs"]]
    if kind == "openai":
        logprobs = reply["choices"][0]["logprobs"]
        return [int(token.partition(":")[2]) for token in logprobs["tokens"]], logprobs["token_logprobs"]
    home = reply["choices"][0] if kind == "vllm_text" else reply
    ids = home["prompt_token_ids"]
    entries = home["prompt_logprobs"]
    return ids, [entry and entry[str(token)]["logprob"] for token, entry in zip(ids, entries, strict=True)]


def truth(kind: str) -> tuple[list[int], list[float | None]]:
    if kind in ("vllm", "sglang"):
        return EXPANDED, [None, *score(EXPANDED, [opened()])]
    return TEXT, [None, *score(TEXT, [])]


def structure(value: Any) -> Any:
    """Keys and types; dictionaries keyed by tokens or ids, and lists, by their last element."""
    if isinstance(value, list):
        return [structure(value[-1])] if value else []
    if isinstance(value, dict):
        if value and all(isinstance(one, float) for one in value.values()):
            return {"token": "float"}
        if value and all(key.isdigit() for key in value):
            return {"id": structure(next(iter(value.values())))}
        return {key: structure(one) for key, one in value.items()}
    return type(value).__name__


# ---- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_replies_have_the_keys_of_the_recorded_ones(path: Path) -> None:
    recorded = json.loads(path.read_text(encoding="utf-8"))
    kind = "vllm_text" if recorded["status"] == 403 else "vllm"
    fault = "v2_runner_off" if "prompt_logprob_token_ids" in path.stem else None
    with stub(kind, fault, model="tiny") as server:
        status, reply = post(server, recorded["path"], recorded["request"])
    assert status == recorded["status"]
    assert structure(reply) == structure(recorded["response"])
    if status != 200:
        assert reply == recorded["response"]
    elif recorded["request"].get("echo"):
        assert reply["usage"] == recorded["response"]["usage"]


def test_the_example_of_the_package_runs() -> None:
    failed, tried = doctest.testmod(uniopd_mm.testing)
    assert tried >= 5 and failed == 0


def test_health_and_the_served_model_are_told_as_each_server_does() -> None:
    with stub("vllm") as vllm, stub("sglang") as sglang, stub("transformers_serve") as transformers:
        assert get(vllm, "/health") == get(sglang, "/health") == b""
        assert json.loads(get(transformers, "/health")) == {"status": "ok"}
        assert json.loads(get(vllm, "/v1/models"))["data"][0]["id"] == "teacher"
        assert json.loads(get(sglang, "/model_info"))["model_path"] == "teacher"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(sglang, "/inference/v1/generate")


def test_another_model_than_the_served_one_is_404_and_a_missing_key_401() -> None:
    with stub("vllm", api_key="secret") as server:
        path, body = request_for("vllm")
        assert post(server, path, body)[0] == 401
        assert post(server, path, body, Authorization="Bearer secret")[0] == 200
        assert post(server, path, body | {"model": "student"}, Authorization="Bearer secret")[0] == 404
        assert get(server, "/health") == b""


# ---- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm", "vllm_text", "sglang", "openai"])
def test_scores_are_those_of_the_expanded_ids_under_the_images(kind: str) -> None:
    with stub(kind) as server:
        status, reply = post(server, *request_for(kind))
    assert (status, unpack(kind, reply)) == (200, truth(kind))


def test_vllm_says_where_the_images_are_only_beside_the_prompt_ids() -> None:
    path, body = request_for("vllm")
    with stub("vllm") as server:
        told = post(server, path, body)[1]
        silent = post(server, path, body | {"return_token_ids": False})[1]
    assert told["mm_placeholders"] == {"image": [{"offset": 2, "length": IMAGE_TOKENS}]}
    assert silent["mm_placeholders"] is None and silent["prompt_token_ids"] is None


def test_vllm_expands_expanded_ids_again() -> None:
    with stub("vllm") as server:
        reply = post(server, *asked_of("vllm", EXPANDED, 3))[1]
    assert reply["prompt_token_ids"].count(MARKER) == 9


def test_vllm_skips_parts_of_unknown_type_and_refuses_media_given_twice() -> None:
    path, body = request_for("vllm")
    unknown = [{"type": "image", "url": picture()}]
    both = {"mm_hashes": {}, "mm_placeholders": {"image": []}, "kwargs_data": {}}
    with stub("vllm") as server:
        assert post(server, path, body | {"content_parts": unknown})[1]["prompt_token_ids"] == COLLAPSED
        assert post(server, path, body | {"features": both})[0] == 400


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(1, 250), max_size=3), min_size=2, max_size=4),
    sizes=st.data(),
)
def test_spans_are_found_wherever_the_images_stand(texts: list[list[int]], sizes: st.DataObject) -> None:
    from uniopd_mm.testing.scoring import _find_spans

    n_images = len(texts) - 1
    same = any(not text for text in texts[1:-1])  # side by side, only equal images can be told apart
    size = sizes.draw(st.integers(1, 4))
    lengths = [size if same else sizes.draw(st.integers(1, 4)) for _ in range(n_images)]
    collapsed, expanded, spans = list(texts[0]), list(texts[0]), []
    for length, text in zip(lengths, texts[1:], strict=True):
        spans.append((len(expanded), length))
        collapsed += [MARKER, *text]
        expanded += [*[MARKER] * length, *text]
    assert _find_spans(collapsed, expanded, n_images, MARKER) == spans


def test_expand_may_tell_the_spans_itself() -> None:
    def structured(ids: list[int], n_images: int) -> tuple[list[int], list[tuple[int, int]]]:
        at = ids.index(MARKER)
        return [*ids[:at], 9, 301, 301, 9, *ids[at + 1 :]], [(at, 4)]

    with stub("vllm", expand=structured, marker=None) as server:
        reply = post(server, *request_for("vllm"))[1]
    assert reply["mm_placeholders"] == {"image": [{"offset": 2, "length": 4}]}
    assert reply["prompt_token_ids"] == [10, 20, 9, 301, 301, 9, 30, *RESPONSE]


@pytest.mark.parametrize("n_images", [0, 2])
def test_two_images_and_none_are_scored_in_their_own_places(n_images: int) -> None:
    ids = [1, MARKER, 2, MARKER, 3][: 5 if n_images else 1] + RESPONSE
    for kind in ("vllm", "sglang"):
        with stub(kind) as server:
            reply = post(server, *asked_of(kind, ids, n_images))[1]
        expanded = expand(ids, 0)
        assert unpack(kind, reply) == (expanded, [None, *score(expanded, [opened()] * n_images)])


def test_top_k_keeps_the_actual_token_beside_the_k_likeliest() -> None:
    with stub("vllm") as server:
        reply = post(server, *request_for("vllm", prompt_logprobs=3))[1]
    ids, values = truth("vllm")
    for token, value, entry in list(zip(ids, values, reply["prompt_logprobs"], strict=True))[6:]:
        assert entry[str(token)]["logprob"] == value
        best = [one for one in entry.values() if one["rank"] <= 3]
        assert len(best) == 3 and len(entry) in (3, 4)
        assert all(one["logprob"] >= value or one is entry[str(token)] for one in best)


def test_a_distribution_gives_the_same_numbers_as_scoring_one_by_one() -> None:
    def rows(ids: list[int], images: list[Image.Image]) -> list[list[float]]:
        return [
            [score([*ids[: at + 1], token], images)[at] for token in range(VOCABULARY)]
            for at in range(len(ids) - 1)
        ]

    path, body = asked_of("vllm", TEXT, 0, prompt_logprobs=4)
    with stub("vllm") as slow, stub("vllm", distribution=rows) as quick:
        assert post(slow, path, body)[1]["prompt_logprobs"] == post(quick, path, body)[1]["prompt_logprobs"]


def test_without_a_vocabulary_the_actual_token_stands_alone() -> None:
    with stub("openai", vocab_size=None) as server:
        reply = post(server, *asked_of("openai", logprobs=1, ids=TEXT))[1]
    ids, values = truth("openai")
    tops = reply["choices"][0]["logprobs"]["top_logprobs"]
    assert tops == [None, *({f"token_id:{t}": v} for t, v in list(zip(ids, values, strict=True))[1:])]


def sparse(table: list[list[int]], start: int, **params: Any) -> tuple[str, dict[str, Any]]:
    told = {"prompt_logprob_token_ids": table, "prompt_logprob_start": start, "prompt_logprobs": None}
    return request_for("vllm", **(told | params))


def test_sparse_scores_are_a_npy_file_with_one_row_per_response_token() -> None:
    start = len(EXPANDED) - len(RESPONSE) - 1
    table = [[RESPONSE[0], 7], [RESPONSE[1]], [RESPONSE[2], 8]]
    with stub("vllm") as server:
        status, reply = post(server, *sparse(table, start))
    assert status == 200 and reply["prompt_logprobs"] is None
    matrix = np.load(io.BytesIO(base64.b64decode(reply["prompt_token_id_logprobs"])))
    assert matrix.dtype == np.float32 and matrix.shape == (3, 2)
    np.testing.assert_allclose(matrix[:, 0], np.array(truth("vllm")[1][-3:], dtype=float), rtol=1e-6)
    instead = [*EXPANDED[:-3], 7, *EXPANDED[-2:]]
    assert matrix[0, 1] == pytest.approx(score(instead, [opened()])[start])
    assert matrix[1, 1] == -math.inf


def test_a_wrong_number_of_sparse_rows_is_400_with_both_numbers() -> None:
    with stub("vllm") as server:
        status, reply = post(server, *sparse([[1]] * 5, len(EXPANDED) - 4))
    assert status == 400 and "3 rows" in reply["error"]["message"] and "got 5" in reply["error"]["message"]
    with stub("vllm", "wrong_expansion") as server:
        assert post(server, *sparse([[1]] * 3, len(EXPANDED) - 4))[0] == 400
    assert server.applied == [(0, "wrong_expansion")]


def test_caps_on_log_probabilities_are_400() -> None:
    with stub("vllm", max_logprobs=2) as server:
        assert post(server, *request_for("vllm", prompt_logprobs=3))[0] == 400
        assert post(server, *sparse([[1, 2, 3]] * 3, len(EXPANDED) - 4))[0] == 400
        assert post(server, *request_for("vllm", prompt_logprobs=2))[0] == 200


def test_a_batch_of_prompts_is_matched_by_index() -> None:
    rows = [TEXT, [1, 2, 3]]
    path, body = asked_of("vllm_text", rows)
    with stub("vllm_text", "out_of_order") as server:
        swapped, right = post(server, path, body)[1], post(server, path, body)[1]
    assert [choice["index"] for choice in swapped["choices"]] == [1, 0]
    assert [choice["prompt_token_ids"] for choice in right["choices"]] == rows
    assert server.applied == [(0, "out_of_order")]


def test_echoed_tokens_that_decode_alike_overwrite_each_other() -> None:
    path, body = asked_of("openai", logprobs=20)
    with stub("openai") as server:
        by_id = post(server, path, body)[1]["choices"][0]["logprobs"]["top_logprobs"]
        by_text = post(server, path, body | {"return_tokens_as_token_ids": False})[1]["choices"][0][
            "logprobs"
        ]
    assert any(len(text) < len(ids) for text, ids in zip(by_text["top_logprobs"][1:], by_id[1:], strict=True))


# ---- SGLang ------------------------------------------------------------------------------------------------------


def test_sglang_starts_with_null_wherever_it_starts() -> None:
    start = len(EXPANDED) - len(RESPONSE) - 1
    with stub("sglang") as server:
        reply = post(server, *request_for("sglang", logprob_start_len=start))[1]
    entries = reply["meta_info"]["input_token_logprobs"]
    values = truth("sglang")[1]
    assert entries == [
        [None, EXPANDED[start], None],
        *([values[-3 + i], RESPONSE[i], None] for i in range(3)),
    ]


def test_sglang_clips_image_ids_and_the_last_id_of_the_vocabulary() -> None:
    ids = [*PROMPT, VOCABULARY - 1, 5]
    with stub("sglang") as server:
        reply = post(server, *asked_of("sglang", ids))[1]
    assert [entry[1] for entry in reply["meta_info"]["input_token_logprobs"]] == [10, 20, 0, 0, 0, 30, 0, 5]
    assert reply["prompt_token_ids"][-2] == VOCABULARY - 1


def test_sglang_takes_expanded_ids_and_silently_tokenises_again() -> None:
    with stub("sglang") as server:
        status, reply = post(server, *asked_of("sglang", EXPANDED, 1))
    assert status == 200
    assert reply["prompt_token_ids"][:-1] == EXPANDED[:-1] and reply["prompt_token_ids"][-1] != EXPANDED[-1]


def test_sglang_reads_markers_without_images_as_text() -> None:
    with stub("sglang") as server:
        reply = post(server, *asked_of("sglang", COLLAPSED, 0))[1]
    assert reply["prompt_token_ids"] == COLLAPSED and reply["meta_info"]["prompt_tokens"] == len(COLLAPSED)


def test_sglang_answers_a_batch_with_a_list_text_rows_included() -> None:
    body = asked_of("sglang", [COLLAPSED, TEXT], 0)[1]
    body |= {"image_data": [[picture(wrap=False)], None], "rid": "step", "token_ids_logprob": [7, 8, 9]}
    with stub("sglang") as server:
        with_image, text = post(server, "/generate", body)[1]
    assert unpack("sglang", with_image) == truth("sglang")
    assert unpack("sglang", text) == (TEXT, [None, *score(TEXT, [])])
    assert [with_image["meta_info"]["id"], text["meta_info"]["id"]] == ["step_0", "step_1"]
    rows = text["meta_info"]["input_token_ids_logprobs"]
    assert rows[0] is None and [entry[1] for entry in rows[-1]] == [7, 8, 9]
    assert rows[-1][0][0] == score([*TEXT[:-1], 7], [])[-1]


def test_sglang_refuses_a_start_behind_the_end() -> None:
    with stub("sglang") as server:
        status, reply = post(server, *request_for("sglang", logprob_start_len=len(EXPANDED) + 1))
    assert status == 400 and "logprob_start_len" in reply["error"]["message"]


# ---- servers that cannot score -----------------------------------------------------------------------------------


def test_transformers_serve_ignores_log_probabilities_and_refuses_ids() -> None:
    body = {"prompt": "abc", "max_tokens": 1, "logprobs": 1, "echo": True}
    with stub("transformers_serve") as server:
        status, reply = post(server, COMPLETIONS, body)
        assert status == 200 and set(reply["choices"][0]) == {"index", "text", "finish_reason"}
        assert post(server, COMPLETIONS, body | {"prompt": TEXT})[0] == 400
        assert post(server, COMPLETIONS, body | {"return_token_ids": True})[0] == 422


def test_llama_cpp_scores_each_token_as_if_it_came_once_more() -> None:
    body = {"prompt": "abc", "max_tokens": 0, "logprobs": 1, "echo": True}
    ids = list(b"abc")
    with stub("llama_cpp") as server:
        reply = post(server, COMPLETIONS, body)[1]
        assert post(server, COMPLETIONS, body | {"prompt": ids})[0] == 422
    late = [score([*ids[: at + 1], ids[at]], [])[-1] for at in range(3)]
    assert reply["choices"][0]["logprobs"]["token_logprobs"] == [None, *late[1:]]
    assert late[1:] != score(ids, [])


# ---- faults ------------------------------------------------------------------------------------------------------


def cases(*effects: str) -> list[tuple[str, str]]:
    return [(name, kind) for name, fault in FAULTS.items() if fault.effect in effects for kind in fault.kinds]


def provoke(name: str, kind: str) -> tuple[str, dict[str, Any]]:
    """A request on which the fault can act."""
    if FAULTS[name].needs == "sample":
        return asked_for_answers(kind)
    if FAULTS[name].needs == "sparse":
        return sparse([[token] for token in RESPONSE], len(EXPANDED) - 4)
    if FAULTS[name].needs == "batch":
        return asked_of("vllm_text", [TEXT, TEXT])
    if kind in ("transformers_serve", "llama_cpp"):
        return COMPLETIONS, {"prompt": "abc", "max_tokens": 1}
    return request_for(kind)


@pytest.mark.parametrize(("name", "kind"), cases("refuse", "either", "silent", "harmless"))
def test_a_disturbed_answer_has_status_200_and_is_not_the_right_one(name: str, kind: str) -> None:
    path, body = provoke(name, kind)
    first_stops = name in ("stop_missing", "runs_on")
    with stub(
        kind, name, sample=two_answers(first_stops) if FAULTS[name].needs == "sample" else None
    ) as server:
        wrong_status, wrong = post(server, path, body)
        status, right = post(server, path, body)
    assert (wrong_status, status) == (200, 200)
    assert server.applied == [(0, name)]
    unlike = {"id", "request_id", "created", "e2e_latency"}
    assert _without(wrong, unlike) != _without(right, unlike)


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(one, keys) for key, one in value.items() if key not in keys}
    return [_without(one, keys) for one in value] if isinstance(value, list) else repr(value)


@pytest.mark.parametrize(("name", "kind"), cases("retry"))
def test_a_connection_that_fails_works_the_next_time(name: str, kind: str) -> None:
    path, body = provoke(name, kind)
    failures = (http.client.HTTPException, ConnectionError, TimeoutError, ValueError, urllib.error.URLError)
    with stub(kind, name) as server:
        try:
            status, _ = post(server, path, body, timeout=0.2 if name == "timeout" else 5)
        except failures:
            status = None
        assert status is None or status >= 429
        assert post(server, path, body)[0] == 200
    assert server.applied == [(0, name)]


@pytest.mark.parametrize(("name", "kind"), cases("error"))
def test_a_request_that_is_not_accepted_gets_a_4xx(name: str, kind: str) -> None:
    with stub(kind, name) as server:
        assert post(server, *provoke(name, kind))[0] in (400, 401, 403)
    assert server.applied == [(0, name)]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_ids_of_a_disturbed_prompt_come_back_as_the_server_read_them(kind: str) -> None:
    seen = {}
    for name in (
        "wrong_expansion",
        "double_expansion",
        "images_ignored",
        "one_id_changed",
        "retokenised_shorter",
    ):
        with stub(kind, name) as server:
            seen[name] = unpack(kind, post(server, *request_for(kind))[1])[0]
    assert seen["wrong_expansion"] == [10, 20, *[MARKER] * 4, 30, *RESPONSE]
    assert seen["double_expansion"] == [10, 20, *[MARKER] * 6, 30, *RESPONSE]
    assert seen["images_ignored"] == COLLAPSED
    assert seen["one_id_changed"] == [*EXPANDED[:-1], 41]
    assert seen["retokenised_shorter"] == [*EXPANDED[:-2], 42]


def test_faults_that_need_images_leave_text_alone() -> None:
    for name in (name for name, fault in FAULTS.items() if fault.needs == "images"):
        with stub("vllm", name) as server:
            reply = post(server, *asked_of("vllm", TEXT, 0))[1]
        assert unpack("vllm", reply) == (TEXT, [None, *score(TEXT, [])]) and server.applied == []


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), share=st.floats(0.1, 0.9))
def test_faults_hit_their_share_of_calls_and_repeat_with_the_seed(seed: int, share: float) -> None:
    faults = Faults(("http_500", "reset"), share=share, seed=seed)
    hits = [faults.pick(call) for call in range(400)]
    assert hits == [Faults(("http_500", "reset"), share=share, seed=seed).pick(call) for call in range(400)]
    assert abs(sum(hit is not None for hit in hits) / 400 - share) < 0.15


def test_an_unknown_fault_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="'null_scores'"):
        Faults(("null_score",))
    with pytest.raises(ConfigError, match="vllm_text"):
        StubServer("vlm", score)


def test_faults_are_listed_by_server_and_by_what_requests_have() -> None:
    assert all("reset" in names("retry", kind) for kind in EVERY)
    assert "wrong_expansion" in names("refuse", "vllm", "images")
    assert "wrong_expansion" not in names("refuse", "vllm")
    assert all(
        "one_id_changed" in names("refuse", kind) for kind in ("vllm", "vllm_text", "sglang", "openai")
    )


# ---- the server itself -------------------------------------------------------------------------------------------


def test_what_the_scoring_function_raises_ends_the_context() -> None:
    def broken(ids: list[int], images: list[Image.Image]) -> list[float]:
        return [0.0]

    with pytest.raises(ValueError, match="1 values for 6 ids"), StubServer("vllm", broken) as server:
        assert post(server, *asked_of("vllm", TEXT, 0))[0] == 500


def test_requests_are_kept_and_answered_side_by_side() -> None:
    with stub("vllm", delay_s=0.2) as server:
        threads = [threading.Thread(target=post, args=(server, *request_for("vllm"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert server.peak_in_flight == 4
    assert [request.call for request in server.requests] == [0, 1, 2, 3]
    assert server.requests[0].path == GENERATE and server.requests[0].payload["token_ids"] == COLLAPSED


def test_closing_does_not_wait_for_a_hanging_call() -> None:
    server = StubServer("vllm", score, faults=Faults(("timeout",), hang_s=60))
    thread = threading.Thread(target=_fails, args=(server,))
    thread.start()
    while not server.requests:
        time.sleep(0.01)
    begin = time.monotonic()
    server.close()
    thread.join(timeout=5)
    assert not thread.is_alive() and time.monotonic() - begin < 5


def _fails(server: StubServer) -> None:
    with pytest.raises((http.client.HTTPException, OSError)):
        post(server, *asked_of("vllm", TEXT, 0))
