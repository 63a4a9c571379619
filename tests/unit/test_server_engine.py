"""The engine behind servers: what comes back is right or missing with a reason, and weights reach every server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from rooms import load, make_prompt

from uniopd_mm.config import RolloutServerConfig, SamplingConfig
from uniopd_mm.engines import EngineError, LocalEngine, ServerEngine, encode_groups
from uniopd_mm.engines.server import group_seed
from uniopd_mm.errors import ConfigError
from uniopd_mm.processors import VLMProcessor, get_processor
from uniopd_mm.rollout import Group
from uniopd_mm.testing import FAULTS, Faults, StubServer, names

KINDS = ("vllm", "vllm_text", "sglang", "openai")
LIMIT = 3
SAMPLING = SamplingConfig(max_new_tokens=LIMIT)
Make = Callable[..., ServerEngine]
Batch = Callable[[str], tuple[VLMProcessor, list[Group]]]


@pytest.fixture(scope="module")
def sees(tiny_models: Mapping[str, Path]) -> VLMProcessor:
    return get_processor(tiny_models["llava"])


@pytest.fixture(scope="module")
def reads(tiny_models: Mapping[str, Path]) -> VLMProcessor:
    return get_processor(tiny_models["text"])


@pytest.fixture
def make() -> Iterator[Make]:
    """An engine of the given stub servers."""
    with ExitStack() as stack:

        def make(*stubs: StubServer, processor: VLMProcessor, **settings: Any) -> ServerEngine:
            for stub in stubs:
                stack.enter_context(stub)
            server = {"kind": stubs[0].kind, "urls": [s.url for s in stubs], "timeout_s": 5, "retries": 1}
            server |= {"sync": "never"} if stubs[0].kind == "openai" else {}
            server["model"] = stubs[0].teacher.model
            config = RolloutServerConfig.model_validate(server | {"max_failed_share": 1} | settings)
            return stack.enter_context(ServerEngine(config, processor))

        yield make


def stub_of(kind: str, processor: VLMProcessor, *, first_stops: bool = True, **options: Any) -> StubServer:
    """A server of ``processor``'s model: answers depend on prompt, pictures and index, and one of two stops."""
    stop = processor.stop_token_ids()[0]

    def sample(ids: list[int], images: list[Image.Image], params: dict[str, Any]) -> list[Any]:
        light = sum(image.getpixel((0, 0))[0] for image in images)
        limit = int(params.get("max_tokens") or params.get("max_new_tokens"))
        answers = []
        for i in range(int(params.get("n") or 1)):
            first = 40 + (sum(ids) + light + i) % 50
            if (i % 2 == 0) == first_stops:
                answers.append(([first, stop], [-0.5, -0.25 * (i + 1)]))
            else:
                answers.append(([first, 41, 42], [-0.5, -1.0, -0.25 * (i + 1)]))
        return [(tokens[:limit], values[:limit]) for tokens, values in answers]

    def score(ids: list[int], images: list[Image.Image]) -> list[float]:
        return [-1.0] * (len(ids) - 1)

    if processor.sees_images:
        marker, block = expansion(processor)
        options["expand"] = lambda ids, n: [t for one in ids for t in (block if one == marker else [one])]
        options["marker"] = marker
    return StubServer(kind, score, sample=sample, **options)  # type: ignore[arg-type]


@cache
def expansion(processor: VLMProcessor) -> tuple[int, list[int]]:
    """The marker of an image, and what it becomes."""
    (group,) = groups_of(processor, (1,))
    start, end = group.encoded.image_spans[0]
    return int(group.encoded.collapsed_ids[start]), group.encoded.input_ids[start:end].tolist()


def groups_of(processor: VLMProcessor, n_images: tuple[int, ...] = (0, 0, 0)) -> list[Group]:
    prompts = [make_prompt(n, seed=i) for i, n in enumerate(n_images)]
    for i, prompt in enumerate(prompts):
        images = tuple(tiny.random_image(56, 56, seed=10 * i + k) for k in range(len(prompt.images)))
        prompts[i] = replace(prompt, images=images, source=f"rows.jsonl:{i + 1}")
    return encode_groups([(i, p, p.images) for i, p in enumerate(prompts)], processor)


@pytest.fixture(scope="module")
def batch(sees: VLMProcessor, reads: VLMProcessor) -> Batch:
    """Groups for a kind of server: with and without pictures where it takes them."""
    seen, read = groups_of(sees, (1, 0, 2)), groups_of(reads)
    return lambda kind: (sees, seen) if kind in ("vllm", "sglang") else (reads, read)


def found(groups: list[Group]) -> dict[int, list[tuple[list[int], list[float], str, str]]]:
    return {
        g.slot: [(r.response_ids.tolist(), r.sampler_logprobs.tolist(), r.finish, r.text) for r in g.rollouts]
        for g in groups
    }


# ---- sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_groups_come_back_in_order_with_what_was_sampled(kind: str, batch: Batch, make: Make) -> None:
    processor, groups = batch(kind)
    stub = stub_of(kind, processor)
    engine = make(stub, stub_of(kind, processor), processor=processor)
    engine.connect()
    engine.weight_version = 5
    counts: list[int] = []
    sampled = engine.sample(groups, 2, SAMPLING, (0, 1), counts.append)
    assert [g.slot for g in sampled] == [0, 1, 2] and {g.weight_version for g in sampled} == {5}
    assert counts == [2, 4, 6] and engine.failed == []
    for before, group in zip(groups, sampled, strict=True):
        light = sum(image.getpixel((0, 0))[0] for image in before.images)
        firsts = [40 + (int(before.encoded.input_ids.sum()) + light + i) % 50 for i in range(2)]
        stopped, full = group.rollouts
        assert stopped.response_ids.tolist() == [firsts[0], processor.stop_token_ids()[0]]
        assert full.response_ids.tolist() == [firsts[1], 41, 42]
        assert (stopped.finish, full.finish) == ("stop", "length")
        assert stopped.sampler_logprobs.tolist() == [-0.5, -0.25]
        assert full.sampler_logprobs.dtype == torch.float32 and full.response_ids.dtype == torch.int64
        assert full.text == processor.decode([firsts[1], 41, 42])


def test_an_answer_keeps_its_index_when_others_are_lost(reads: VLMProcessor, make: Make) -> None:
    groups, stub = groups_of(reads), stub_of("vllm", reads)
    sample = stub.teacher.sample

    def lossy(ids: list[int], images: list[Any], params: dict[str, Any]) -> list[Any]:
        answers = sample(ids, images, params)
        answers[1] = ([10**6], [-0.5])  # no token of the model
        return answers

    engine = make(stub, processor=reads)
    whole = engine.sample(groups, 4, SAMPLING, (0,))
    stub.teacher = replace(stub.teacher, sample=lossy)
    holes = engine.sample(groups, 4, SAMPLING, (0,))
    for full, group in zip(whole, holes, strict=True):
        assert [r.index for r in full.rollouts] == [0, 1, 2, 3] and [r.index for r in group.rollouts] == [
            0,
            2,
            3,
        ]
        for rollout in group.rollouts:
            assert rollout.text == full.rollouts[rollout.index].text


def test_servers_say_how_much_fits_into_their_context(reads: VLMProcessor, make: Make) -> None:
    engine = make(stub_of("vllm", reads, max_model_len=300), stub_of("vllm", reads), processor=reads)
    assert engine.context is None
    engine.connect()
    assert engine.context == 300


def test_groups_are_reported_as_they_get_done(reads: VLMProcessor, make: Make) -> None:
    """The first request is held back until the others were reported."""
    groups, release = groups_of(reads), threading.Event()
    stub = stub_of("vllm", reads)
    sample = stub.teacher.sample
    first = groups[0].encoded.input_ids.tolist()

    class Held:
        """Lets the others pass while the first waits, which one lock for all would not."""

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def held(ids: list[int], images: list[Any], params: dict[str, Any]) -> list[Any]:
        if ids == first:
            assert release.wait(10)
        return sample(ids, images, params)

    stub.teacher = replace(stub.teacher, sample=held, lock=Held())
    engine = make(stub, processor=reads)
    reported: list[Group] = []

    def finished(done: list[Group]) -> None:
        reported.extend(done)
        if len(reported) == 2:
            release.set()

    sampled = engine.sample(groups, 2, SAMPLING, (0,), finished=finished)
    assert [g.slot for g in sampled] == [0, 1, 2] and [g.slot for g in reported][-1] == 0
    assert sorted(g.slot for g in reported) == [0, 1, 2]
    assert all(any(g is r for r in reported) for g in sampled)


def test_seeds_belong_to_the_step_and_the_slot(reads: VLMProcessor, make: Make) -> None:
    stub = stub_of("vllm", reads)
    engine = make(stub, processor=reads)
    groups = groups_of(reads)
    engine.sample(groups, 2, SAMPLING, (0, 7))
    engine.sample(groups[::-1], 2, SAMPLING, (0, 7))
    seeds = [r.payload["sampling_params"]["seed"] for r in stub.requests]
    assert sorted(seeds[:3]) == sorted(seeds[3:]) == sorted(group_seed((0, 7), slot) for slot in range(3))
    different = {group_seed(seed, slot) for seed in [(0, 7), (0, 8), (1, 7)] for slot in range(100)}
    assert len(different) == 300 and all(0 <= seed < 2**31 for seed in different)


def test_vision_tokens_and_padding_of_the_head_are_suppressed(sees: VLMProcessor, make: Make) -> None:
    n_ids = len(sees.tokenizer)
    stub = stub_of("vllm", sees)
    make(stub, processor=sees)
    with ServerEngine(RolloutServerConfig(urls=[stub.url], model="teacher"), sees, n_ids + 3) as engine:
        engine.sample(groups_of(sees, (1,)), 1, SAMPLING, (0,))
    sent = {int(token) for token in stub.requests[0].payload["sampling_params"]["logit_bias"]}
    assert sent == {*sees.suppress_token_ids(), n_ids, n_ids + 1, n_ids + 2}


def test_a_row_with_images_names_the_kinds_that_take_them(sees: VLMProcessor, make: Make) -> None:
    engine = make(stub_of("vllm_text", sees), processor=sees)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2 .*rollout\.server\.kind=vllm"):
        engine.sample(groups_of(sees, (0, 1)), 1, SAMPLING, (0,))
    assert len(engine.sample(groups_of(sees, (0, 0)), 1, SAMPLING, (0,))) == 2


# ---- faults ------------------------------------------------------------------------------------------------------


def sample_cases(*effects: Any) -> list[tuple[str, str]]:
    having = {"vllm": ("images",), "sglang": ("images",)}
    return [
        (kind, name)
        for kind in KINDS
        for effect in effects
        for name in names(effect, kind, "sample", "batch", *having.get(kind, ()))
    ]


@pytest.fixture(scope="module")
def rightly(batch: Batch) -> Callable[[str, bool], dict[int, list[Any]]]:
    """What servers answer of which nothing goes wrong."""

    @cache
    def rightly(kind: str, first_stops: bool) -> dict[int, list[Any]]:
        processor, groups = batch(kind)
        with stub_of(kind, processor, first_stops=first_stops) as stub:
            settings = {"kind": kind, "urls": [stub.url], "model": "teacher", "sync": "never"}
            with ServerEngine(RolloutServerConfig.model_validate(settings), processor) as engine:
                return found(engine.sample(groups, 2, SAMPLING, (0,)))

    return rightly


@pytest.mark.parametrize(("kind", "name"), sample_cases("refuse", "either", "harmless", "error"))
def test_a_fault_never_makes_a_wrong_rollout(
    kind: str, name: str, batch: Batch, make: Make, rightly: Callable[[str, bool], dict[int, list[Any]]]
) -> None:
    """One request goes wrong: what it still gives is right, what it does not is counted, the others are unharmed."""
    processor, groups = batch(kind)
    options = {"first_stops": name not in ("too_long", "cut_short")}
    expected = rightly(kind, options["first_stops"])
    faults = Faults(schedule={1: name})
    stub = stub_of(kind, processor, **options, faults=faults)
    stub.teacher.weights.version = "0"
    engine = make(stub, processor=processor, concurrency=1)
    engine.synced = True
    # one request after another: call 1 is the second group, which has pictures where the fault needs some
    order = groups if FAULTS[name].needs != "images" else [groups[1], groups[0], groups[2]]
    sampled = engine.sample(order, 2, SAMPLING, (0,))
    hit = order[1].slot
    assert stub.applied == [(1, name)]
    got = found(sampled)
    missing = 0
    for slot, answers in expected.items():
        kept = got.get(slot, [])
        assert all(answer in answers for answer in kept) and (slot == hit or kept == answers)
        missing += len(answers) - len(kept)
    assert len(engine.failed) == missing and all(g.rollouts for g in sampled)
    if FAULTS[name].effect in ("refuse", "error"):
        assert missing > 0
    if FAULTS[name].effect == "harmless":
        assert missing == 0


@pytest.mark.parametrize("name", ["http_503", "timeout", "truncated_json"])
def test_a_connection_that_fails_costs_nothing(name: str, batch: Batch, make: Make) -> None:
    processor, groups = batch("vllm")
    stub = stub_of("vllm", processor, faults=Faults(schedule={1: name}, hang_s=0.3))
    sampled = make(stub, processor=processor, retries=2).sample(groups, 2, SAMPLING, (0,))
    assert [len(g.rollouts) for g in sampled] == [2, 2, 2] and stub.applied == [(1, name)]


def test_a_group_without_any_answer_is_left_out_and_not_reported(reads: VLMProcessor, make: Make) -> None:
    stub = stub_of("vllm", reads, faults=Faults(schedule={0: "http_400"}))
    engine = make(stub, processor=reads, concurrency=1)
    reported: list[Group] = []
    sampled = engine.sample(groups_of(reads), 2, SAMPLING, (0,), finished=reported.extend)
    assert [g.slot for g in sampled] == [g.slot for g in reported] == [1, 2]
    assert len(engine.failed) == 2 and all("400" in reason for reason in engine.failed)
    engine.sample(groups_of(reads), 2, SAMPLING, (0,))
    assert engine.failed == []


def test_too_many_failures_stop_with_the_commonest_reason(reads: VLMProcessor, make: Make) -> None:
    stub = stub_of("vllm", reads, faults=Faults(("answer_nan",)))
    groups = groups_of(reads)
    assert len(make(stub, processor=reads, max_failed_share=0.5).sample(groups, 2, SAMPLING, (0,))) == 3
    with pytest.raises(EngineError, match=r"(?s)max_failed_share=0\.3.*\d x value 1 is nan"):
        make(stub, processor=reads, max_failed_share=0.3).sample(groups, 2, SAMPLING, (0,))


def test_dead_servers_stop_with_how_to_start_one(reads: VLMProcessor, make: Make) -> None:
    stub = stub_of("vllm", reads)
    engine = make(stub, processor=reads, max_failed_share=0.1, retries=0)
    stub.close()
    with pytest.raises(EngineError, match=r"vllm serve MODEL --enable-scale-out"):
        engine.sample(groups_of(reads), 2, SAMPLING, (0,))


# ---- connecting --------------------------------------------------------------------------------------------------


def test_connecting_finds_the_model_and_that_pictures_expand_alike(sees: VLMProcessor, make: Make) -> None:
    for kind in ("vllm", "sglang"):
        engine = make(stub_of(kind, sees, model="student"), processor=sees)
        engine.connect()
        assert engine.model == "student" and "student" in engine.report
        faulty = stub_of(kind, sees, faults=Faults(schedule={1: "wrong_expansion"}))
        with pytest.raises(ConfigError, match="a picture"):
            make(faulty, processor=sees).connect()


def test_a_server_that_cannot_sample_is_refused_at_the_start(reads: VLMProcessor, make: Make) -> None:
    stub = stub_of("vllm", reads, faults=Faults(schedule={0: "scale_out_off"}))
    with pytest.raises(ConfigError, match=r"rollout\.server: .*--enable-scale-out"):
        make(stub, processor=reads).connect()
    with pytest.raises(ConfigError, match=r"Type rollout\.server\.model=student"):
        make(stub_of("vllm", reads, model="student"), processor=reads, model="other").connect()


# ---- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm", "vllm_text", "sglang"])
def test_every_server_loads_the_weights_and_forgets_what_it_computed(
    kind: str, reads: VLMProcessor, make: Make
) -> None:
    loaded: list[tuple[str, str | None]] = []
    stubs = [stub_of(kind, reads, dev_mode=True, on_load=lambda *told: loaded.append(told)) for _ in range(2)]
    engine = make(*stubs, processor=reads)
    engine.load_weights("/disk/weights_12", 12)
    assert loaded == [("/disk/weights_12", "12" if kind == "sglang" else None)] * 2
    assert (engine.weight_version, engine.synced) == (12, True)
    for stub in stubs:
        paths = [r.path.partition("?")[0] for r in stub.requests]
        if kind == "sglang":
            assert paths == ["/update_weights_from_disk"] and stub.requests[0].payload["flush_cache"] is True
        else:
            # the encoder cache right behind the weights: what is asked between the two brings vLLM down
            assert paths[:2] == ["/collective_rpc", "/reset_encoder_cache"]
            assert set(paths[2:]) == {"/reset_mm_cache", "/reset_prefix_cache", "/update_weight_version"}
        assert stub.teacher.weights.version == "12"
    sampled = engine.sample(groups_of(reads), 2, SAMPLING, (0,))
    assert {g.weight_version for g in sampled} == {12} and engine.failed == []


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_answers_of_a_server_that_was_started_again_are_refused(
    kind: str, reads: VLMProcessor, make: Make
) -> None:
    stub = stub_of(kind, reads, dev_mode=True)
    engine = make(stub, processor=reads)
    assert (
        len(engine.sample(groups_of(reads), 2, SAMPLING, (0,))) == 3
    )  # nothing was loaded: nothing is expected
    engine.load_weights("/disk", 4)
    stub.teacher.weights.version = "default"
    assert engine.sample(groups_of(reads), 2, SAMPLING, (0,)) == []
    assert len(engine.failed) == 6 and "'default', not by those of step 4" in engine.failed[0]


def test_a_server_without_the_routes_says_how_to_start_it(reads: VLMProcessor, make: Make) -> None:
    stubs = [stub_of("vllm", reads, dev_mode=on) for on in (True, False)]
    engine = make(*stubs, processor=reads)
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1") as told:
        engine.load_weights("/disk", 1)
    assert stubs[1].url in str(told.value) and f"  {stubs[0].url}" not in str(told.value)
    assert (engine.weight_version, engine.synced) == (0, False)


def test_a_server_too_old_to_be_told_a_version_is_good_enough(
    reads: VLMProcessor, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = stub_of("vllm", reads, dev_mode=True)
    route = stub._route

    def older(request: Any, fault: str | None) -> Any:
        return route(replace(request, path=request.path.replace("/update_weight_version", "/nothing")), fault)

    monkeypatch.setattr(stub, "_route", older)
    engine = make(stub, processor=reads)
    engine.load_weights("/disk", 1)
    assert engine.weight_version == 1


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_folder_that_a_server_cannot_read_says_what_to_type(
    kind: str, reads: VLMProcessor, make: Make
) -> None:
    def on_load(folder: str, version: str | None) -> None:
        raise FileNotFoundError(folder)

    stub = stub_of(kind, reads, dev_mode=True, on_load=on_load)
    engine = make(stub, processor=reads)
    with pytest.raises(EngineError, match=r"(?s)/disk/1.*FileNotFoundError.*rollout\.server\.sync_folder"):
        engine.load_weights("/disk/1", 1)
    assert len(stub.requests) == 1  # no further order to a server that failed
    stub.errors.clear()


def test_an_order_is_given_again_when_the_connection_breaks_off(reads: VLMProcessor, make: Make) -> None:
    stub = stub_of("vllm", reads, dev_mode=True, faults=Faults(schedule={0: "reset"}))
    make(stub, processor=reads).load_weights("/disk", 1)
    assert [r.path for r in stub.requests][:3] == [
        "/collective_rpc",
        "/collective_rpc",
        "/reset_encoder_cache",
    ]
    failing = stub_of("vllm", reads, dev_mode=True, faults=Faults(schedule={0: "http_503"}))
    with pytest.raises(EngineError, match="still loading"):
        make(failing, processor=reads).load_weights("/disk", 1)


def test_a_load_that_is_answered_without_success_failed(
    reads: VLMProcessor, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = stub_of("sglang", reads)
    monkeypatch.setattr(stub, "_route", lambda *_: {"success": False, "message": "shapes differ"})
    with pytest.raises(EngineError, match="shapes differ"):
        make(stub, processor=reads).load_weights("/disk", 1)


# ---- the engine in process ---------------------------------------------------------------------------------------


def test_the_local_engine_reports_each_group_once_and_early_ones_early(
    tiny_models: Mapping[str, Path],
) -> None:
    """Also across batches; the same rollouts as without anybody listening."""
    model = load(tiny_models["llava"])
    engine = LocalEngine(model, concurrent_rollouts=6)
    groups = groups_of(model.processor, (0, 1, 0, 0))
    # so many stop tokens that groups end at different times
    sampling = SamplingConfig(
        max_new_tokens=40, stop_token_ids=list(range(0, len(model.processor.tokenizer), 9))
    )
    reported: list[list[int]] = []
    seen: dict[int, Group] = {}

    def finished(done: list[Group]) -> None:
        reported.append([g.slot for g in done])
        seen.update((g.slot, g) for g in done)

    sampled = engine.sample(groups, 2, sampling, (0,), finished=finished)
    assert sorted(slot for step in reported for slot in step) == [0, 1, 2, 3] and len(reported) > 2
    assert all(seen[g.slot] is g for g in sampled)
    assert found(sampled) == found(engine.sample(groups, 2, sampling, (0,)))
    longest = {g.slot: max(len(r.response_ids) for r in g.rollouts) for g in sampled}
    first_batch = [slot for step in reported for slot in step][:3]
    assert [longest[s] for s in first_batch] == sorted(longest[s] for s in first_batch)
