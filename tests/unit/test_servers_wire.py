"""Wires: what is sent, and that every way in which a reply can be wrong is found before a value of it is used."""

import base64
import copy
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uniopd_mm.errors import AlignmentError
from uniopd_mm.servers import WIRES, ReplyError, ScoreRequest, ServerError, VllmGenerate, png_uri

RECORDED = Path(__file__).parents[1] / "fixtures" / "vllm_http"
PAD = 90
LAST_ID = 99  # of the vocabulary: SGLang writes it as 0
PICTURE = Image.new("RGBA", (3, 2), (200, 10, 30, 255))
# Two images of 3 and 2 tokens; the response holds the last id of the vocabulary.
ASKED = ScoreRequest(
    collapsed_ids=[1, PAD, 5, PAD, 6],
    expanded_ids=[1, PAD, PAD, PAD, 5, PAD, PAD, 6],
    response_ids=[17, LAST_ID, 23],
    images=(png_uri(PICTURE), png_uri(PICTURE)),
)
TEXT = ScoreRequest(collapsed_ids=[1, 5, 6], expanded_ids=[1, 5, 6], response_ids=[17, LAST_ID, 23])
VALUES = [-1.5, -0.25, -3.0]


def recorded(name):
    """(request, status, response) of one recorded exchange with vLLM 0.32."""
    said = json.loads((RECORDED / f"{name}.json").read_text())
    return said["request"], said["status"], said["response"]


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def rows(asked, decoys=0):
    """vLLM's prompt_logprobs: alternatives first, so that neither order nor rank finds the actual token."""
    values = [-9.0] * (len(asked.expanded_ids) - 1) + VALUES
    result = [None]
    for token, value in zip((asked.expanded_ids + asked.response_ids)[1:], values, strict=True):
        row = {str(1000 + k): {"logprob": -0.1, "rank": k + 1, "decoded_token": None} for k in range(decoys)}
        result.append({**row, str(token): {"logprob": value, "rank": decoys + 1, "decoded_token": None}})
    return result


def vllm_reply(asked, decoys=0):
    spans = [{"offset": 1, "length": 3}, {"offset": 5, "length": 2}]
    return {
        "prompt_logprobs": rows(asked, decoys),
        "prompt_token_id_logprobs": None,
        "prompt_token_ids": asked.expanded_ids + asked.response_ids,
        "mm_placeholders": {"image": spans} if asked.images else None,
        "choices": [{"index": 0, "finish_reason": "length", "token_ids": [77], "logprobs": None}],
    }


def sparse_reply(asked):
    return {
        **vllm_reply(asked),
        "prompt_logprobs": None,
        "prompt_token_id_logprobs": npy(np.array(VALUES, np.float32)[:, None]),
    }


def vllm_text_reply(asked):
    ids = asked.expanded_ids + asked.response_ids
    return {"choices": [{"index": 0, "prompt_logprobs": rows(asked), "prompt_token_ids": ids}]}


def openai_reply(asked):
    ids = asked.expanded_ids + asked.response_ids
    values = [None, *[-9.0] * (len(asked.expanded_ids) - 1), *VALUES]
    tokens = [f"token_id:{i}" for i in ids]
    return {"choices": [{"index": 0, "logprobs": {"tokens": tokens, "token_logprobs": values}}]}


def sglang_reply(asked):
    clipped = [0 if i in (LAST_ID, PAD) else i for i in [asked.expanded_ids[-1], *asked.response_ids]]
    entries = [[value, token, None] for value, token in zip([None, *VALUES], clipped, strict=True)]
    return {
        "text": "",
        "output_ids": [],
        "prompt_token_ids": asked.expanded_ids + asked.response_ids,
        "meta_info": {
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(asked.expanded_ids) + len(asked.response_ids),
            "input_token_logprobs": entries,
            "output_token_logprobs": [[-0.5, 7, None]],  # one that nobody generated
        },
    }


CASES = {
    "vllm": (VllmGenerate(), ASKED, vllm_reply(ASKED)),
    "sparse": (VllmGenerate(sparse=True), ASKED, sparse_reply(ASKED)),
    "vllm_text": (WIRES["vllm_text"](), TEXT, vllm_text_reply(TEXT)),
    "openai": (WIRES["openai"](), TEXT, openai_reply(TEXT)),
    "sglang": (WIRES["sglang"](), ASKED, sglang_reply(ASKED)),
}


def change(reply, path, value):
    """A copy with the field at ``path`` set; a callable value is given the old one."""
    reply = copy.deepcopy(reply)
    place = reply
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value(place[path[-1]]) if callable(value) else value
    return reply


def refused(name, path, value):
    """The reason for which the changed reply is refused."""
    wire, asked, reply = CASES[name]
    with pytest.raises(ReplyError) as caught:
        wire.parse(change(reply, path, value), asked)
    return caught.value.reason


@pytest.mark.parametrize("name", CASES)
def test_a_right_reply_gives_the_responses_values(name):
    wire, asked, reply = CASES[name]
    values = wire.parse(reply, asked)
    assert values.dtype == torch.float32
    assert values.tolist() == VALUES


def test_every_wire_is_found_by_its_name():
    assert {kind: wire().name for kind, wire in WIRES.items()} == {kind: kind for kind in WIRES}


# --- what is sent


@pytest.mark.parametrize("name", ["vllm", "sparse", "sglang"])
def test_the_collapsed_prompt_is_sent_with_each_picture_lossless(name):
    path, body = CASES[name][0].request(ASKED, "teacher")
    ids, uris = (
        (body["input_ids"], body["image_data"])
        if name == "sglang"
        else (body["token_ids"], [part["url"] for part in body["content_parts"]])
    )
    assert path == ("/generate" if name == "sglang" else "/inference/v1/generate")
    assert ids == ASKED.collapsed_ids + ASKED.response_ids
    assert len(uris) == 2
    opened = Image.open(io.BytesIO(base64.b64decode(uris[0].removeprefix("data:image/png;base64,"))))
    assert (opened.format, opened.mode) == ("PNG", "RGB")
    assert opened.tobytes() == PICTURE.convert("RGB").tobytes()
    assert json.loads(json.dumps(body)) == body


def test_vllm_takes_the_url_on_the_part_and_refused_a_nested_one():
    request, status, response = recorded("vlm_tito_generate_content_parts")
    assert "image_url" in request["content_parts"][0]
    assert status == 400 and "is empty" in response["error"]["message"]
    part = VllmGenerate().request(ASKED, "teacher")[1]["content_parts"][0]
    assert set(part) == {"type", "url"}


def test_a_text_request_says_nothing_of_images():
    assert "content_parts" not in VllmGenerate().request(TEXT, "teacher")[1]
    assert "image_data" not in WIRES["sglang"]().request(TEXT, "teacher")[1]


def test_scores_are_asked_from_the_last_prompt_token_on():
    assert WIRES["sglang"]().request(ASKED, "")[1]["logprob_start_len"] == len(ASKED.expanded_ids) - 1
    sampling = VllmGenerate(sparse=True).request(ASKED, "teacher")[1]["sampling_params"]
    assert sampling["prompt_logprob_start"] == len(ASKED.expanded_ids) - 1
    assert sampling["prompt_logprob_token_ids"] == [[17], [LAST_ID], [23]]
    assert "prompt_logprobs" not in sampling


@pytest.mark.parametrize("name", ["vllm_text", "openai"])
def test_a_text_endpoint_is_never_asked_about_images(name):
    with pytest.raises(AlignmentError, match=r"takes no images.*server.kind"):
        WIRES[name]().request(ASKED, "teacher")


@pytest.mark.parametrize("field", ["collapsed_ids", "expanded_ids", "response_ids"])
def test_a_request_without_ids_is_an_error(field):
    with pytest.raises(AlignmentError, match="at least one of each"):
        replace(TEXT, **{field: []})


# --- recorded replies of vLLM 0.32


def test_a_recorded_completions_reply_is_read():
    request, _, response = recorded("completions_prompt_logprobs_0")
    asked = ScoreRequest(request["prompt"][:4], request["prompt"][:4], request["prompt"][4:])
    values = WIRES["vllm_text"]().parse(response, asked)
    assert values.tolist() == pytest.approx([-12.40167236328125, -5.437305450439453, -10.133913040161133])


def test_a_recorded_echo_reply_is_read_by_token_id():
    request, _, response = recorded("completions_echo_logprobs3_max0")
    ids = request["prompt"][0]
    values = WIRES["openai"]().parse(response, ScoreRequest(ids[:5], ids[:5], ids[5:]))
    assert values.tolist() == pytest.approx([-5.437305450439453, -10.133913040161133])


def test_a_recorded_reply_with_alternatives_is_read_by_id_not_by_rank():
    request, _, response = recorded("inference_v1_generate_on")
    ids = request["token_ids"]
    asked = ScoreRequest(ids[:5], ids[:5], ids[5:])
    with pytest.raises(ReplyError, match="does not say the prompt ids"):
        VllmGenerate().parse(response, asked)
    values = VllmGenerate().parse({**response, "prompt_token_ids": ids}, asked)
    assert values.tolist() == pytest.approx([-5.437305450439453, -10.133913040161133])


def test_a_recorded_image_reply_without_prompt_ids_is_checked_by_the_rows_themselves():
    request, _, response = recorded("vlm_tito_generate_features")
    ids, span = request["token_ids"], request["features"]["mm_placeholders"]["image"][0]
    start, end = span["offset"], span["offset"] + span["length"]
    asked = ScoreRequest([*ids[: start + 1], *ids[end:-3]], ids[:-3], ids[-3:], (png_uri(PICTURE),))
    expected = [response["prompt_logprobs"][-k][str(ids[-k])]["logprob"] for k in (3, 2, 1)]
    assert VllmGenerate().parse(response, asked).tolist() == pytest.approx(expected)
    with pytest.raises(ReplyError, match=f"prompt ids differ at {start}"):
        other = [*ids[:start], 5, *ids[start + 1 : -3]]
        VllmGenerate().parse(response, replace(asked, expanded_ids=other))


def test_a_recorded_reply_without_scores_is_refused():
    request, _, response = recorded("inference_v1_generate_n2")
    ids = request["token_ids"]
    asked = ScoreRequest(ids[:5], ids[:5], ids[5:])
    for sparse in (False, True):
        with pytest.raises(ReplyError, match="null or missing"):
            VllmGenerate(sparse).parse(response, asked)


@pytest.mark.parametrize("name", ["inference_v1_generate", "prompt_logprob_token_ids"])
def test_a_recorded_error_is_told_in_the_servers_own_words(name):
    _, _, response = recorded(name)
    with pytest.raises(ReplyError) as caught:
        VllmGenerate().parse(response, TEXT)
    assert response["error"]["message"] in caught.value.reason


# --- what must be found


def test_a_reason_is_short_and_the_error_is_a_server_error():
    reason = refused("vllm", ("prompt_token_ids",), lambda ids: [*ids[:-1], 4711])
    assert reason == "response ids differ at 2: sent 23, got 4711"
    assert issubclass(ReplyError, ServerError) and issubclass(ServerError, RuntimeError)


@pytest.mark.parametrize("name", ["vllm", "sparse", "sglang"])
def test_an_image_of_another_size_than_ours_is_refused(name):
    reason = refused(name, ("prompt_token_ids",), lambda ids: [*ids[:3], PAD, *ids[3:]])
    assert "prompt ids differ at 4: sent 5, got 90; the server has 12 ids, expected 11" in reason


@pytest.mark.parametrize("name", ["vllm", "sparse", "sglang"])
def test_a_prompt_that_was_not_expanded_is_refused(name):
    assert "expected 11" in refused(name, ("prompt_token_ids",), ASKED.collapsed_ids + ASKED.response_ids)


@pytest.mark.parametrize("name", ["vllm", "sparse", "sglang"])
def test_one_changed_response_id_is_refused_though_the_length_is_right(name):
    assert "response ids differ at 0" in refused(name, ("prompt_token_ids", 8), 18)


def test_one_changed_response_id_is_refused_by_text_servers_too():
    path = ("choices", 0, "prompt_token_ids", 4)
    assert "response ids differ at 1" in refused("vllm_text", path, 18)
    assert "response ids differ at 1" in refused(
        "openai", ("choices", 0, "logprobs", "tokens", 4), "token_id:18"
    )


def test_a_row_about_another_token_is_refused_though_the_ids_are_right():
    other = {"18": {"logprob": -1.0, "rank": 1}}
    assert "response position 0" in refused("vllm", ("prompt_logprobs", 8), other)
    assert "response position 0" in refused("vllm", ("prompt_logprobs", 8), None)


def test_rows_that_are_shifted_by_one_are_refused():
    assert "no value" in refused("vllm", ("prompt_logprobs",), lambda r: [None, *r[:-1]])
    shifted = refused("sglang", ("meta_info", "input_token_logprobs"), lambda e: [e[0], e[0], *e[1:-1]])
    assert "response ids differ at 0" in shifted
    assert "1 values" in refused("sglang", ("meta_info", "input_token_logprobs"), lambda e: e[:1])


def test_the_actual_token_is_looked_up_by_id_among_alternatives():
    assert VllmGenerate().parse(vllm_reply(ASKED, decoys=2), ASKED).tolist() == VALUES


@pytest.mark.parametrize(
    "bad", [None, float("nan"), float("-inf"), -9999.0, 0.5, "-1.0", True, False, 10**400]
)
def test_what_is_no_log_probability_is_never_a_value(bad):
    places = {
        "vllm": ("prompt_logprobs", 8, "17", "logprob"),
        "vllm_text": ("choices", 0, "prompt_logprobs", 3, "17", "logprob"),
        "openai": ("choices", 0, "logprobs", "token_logprobs", 3),
        "sglang": ("meta_info", "input_token_logprobs", 1, 0),
    }
    for name, path in places.items():
        assert refused(name, path, bad).startswith("value 0 is")


@pytest.mark.parametrize("bad", [-np.inf, np.nan, -9999.0])
def test_minus_infinity_of_a_padded_binary_row_is_never_a_value(bad):
    array = np.array([[-1.0], [bad], [-2.0]], np.float32)
    assert refused("sparse", ("prompt_token_id_logprobs",), npy(array)).startswith("value 1 is")


@pytest.mark.parametrize(
    "array", [np.zeros((2, 1), np.float32), np.zeros((3, 2), np.float32), np.zeros((3, 1), np.int64)]
)
def test_a_binary_array_of_another_shape_or_type_is_refused(array):
    assert "expected (3, 1) floats" in refused("sparse", ("prompt_token_id_logprobs",), npy(array))


@pytest.mark.parametrize("text", ["", "not base64!", base64.b64encode(b"PK\3\4 no array").decode()])
def test_what_is_no_binary_array_is_refused(text):
    assert "not a base64 .npy array" in refused("sparse", ("prompt_token_id_logprobs",), text)


def test_scores_without_prompt_ids_are_refused_where_nothing_else_tells_the_ids():
    assert "prompt_token_ids" in refused("sparse", ("prompt_token_ids",), None)
    assert "prompt_token_ids" in refused("sglang", ("prompt_token_ids",), None)
    strings = ["a", "b", "c", "d", "e", "f"]
    assert "nothing can be checked" in refused("openai", ("choices", 0, "logprobs", "tokens"), strings)


def test_images_that_the_server_ignored_are_refused():
    assert "were they ignored" in refused("vllm", ("mm_placeholders",), None)
    assert "placed 0 images, expected 2" in refused("vllm", ("mm_placeholders",), {})
    assert "placed 1 images, expected 2" in refused("vllm", ("mm_placeholders", "image"), lambda s: s[:1])
    one = replace(ASKED, collapsed_ids=[1, PAD, 6], expanded_ids=[1, PAD, 6], images=(png_uri(PICTURE),))
    unsaid = {"prompt_logprobs": rows(one), "prompt_token_ids": None, "mm_placeholders": None}
    with pytest.raises(ReplyError, match="were they ignored"):
        VllmGenerate().parse(unsaid, one)


def test_images_that_no_one_sent_are_refused():
    said = {**vllm_reply(TEXT), "mm_placeholders": {"image": [{"offset": 1, "length": 1}]}}
    with pytest.raises(ReplyError, match="placed 1 images, expected 0"):
        VllmGenerate().parse(said, TEXT)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 3), (2, 3), (1, 2), (1, 5), (1, 0), (7, 9)],
    ids=["early", "late", "too short", "overlapping", "empty", "past the prompt"],
)
def test_an_image_at_another_place_is_refused(offset, length):
    span = {"offset": offset, "length": length}
    assert "image" in refused("vllm", ("mm_placeholders", "image", 0), span)


def test_an_image_that_swallows_text_is_refused():
    asked = ScoreRequest([1, PAD, 5, 6, 7], [1, PAD, PAD, 5, 6, 7], [17, LAST_ID, 23], (png_uri(PICTURE),))
    said = {**vllm_reply(asked), "mm_placeholders": {"image": [{"offset": 1, "length": 5}]}}
    with pytest.raises(ReplyError, match="leave 1 text tokens, expected 4"):
        VllmGenerate().parse(said, asked)


def test_newlines_that_merge_around_an_image_are_no_error():
    asked = ScoreRequest([1, 10, PAD, 6], [1, PAD, PAD, 6], [17, LAST_ID, 23], (png_uri(PICTURE),))
    said = {**vllm_reply(asked), "mm_placeholders": {"image": [{"offset": 1, "length": 2}]}}
    assert VllmGenerate().parse(said, asked).tolist() == VALUES


def test_an_aborted_request_is_refused_with_the_servers_message():
    abort = {"type": "abort", "message": "logprob_start_len is larger than the input"}
    reason = refused("sglang", ("meta_info", "finish_reason"), abort)
    assert reason == "the server aborted: logprob_start_len is larger than the input"


def test_a_prompt_of_another_length_than_scored_is_refused():
    assert (
        refused("sglang", ("meta_info", "prompt_tokens"), 12)
        == "the server scored 12 prompt tokens, expected 11"
    )


def test_values_that_start_elsewhere_are_refused():
    assert "another position" in refused("sglang", ("meta_info", "input_token_logprobs", 0, 0), -1.0)


def test_clipped_ids_beside_the_values_are_no_error():
    reply = change(CASES["sglang"][2], ("meta_info", "input_token_logprobs", 1, 1), 0)
    assert WIRES["sglang"]().parse(reply, ASKED).tolist() == VALUES


@pytest.mark.parametrize("name", ["vllm_text", "openai"])
def test_more_than_one_choice_is_refused(name):
    assert refused(name, ("choices",), lambda c: c * 2) == "2 choices, expected 1"


def test_an_echo_of_another_length_is_refused():
    path = ("choices", 0, "logprobs", "token_logprobs")
    assert "7 values for 6 tokens" in refused("openai", path, lambda v: [*v, -1.0])
    generated_only = {"tokens": ["token_id:5"], "token_logprobs": [-1.0]}
    assert "expected 6" in refused("openai", ("choices", 0, "logprobs"), generated_only)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """Paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_is_changed_in_a_reply_it_is_refused_or_read_right(name, data):
    wire, asked, reply = CASES[name]
    path = data.draw(st.sampled_from(list(places(reply))))
    junk = data.draw(JSON)
    try:
        values = wire.parse(change(reply, path, junk), asked)
    except ReplyError as error:
        assert error.reason and "\n" not in error.reason
        return
    wrong = [t for t, (a, b) in enumerate(zip(values.tolist(), VALUES, strict=True)) if a != b]
    # Only a value replaced by another one gets through, and only there.
    assert len(wrong) <= 1 and bool(((values > -9999) & (values <= 1e-3)).all())
