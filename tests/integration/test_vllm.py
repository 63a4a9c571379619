"""A real vLLM gives the log-probabilities that the same model gives in this process, on the prompt we mean."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import rooms
import tiny
import torch

from uniopd_mm.config import ServerConfig, TeacherConfig
from uniopd_mm.engines import encode_groups
from uniopd_mm.models import MultimodalLM
from uniopd_mm.rollout import Group, Prompt
from uniopd_mm.servers import WIRES, ReplyError, ScoreRequest, ServerError, ServerPool, VllmGenerate, png_uri
from uniopd_mm.teachers import RemoteTeacher, TeacherServer

if TYPE_CHECKING:
    from conftest import Served

pytestmark = pytest.mark.servers

TOLERANCE = 1e-4
"""Nats, two implementations of one model in float32."""
ON_THE_GRID = ((84, 56), (112, 84))
"""Width and height in pixels: whole tokens of 28 x 28, few and many enough, so that nobody resizes them."""


def _picture_prompt(sizes: tuple[tuple[int, int], ...], seed: int) -> Prompt:
    images = tuple(tiny.random_image(*size, seed=seed + i) for i, size in enumerate(sizes))
    return replace(rooms.make_prompt(len(sizes), seed), images=images)


def _groups(model: MultimodalLM, prompts: list[Prompt]) -> list[Group]:
    return encode_groups([(i, p, p.images) for i, p in enumerate(prompts)], model.processor)


def _responses(model: MultimodalLM, group: Group) -> list[torch.Tensor]:
    """What the model samples, and tokens at random that it finds unlikely, the last of the vocabulary among them."""
    (sampled,) = rooms.sample(model, [group], n=2)
    last = len(model.processor.tokenizer) - 1
    drawn = torch.randint(20, last, (12,), generator=torch.Generator().manual_seed(group.slot))
    return [*(r.response_ids for r in sampled.rollouts), torch.cat([drawn, torch.tensor([last])])]


def _asked(group: Group, response_ids: torch.Tensor) -> ScoreRequest:
    encoded = group.encoded
    return ScoreRequest(
        encoded.collapsed_ids.tolist(),
        encoded.input_ids.tolist(),
        response_ids.tolist(),
        tuple(map(png_uri, group.images)),
    )


def _score(served: Served, kind: str, asked: ScoreRequest, sent: ScoreRequest | None = None) -> torch.Tensor:
    """The reply to ``sent``, or to ``asked``, read as a reply to ``asked``."""
    wire = WIRES[kind]()
    with ServerPool([served.url], retries=0) as pool:
        return wire.parse(pool.post(*wire.request(sent or asked, served.name)), asked)


@pytest.mark.parametrize("kind", ["vllm", "vllm_text", "openai"])
def test_a_text_teacher_scores_as_the_model_in_this_process(vllm_text: Served, kind: str) -> None:
    model = rooms.load(vllm_text.folder)
    for group in _groups(model, [rooms.make_prompt(0, seed) for seed in range(3)]):
        for response_ids in _responses(model, group):
            expected = rooms.plain_logprobs(model, group, response_ids)
            found = _score(vllm_text, kind, _asked(group, response_ids))
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("sizes", [ON_THE_GRID[:1], ON_THE_GRID, ()], ids=["one", "two", "none"])
def test_a_teacher_that_sees_scores_as_the_model_in_this_process(vllm_image: Served, sizes: Any) -> None:
    model = rooms.load(vllm_image.folder)
    (group,) = _groups(model, [_picture_prompt(sizes, seed=1)])
    for response_ids in _responses(model, group):
        expected = rooms.plain_logprobs(model, group, response_ids)
        found = _score(vllm_image, "vllm", _asked(group, response_ids))
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_an_image_that_the_server_resizes_takes_the_tokens_that_our_processor_says(
    vllm_image: Served,
) -> None:
    """Pixels may differ a little (vLLM resizes with torchvision, we with Pillow); tokens may not."""
    model = rooms.load(vllm_image.folder)
    (group,) = _groups(model, [_picture_prompt(((100, 60),), seed=2)])
    for response_ids in _responses(model, group):
        expected = rooms.plain_logprobs(model, group, response_ids)
        found = _score(vllm_image, "vllm", _asked(group, response_ids))
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def _wrong_request(model: MultimodalLM, **wrong: Any) -> tuple[ScoreRequest, ScoreRequest]:
    """What we mean, and what goes out instead."""
    (group,) = _groups(model, [_picture_prompt(ON_THE_GRID, seed=3)])
    asked = _asked(group, _responses(model, group)[0])
    return asked, replace(asked, **{name: value(asked) for name, value in wrong.items()})


def test_an_expanded_prompt_sent_as_if_collapsed_is_refused(vllm_image: Served) -> None:
    """vLLM expands it once more and scores tokens that we do not mean."""
    asked, sent = _wrong_request(
        rooms.load(vllm_image.folder), collapsed_ids=lambda asked: asked.expanded_ids
    )
    with pytest.raises(ReplyError, match="prompt ids differ"):
        _score(vllm_image, "vllm", asked, sent)


def test_a_prompt_sent_without_its_images_is_refused(vllm_image: Served) -> None:
    """vLLM then takes the markers for ordinary tokens and scores a text."""
    asked, sent = _wrong_request(rooms.load(vllm_image.folder), images=lambda asked: ())
    with pytest.raises(ReplyError, match="prompt ids differ"):
        _score(vllm_image, "vllm", asked, sent)


def test_images_in_another_order_are_refused(vllm_image: Served) -> None:
    asked, sent = _wrong_request(rooms.load(vllm_image.folder), images=lambda asked: asked.images[::-1])
    with pytest.raises(ReplyError, match="prompt ids differ"):
        _score(vllm_image, "vllm", asked, sent)


def test_the_sparse_route_of_a_server_without_it_says_how_to_start_one(vllm_text: Served) -> None:
    """On a CPU vLLM has no Triton, hence not the model runner that scores chosen ids."""
    model = rooms.load(vllm_text.folder)
    (group,) = _groups(model, [rooms.make_prompt(0)])
    path, body = VllmGenerate(sparse=True).request(_asked(group, torch.tensor([20, 21])), vllm_text.name)
    with (
        ServerPool([vllm_text.url], retries=0) as pool,
        pytest.raises(ServerError, match="V2_MODEL_RUNNER=1"),
    ):
        pool.post(path, body)


def _remote_and_local_agree(served: Served, kind: str, prompts: list[Prompt]) -> None:
    """Both teachers score the same rollouts; the remote one has the model's folder only for its processor."""
    model = rooms.load(served.folder)
    groups = rooms.sample(model, _groups(model, prompts), n=3)
    local = rooms.make_teacher(model, model)
    settings = TeacherConfig(
        model=str(served.folder),
        dtype="float32",
        server=ServerConfig.model_validate({"kind": kind, "urls": [served.url]}),
    )
    with TeacherServer("remote", settings, model.processor) as server:
        server.connect()
        theirs = RemoteTeacher("remote", settings, server, model.processor).score(groups)
    for expected, found in zip(_rollouts(local.score(groups)), _rollouts(theirs), strict=True):
        assert expected.scored.any() and torch.equal(found.scored, expected.scored), found.unscored_reason
        torch.testing.assert_close(found.teacher_logprobs, expected.teacher_logprobs, atol=TOLERANCE, rtol=0)


def _rollouts(groups: list[Group]) -> list[Any]:
    return [rollout for group in groups for rollout in group.rollouts]


@pytest.mark.parametrize("kind", ["vllm", "vllm_text", "openai"])
def test_a_remote_text_teacher_fills_groups_as_a_local_one(vllm_text: Served, kind: str) -> None:
    _remote_and_local_agree(vllm_text, kind, [rooms.make_prompt(0, seed) for seed in range(3)])


@pytest.mark.parametrize("grid", [ON_THE_GRID, ((100, 60), (131, 97))], ids=["on the grid", "off the grid"])
def test_a_remote_teacher_that_sees_fills_groups_as_a_local_one(vllm_image: Served, grid: Any) -> None:
    """Pictures of any size: they are sent in the size that the model sees, so that the server need not resize them."""
    prompts = [_picture_prompt(sizes, seed) for seed, sizes in enumerate((grid, (), grid[1:]))]
    _remote_and_local_agree(vllm_image, "vllm", prompts)
