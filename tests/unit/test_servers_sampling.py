"""Samplers: what is sent, and that an answer is used only when everything about it is as asked."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uniopd_mm.config import SamplingConfig
from uniopd_mm.errors import AlignmentError
from uniopd_mm.servers import SAMPLERS, ReplyError, Sampled, SampleRequest, SGLangSampler

RECORDED = Path(__file__).parents[1] / "fixtures" / "vllm_http"
PAD, STOP, OTHER_STOP, SIZE = 90, 7, 8, 100
LIMIT = 4
PICTURE = ("data:image/png;base64,AAAA", "data:image/png;base64,BBBB")
ASKED = SampleRequest(
    collapsed_ids=[1, PAD, 5, PAD, 6],
    expanded_ids=[1, PAD, PAD, PAD, 5, PAD, PAD, 6],
    images=PICTURE,
    n=2,
    sampling=SamplingConfig(max_new_tokens=LIMIT),
    stop_ids=(STOP, OTHER_STOP),
    suppressed_ids=(PAD, 91),
    seed=12,
    vocab_size=SIZE,
)
TEXT = replace(ASKED, collapsed_ids=[1, 5, 6], expanded_ids=[1, 5, 6], images=())
STOPPED = ([10, 11, STOP], [-0.5, -1.5, -2.5], "stop")
FULL = ([20, 21, 22, 23], [-0.25, 0.0, -3.0, -4.0], "length")
KINDS = ("vllm", "vllm_text", "sglang", "openai")


def request_of(kind):
    return ASKED if kind in ("vllm", "sglang") else TEXT


def reply_of(kind, answers, asked=None):
    """As the kind of server writes these (ids, values, finish)."""
    asked = asked or request_of(kind)
    spans = [{"offset": 1, "length": 3}, {"offset": 5, "length": 2}]
    if kind == "sglang":
        return {
            "items": [
                {
                    "output_ids": ids,
                    "prompt_token_ids": asked.expanded_ids,
                    "meta_info": {
                        "finish_reason": {"type": finish, "matched": ids[-1] if ids else 0},
                        "prompt_tokens": len(asked.expanded_ids),
                        "weight_version": "3",
                        "output_token_logprobs": [[v, t, None] for v, t in zip(values, ids, strict=True)],
                    },
                }
                for ids, values, finish in answers
            ]
        }
    if kind == "vllm":
        choices = [
            {
                "index": i,
                "finish_reason": finish,
                "token_ids": ids,
                "weight_versions": [{"version": "3", "start": 0, "end": len(ids)}],
                "logprobs": {
                    "content": [{"token_id": t, "logprob": v} for v, t in zip(values, ids, strict=True)]
                },
            }
            for i, (ids, values, finish) in enumerate(answers)
        ]
        return {
            "choices": choices,
            "prompt_token_ids": asked.expanded_ids,
            "mm_placeholders": {"image": spans} if asked.images else None,
        }
    choices = [
        {
            "index": i,
            "finish_reason": finish,
            "token_ids": ids,
            "prompt_token_ids": asked.expanded_ids,
            "logprobs": {"token_logprobs": values, "tokens": [f"token_id:{t}" for t in ids]},
        }
        for i, (ids, values, finish) in enumerate(answers)
    ]
    return {"choices": choices, "usage": {"prompt_tokens": len(asked.expanded_ids)}}


def read(kind, *answers, asked=None):
    asked = asked or request_of(kind)
    return SAMPLERS[kind].parse(reply_of(kind, answers, asked), asked)


# ---- what is sent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_sent_also_those_that_are_off(kind):
    """What is left out, servers take from the model's own generation settings."""
    body = SAMPLERS[kind].request(request_of(kind), "m")[1]
    sent = body.get("sampling_params", body)
    sent = sent[0] if isinstance(sent, list) else sent
    expected = {
        "n": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert {key: sent[key] for key in expected} == expected
    assert sent["stop_token_ids"] == [STOP, OTHER_STOP] and sent["logit_bias"] == {"90": -100.0, "91": -100.0}
    assert sent["max_new_tokens" if kind == "sglang" else "max_tokens"] == LIMIT
    assert json.loads(json.dumps(body)) == body


def test_truncation_is_sent_as_set():
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, top_k=50, min_p=0.1, max_new_tokens=LIMIT)
    for kind in KINDS:
        body = SAMPLERS[kind].request(replace(request_of(kind), sampling=sampling), "m")[1]
        sent = body.get("sampling_params", body)
        sent = sent[0] if isinstance(sent, list) else sent
        assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["min_p"]) == (0.7, 0.9, 50, 0.1)


def test_the_collapsed_prompt_goes_out_beside_the_pictures():
    path, body = SAMPLERS["vllm"].request(ASKED, "m")
    assert path == "/inference/v1/generate" and body["token_ids"] == ASKED.collapsed_ids
    assert body["content_parts"] == [{"type": "image_url", "url": uri} for uri in PICTURE]
    assert body["return_token_ids"] and body["sampling_params"]["seed"] == 12
    path, body = SAMPLERS["sglang"].request(ASKED, "m")
    # a batch of one: SGLang takes two pictures of one row for two rows otherwise
    assert path == "/generate" and body["input_ids"] == [ASKED.collapsed_ids]
    assert (
        body["image_data"] == [list(PICTURE)] and body["return_prompt_token_ids"] and body["return_logprob"]
    )


def test_a_deterministic_sglang_is_asked_for_each_answer_with_its_own_seed():
    body = SGLangSampler(seeded=True).request(ASKED, "m")[1]
    assert body["input_ids"] == [ASKED.collapsed_ids] * 2 and body["image_data"] == [list(PICTURE)] * 2
    assert [(row["n"], row["sampling_seed"]) for row in body["sampling_params"]] == [(1, 12), (1, 13)]
    assert all(
        "sampling_seed" not in row for row in SAMPLERS["sglang"].request(ASKED, "m")[1]["sampling_params"]
    )


@pytest.mark.parametrize("kind", ["vllm_text", "openai"])
def test_completions_take_no_images(kind):
    with pytest.raises(AlignmentError, match=kind):
        SAMPLERS[kind].request(ASKED, "m")


@pytest.mark.parametrize("kind", KINDS)
def test_one_greedy_answer_is_asked_for_and_stands_for_all(kind):
    asked = replace(request_of(kind), n=3, sampling=SamplingConfig(temperature=0, max_new_tokens=LIMIT))
    body = SAMPLERS[kind].request(asked, "m")[1]
    sent = body.get("sampling_params", body)
    assert (sent[0] if isinstance(sent, list) else sent)["n"] == 1
    answers = read(kind, STOPPED, asked=asked)
    assert [a.ids for a in answers] == [STOPPED[0]] * 3


def test_the_temperature_of_the_log_probabilities_is_told():
    def told(kind, temperature):
        return SAMPLERS[kind].logprob_temperature(SamplingConfig(temperature=temperature))

    assert [told(kind, 0.7) for kind in KINDS] == [1.0, 1.0, 0.7, None]
    assert [told(kind, 0) for kind in KINDS] == [told(kind, 1) for kind in KINDS] == [1.0] * 4


# ---- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_answers_come_as_they_were_sampled(kind):
    stopped, full = read(kind, STOPPED, FULL)
    assert (stopped.ids, stopped.finish, full.ids, full.finish) == (STOPPED[0], "stop", FULL[0], "length")
    assert stopped.logprobs.dtype == torch.float32 and stopped.logprobs.tolist() == STOPPED[1]
    assert full.logprobs.tolist() == FULL[1]
    version = "3" if kind in ("vllm", "sglang") else None
    assert stopped.weight_version == full.weight_version == version


@pytest.mark.parametrize("kind", ["vllm", "vllm_text", "openai"])
def test_answers_are_told_apart_by_their_index(kind):
    reply = reply_of(kind, [STOPPED, FULL])
    reply["choices"].reverse()
    assert [a.ids for a in SAMPLERS[kind].parse(reply, request_of(kind))] == [STOPPED[0], FULL[0]]


@pytest.mark.parametrize("name", ["inference_v1_generate_n2", "inference_v1_generate_on"])
def test_recorded_answers_of_vllm_are_read(name):
    said = json.loads((RECORDED / f"{name}.json").read_text())
    ids = said["request"]["token_ids"]
    params = said["request"]["sampling_params"]
    # recorded without return_token_ids
    reply = said["response"] | {"prompt_token_ids": ids}
    limit = SamplingConfig(max_new_tokens=params["max_tokens"], temperature=params["temperature"])
    asked = replace(
        TEXT, collapsed_ids=ids, expanded_ids=ids, n=params.get("n", 1), sampling=limit, vocab_size=512
    )
    answers = SAMPLERS["vllm"].parse(reply, asked)
    for answer, choice in zip(answers, reply["choices"], strict=True):
        assert answer.ids == choice["token_ids"] and answer.weight_version == "default"
        expected = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        assert answer.logprobs.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["vllm_text", "openai"])
def test_recorded_completions_of_vllm_are_read(kind):
    said = json.loads((RECORDED / "completions_sample.json").read_text())
    choice = said["response"]["choices"][0]
    prompt = choice["prompt_token_ids"]
    asked = replace(TEXT, collapsed_ids=prompt, expanded_ids=prompt, n=1, vocab_size=512)
    (answer,) = SAMPLERS[kind].parse(said["response"], asked)
    assert answer.ids == choice["token_ids"]
    assert answer.logprobs.tolist() == pytest.approx(choice["logprobs"]["token_logprobs"])


def test_token_names_do_where_ids_are_not_listed():
    reply = reply_of("openai", [STOPPED, FULL])
    for choice in reply["choices"]:
        del choice["token_ids"]
    assert [a.ids for a in SAMPLERS["openai"].parse(reply, TEXT)] == [STOPPED[0], FULL[0]]
    reply["choices"][0]["logprobs"]["tokens"] = ["a", "b", "c"]
    bad, good = SAMPLERS["openai"].parse(reply, TEXT)
    assert "token ids" in bad and good.ids == FULL[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_token_that_just_fits_is_a_stop(kind):
    just = ([20, 21, 22, STOP], [-1.0] * 4, "length")
    assert read(kind, just, FULL)[0].finish == "stop"


def test_weights_that_changed_on_the_way_are_both_named():
    reply = reply_of("vllm", [STOPPED, FULL])
    reply["choices"][0]["weight_versions"] = [
        {"version": "3", "start": 0, "end": 1},
        {"version": "4", "start": 1, "end": 3},
    ]
    assert SAMPLERS["vllm"].parse(reply, ASKED)[0].weight_version == "3, 4"


WRONG = {
    "nothing": (([], [], "stop"), "0 token ids"),
    "a vision token": (([10, PAD, STOP], [-1.0] * 3, "stop"), "suppressed"),
    "beyond the vocabulary": (([10, SIZE, STOP], [-1.0] * 3, "stop"), "vocabulary has 100"),
    "a negative id": (([10, -1, STOP], [-1.0] * 3, "stop"), "whole numbers"),
    "too long": (([20] * (LIMIT + 1), [-1.0] * (LIMIT + 1), "length"), "max_new_tokens is 4"),
    "cut by the context": (([20] * (LIMIT - 1), [-1.0] * (LIMIT - 1), "length"), "--max-model-len"),
    "no stop token": (([10, 11], [-1.0] * 2, "stop"), r"rollout\.stop_token_ids=\[11\]"),
    "goes on after its end": (
        ([10, OTHER_STOP, 11, STOP], [-1.0] * 4, "stop"),
        "goes on after the stop token at 1",
    ),
    "aborted": (([10, 11], [-1.0] * 2, "abort"), "abort"),
    "NaN": (([10, STOP], [-1.0, float("nan")], "stop"), "value 1 is nan"),
    "-inf": (([10, STOP], [-9999.0, -1.0], "stop"), "value 0 is -9999"),
    "null": (([10, STOP], [None, -1.0], "stop"), "value 0 is null"),
    "positive": (([10, STOP], [-1.0, 0.5], "stop"), "value 1 is 0.5"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_refused_with_a_reason_and_costs_the_others_nothing(kind, name):
    wrong, reason = WRONG[name]
    bad, good = read(kind, wrong, FULL)
    assert isinstance(bad, str) and re.search(reason, bad)
    assert isinstance(good, Sampled) and good.ids == FULL[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_number_of_answers_costs_them_all(kind):
    for answers in ([STOPPED], [STOPPED, FULL, FULL], []):
        with pytest.raises(ReplyError):
            read(kind, *answers)


@pytest.mark.parametrize("kind", ["vllm", "vllm_text", "sglang"])
def test_another_prompt_than_ours_is_no_prompt_of_ours(kind):
    asked = request_of(kind)
    for wrong in (asked.expanded_ids[:-1], [*asked.expanded_ids[:-1], 17], [*asked.expanded_ids, 6]):
        reply = reply_of(kind, [STOPPED, FULL])
        for home in (reply, *reply.get("choices", ()), *reply.get("items", ())):
            if "prompt_token_ids" in home:
                home["prompt_token_ids"] = wrong
        try:
            answers = SAMPLERS[kind].parse(reply, asked)
        except ReplyError as error:
            answers = [error.reason] * 2
        assert all("prompt" in answer or "ids, expected" in answer for answer in answers)


def test_an_image_that_was_not_placed_was_not_seen():
    reply = reply_of("vllm", [STOPPED, FULL]) | {"mm_placeholders": None}
    with pytest.raises(ReplyError, match="ignored"):
        SAMPLERS["vllm"].parse(reply, ASKED)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_place_of_a_reply_is_told(kind):
    with pytest.raises(ReplyError, match="out of memory"):
        SAMPLERS[kind].parse({"error": {"message": "out of memory"}}, request_of(kind))


def places(value, path=()):
    """Every place in a reply."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_changed_in_a_reply_an_answer_is_right_or_refused(data):
    kind = data.draw(st.sampled_from(KINDS))
    reply = json.loads(json.dumps(reply_of(kind, [STOPPED, FULL])))
    path = data.draw(st.sampled_from(list(places(reply))))
    home = reply
    for key in path[:-1]:
        home = home[key]
    if isinstance(home, list) and data.draw(st.booleans()):
        del home[path[-1]]
    else:
        junk = st.sampled_from([None, "x", [], {}, 1.5, -1, 10**9, True, [[]], {"a": 1}])
        home[path[-1]] = data.draw(junk)
    try:
        answers = SAMPLERS[kind].parse(reply, request_of(kind))
    except ReplyError:
        return
    assert len(answers) == 2
    for answer, (ids, values, finish) in zip(answers, (STOPPED, FULL), strict=True):
        if isinstance(answer, str):
            continue
        assert (answer.ids, answer.finish) == (ids, finish)
        # a number that is a log-probability as well is all that nobody can find out
        same = [
            a == pytest.approx(b) or path[-1] in ("logprob", 0) or "token_logprobs" in path
            for a, b in zip(answer.logprobs.tolist(), values, strict=True)
        ]
        assert all(same)
