"""A real vLLM as rollout engine: it samples what the model in this process would, and takes new weights while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import rooms
import tiny
import torch

from uniopd_mm.config import RolloutServerConfig, SamplingConfig
from uniopd_mm.engines import LocalEngine, ServerEngine, encode_groups
from uniopd_mm.models import MultimodalLM
from uniopd_mm.rollout import Group, Prompt

if TYPE_CHECKING:
    from conftest import Served

pytestmark = pytest.mark.servers

TOLERANCE = 1e-4
"""Nats, two implementations of one model in float32."""
N = 3
SIZES = ((84, 56), (112, 84))
"""Width and height in pixels: whole tokens of 28 x 28, so that nobody resizes them."""

Connect = Callable[..., ServerEngine]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes engines; servers that were given other weights have their own again afterwards."""
    with ExitStack() as stack:

        def make(served: Served, model: MultimodalLM, **settings: Any) -> ServerEngine:
            server = RolloutServerConfig.model_validate({"urls": [served.url], "retries": 0, **settings})
            rows = model.transformer.get_output_embeddings().out_features
            engine = stack.enter_context(ServerEngine(server, model.processor, rows))
            engine.connect()
            stack.callback(engine.load_weights, str(served.folder), 0)
            return engine

        yield make


def _long_text() -> Prompt:
    """Longer than the blocks of 128 tokens whose keys and values vLLM keeps for the next prompt that begins so."""
    content = [{"type": "text", "text": "red green blue " * 60}]
    return replace(rooms.make_prompt(0), messages=({"role": "user", "content": content},))


def _groups(model: MultimodalLM, with_images: bool) -> list[Group]:
    prompts = [rooms.make_prompt(0, seed=1), _long_text()]
    if with_images:
        for n in (1, 2):
            images = tuple(tiny.random_image(*size, seed=n + i) for i, size in enumerate(SIZES[:n]))
            prompts.append(replace(rooms.make_prompt(n, seed=n), images=images))
    return encode_groups([(i, p, p.images) for i, p in enumerate(prompts)], model.processor)


def _largest_difference(model: MultimodalLM, groups: list[Group]) -> list[float]:
    """Nats, for each group: between what the server says of its samples and what ``model`` says of them."""
    return [
        max(
            float((rooms.plain_logprobs(model, g, r.response_ids) - r.sampler_logprobs).abs().max())
            for r in g.rollouts
        )
        for g in groups
    ]


@pytest.mark.parametrize("kind", ["vllm", "vllm_text"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.01}])
def test_a_text_server_samples_from_the_model(
    vllm_text: Served, connect: Connect, kind: str, settings: dict[str, Any]
) -> None:
    _samples_from_the_model(vllm_text, connect, SamplingConfig(max_new_tokens=10, **settings), kind=kind)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.01}])
def test_a_server_that_sees_samples_from_the_model(
    vllm_image: Served, connect: Connect, settings: dict[str, Any]
) -> None:
    _samples_from_the_model(vllm_image, connect, SamplingConfig(max_new_tokens=10, **settings))


def _samples_from_the_model(
    served: Served, connect: Connect, sampling: SamplingConfig, kind: str = "vllm"
) -> None:
    """The log-probabilities are the model's own at the temperature that the engine names."""
    model = rooms.load(served.folder)
    engine = connect(served, model, kind=kind)
    assert engine.logprob_temperature(sampling) == 1
    groups = _groups(model, with_images=model.processor.sees_images)
    sampled = engine.sample(groups, N, sampling, (0,))
    assert [g.slot for g in sampled] == [g.slot for g in groups] and not engine.failed
    assert all(len(g.rollouts) == N for g in sampled)
    assert len({tuple(r.response_ids.tolist()) for g in sampled for r in g.rollouts}) == N * len(groups)
    assert max(_largest_difference(model, sampled)) < TOLERANCE


def test_a_seed_gives_the_same_answers_again(vllm_image: Served, connect: Connect) -> None:
    model = rooms.load(vllm_image.folder)
    engine, groups = connect(vllm_image, model), _groups(model, with_images=True)

    def ids(seed: int) -> list[list[int]]:
        sampled = engine.sample(groups, N, SamplingConfig(max_new_tokens=10), (seed,))
        return [r.response_ids.tolist() for g in sampled for r in g.rollouts]

    assert ids(1) == ids(1) != ids(2)


def test_greedy_answers_are_those_of_this_process(vllm_image: Served, connect: Connect) -> None:
    model = rooms.load(vllm_image.folder)
    groups, sampling = _groups(model, with_images=True), SamplingConfig(temperature=0, max_new_tokens=10)
    ours = LocalEngine(model).sample(groups, 2, sampling, (0,))
    theirs = connect(vllm_image, model).sample(groups, 2, sampling, (0,))
    for group, expected in zip(theirs, ours, strict=True):
        for rollout, wanted in zip(group.rollouts, expected.rollouts, strict=True):
            assert rollout.response_ids.tolist() == wanted.response_ids.tolist()


def test_vision_tokens_are_never_sampled(vllm_image: Served, connect: Connect) -> None:
    """By chance about one token in a hundred would be one."""
    model = rooms.load(vllm_image.folder)
    engine = connect(vllm_image, model, max_failed_share=0)  # the engine refuses answers that hold one
    groups = _groups(model, with_images=True)
    sampled = engine.sample(groups, 4, SamplingConfig(max_new_tokens=50, temperature=1.5), (0,))
    ids = torch.cat([r.response_ids for g in sampled for r in g.rollouts])
    assert len(ids) > 400
    assert not torch.isin(ids, LocalEngine(model).suppressed).any()


def test_answers_end_with_the_first_stop_token(vllm_image: Served, connect: Connect) -> None:
    model = rooms.load(vllm_image.folder)
    stops = list(range(8, 512, 8))
    sampling = SamplingConfig(max_new_tokens=10, stop_token_ids=stops)
    sampled = connect(vllm_image, model).sample(_groups(model, with_images=True), N, sampling, (0,))
    rollouts = [r for g in sampled for r in g.rollouts]
    assert {r.finish for r in rollouts} == {"stop", "length"}
    ends = torch.tensor([*stops, *model.processor.stop_token_ids()])
    for rollout in rollouts:
        is_end = torch.isin(rollout.response_ids, ends)
        assert not is_end[:-1].any()
        assert bool(is_end[-1]) if rollout.finish == "stop" else len(is_end) == 10


def _other_weights(model: MultimodalLM, folder: Path) -> Path:
    """The same model with new random weights in all its parts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for parameter in model.transformer.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.08)
    model.transformer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("served", ["vllm_text", "vllm_image"])
def test_a_server_has_the_weights_it_was_given(
    served: str, connect: Connect, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Also for a picture and the beginning of a prompt whose features, keys and values it has kept."""
    server: Served = request.getfixturevalue(served)
    old, new = rooms.load(server.folder), rooms.load(server.folder)
    engine = connect(server, old)
    groups, sampling = _groups(old, with_images=old.processor.sees_images), SamplingConfig(max_new_tokens=10)
    before = engine.sample(groups, N, sampling, (0,))
    assert {g.weight_version for g in before} == {0} and max(_largest_difference(old, before)) < TOLERANCE

    engine.load_weights(str(_other_weights(new, tmp_path / "weights")), 3)
    after = engine.sample(groups, N, sampling, (0,))
    assert {g.weight_version for g in after} == {3}
    assert max(_largest_difference(new, after)) < TOLERANCE
    assert min(_largest_difference(old, after)) > 0.1
