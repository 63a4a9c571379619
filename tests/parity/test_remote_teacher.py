"""A teacher behind a server gives the numbers that the same weights give in the process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rooms import build, load, make_groups, make_teacher, sample

from uniopd_mm.config import TeacherConfig
from uniopd_mm.errors import ConfigError
from uniopd_mm.models import MultimodalLM
from uniopd_mm.rollout import Group
from uniopd_mm.teachers import LocalTeacher, RemoteTeacher, TeacherServer
from uniopd_mm.teachers.base import reason_class
from uniopd_mm.testing import FAULTS, Faults, StubServer, names


class Served:
    """A tiny model as a stub server's ``score`` and ``expand``: one unpadded forward pass of the stock model."""

    def __init__(self, teacher: LocalTeacher, groups: Sequence[Group] = ()) -> None:
        self.model: MultimodalLM = teacher.model
        encoded = [teacher.encode(g) for g in groups]
        self.expansions = [(e.collapsed_ids.tolist(), e.input_ids.tolist()) for e in encoded if e.image_spans]

    def score(self, ids: list[int], images: list[Any]) -> list[float]:
        """log p of ids[1:], each given the ids before it."""
        return self.distribution(ids, images).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    def distribution(self, ids: list[int], images: list[Any]) -> torch.Tensor:
        """[P-1, V] log p of every id."""
        processor = self.model.processor
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "-"}]
        input_ids = torch.tensor(ids)
        encoded = processor.encode([{"role": "user", "content": content}], images)
        vision = {k: v for k, v in encoded.model_inputs.items() if k not in processor.token_inputs}
        model_inputs = {**vision, **processor.make_token_inputs(input_ids)}
        inputs = self.model.collate([replace(encoded, input_ids=input_ids, model_inputs=model_inputs)])
        if hasattr(self.model.transformer.base_model, "rope_deltas"):
            self.model.transformer.base_model.rope_deltas = None
        with torch.no_grad():
            logits = self.model.transformer(**inputs, use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1)

    def expand(self, ids: list[int], n_images: int) -> list[int]:
        """A known prompt as its processor expands it; else 16 tokens an image, as the tiny LLaVA."""
        for collapsed, expanded in self.expansions:
            if ids[: len(collapsed)] == collapsed:
                return expanded + ids[len(collapsed) :]
        marker = self.model.processor.image_token_id
        return [token for i in ids for token in ([i] * 16 if i == marker else [i])]


def connect_to(stub: StubServer, local: LocalTeacher, **settings: Any) -> TeacherServer:
    server = {"kind": stub.kind, "urls": [stub.url], "model": "teacher", "timeout_s": 20, **settings}
    config = local.settings.model_copy(update={"dtype": "float32"}).model_dump() | {"server": server}
    return TeacherServer(local.name, TeacherConfig.model_validate(config), local.processor)


def score_remotely(
    stub: StubServer, local: LocalTeacher, student: MultimodalLM, groups: list[Group], **settings
):
    with connect_to(stub, local, **settings) as server:
        return RemoteTeacher(local.name, server.settings, server, student.processor).score(groups)


def rollouts_of(groups: list[Group]) -> list[Any]:
    return [r for g in groups for r in g.rollouts]


def stub_of(kind: str, served: Served, **options: Any) -> StubServer:
    if served.model.processor.sees_images:
        options["marker"] = served.model.processor.image_token_id
    if kind == "openai":  # asks for the likeliest token as well
        options |= {"distribution": served.distribution, "vocab_size": served.model.text_config.vocab_size}
    return StubServer(kind, served.score, expand=served.expand, **options)


@pytest.mark.parametrize(
    ("kind", "family", "view"),
    [
        ("vllm", "llava", None),
        ("sglang", "qwen2_5_vl", None),
        ("sglang", "llava", "text"),
        ("vllm_text", "text", None),
        ("openai", "text", None),
        ("vllm", "other tokens", None),
        ("openai", "other tokens", None),
    ],
)
def test_a_served_teacher_scores_as_the_local_one(
    kind: str, family: str, view: str | None, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    student = load(tiny_models["llava"])
    if family == "other tokens":
        folder = tiny.build_text(tmp_path, seed=5, tokenizer=tiny.make_tokenizer(400, seed=3))
    else:
        folder = build(family, tmp_path, seed=5)
    local = make_teacher(load(folder), student, view=view)
    groups = sample(student, make_groups(student, (0, 1, 2)), n=2)
    expected = local.score(groups)
    served = Served(local, groups)
    with stub_of(kind, served) as stub:
        found = score_remotely(stub, local, student, groups)
    assert len(stub.requests) == sum(len(a.teacher_ids) > 0 for g in groups for a in local.begin(g).aligned)
    for one, other in zip(rollouts_of(expected), rollouts_of(found), strict=True):
        assert torch.equal(one.scored, other.scored) and one.scored.any()
        assert torch.allclose(one.teacher_logprobs, other.teacher_logprobs, atol=1e-5)
        assert other.teacher == "t" and other.unscored_reason == ""


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_faults_leave_only_their_own_rollouts_unscored(kind: str, tiny_models: dict[str, Path]) -> None:
    student = load(tiny_models["llava"])
    local = make_teacher(student, student)
    groups = sample(student, make_groups(student, (1, 0, 1, 2)), n=8)
    whole = rollouts_of(local.score(groups))
    served = Served(local, groups)
    retried = ("http_500", "reset", "timeout", "truncated_json", "http_429")
    kinds = (*retried, *names("refuse", kind), *names("harmless", kind), "http_400")
    faults = Faults(share=0.3, kinds=kinds, seed=1, hang_s=3)
    with stub_of(kind, served, faults=faults) as stub:
        scored = score_remotely(stub, local, student, groups, retries=6, timeout_s=2, concurrency=8)
    applied = dict(stub.applied)
    assert len({FAULTS[name].effect for name in applied.values()}) >= 3
    sent = "token_ids" if kind == "vllm" else "input_ids"
    doomed = {
        tuple(r.payload[sent]) for r in stub.requests if spoils(applied.get(r.call))
    }  # their answer came and could not be used
    assert doomed
    at = 0
    for group in scored:
        collapsed = local.encode(group).collapsed_ids.tolist()
        for rollout in group.rollouts:
            reference, at = whole[at], at + 1
            if (*collapsed, *rollout.response_ids.tolist()) in doomed:
                assert not rollout.scored.any() and reason_class(rollout.unscored_reason) in (
                    "reply",
                    "server",
                )
            else:
                assert rollout.unscored_reason == ""
                assert torch.allclose(rollout.teacher_logprobs, reference.teacher_logprobs, atol=1e-5)


def spoils(fault: str | None) -> bool:
    return fault is not None and FAULTS[fault].effect in ("refuse", "error")


@pytest.mark.parametrize(
    ("kind", "family"), [("vllm", "llava"), ("sglang", "llava"), ("vllm_text", "text"), ("openai", "text")]
)
def test_a_server_that_scores_rightly_passes_the_probe(
    kind: str, family: str, tiny_models: dict[str, Path]
) -> None:
    local = make_teacher(load(tiny_models[family]), load(tiny_models["llava"]))
    with stub_of(kind, Served(local)) as stub, connect_to(stub, local, model=None) as server:
        server.connect()
        assert server.model == "teacher" and f"{kind} at {stub.url} serves teacher" in server.report
        assert ("images of 16 and 16 tokens" in server.report) == (family == "llava")


@pytest.mark.parametrize("kind", ["transformers_serve", "llama_cpp"])
def test_servers_that_cannot_score_are_refused(kind: str, tiny_models: dict[str, Path]) -> None:
    local = make_teacher(load(tiny_models["text"]), load(tiny_models["llava"]))
    with (
        StubServer(kind, Served(local).score) as stub,
        connect_to(stub, local, kind="openai") as server,
        pytest.raises(ConfigError, match=r"teachers.t.server: http.*no usable answer: server: POST"),
    ):
        server.connect()


def behind_itself(score):
    """log p(token j | tokens up to and with j), looked up one position late."""

    def late(ids: list[int], images: list[Any]) -> list[float]:
        return [score([*ids[: j + 1], ids[j]], images)[-1] for j in range(1, len(ids))]

    return late


def early(score):
    return lambda ids, images: [*score(ids, images)[1:], -1.0]


def late(score):
    return lambda ids, images: [-1.0, *score(ids, images)[:-1]]


@pytest.mark.parametrize(
    ("shift", "message"), [(behind_itself, "more than 1"), (early, "early by one"), (late, "late by one")]
)
def test_values_shifted_by_one_do_not_pass_the_probe(shift, message: str, tmp_path: Path) -> None:
    teacher = load(tiny.build_text(tmp_path, tie=True))
    with (
        torch.no_grad()
    ):  # tied and large: a model that thinks each token likely to come again, as one that copies
        teacher.transformer.get_input_embeddings().weight.mul_(4)
    local = make_teacher(teacher, teacher)
    with (
        StubServer("vllm", shift(Served(local).score)) as stub,
        connect_to(stub, local) as server,
        pytest.raises(ConfigError, match=message),
    ):
        server.connect()
    with StubServer("vllm", Served(local).score) as stub, connect_to(stub, local) as server:
        server.connect()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("values_shifted", "early by one"),
        ("null_scores", "no usable answer: reply: "),
        ("wrong_expansion", "after an image of 64 x 48 pixels, no usable answer: "),
        ("images_ignored", "after an image of 64 x 48 pixels"),
        ("scale_out_off", "--enable-scale-out"),
    ],
)
def test_a_server_that_is_wrong_throughout_is_refused_with_what_to_type(
    fault: str, message: str, tiny_models: dict[str, Path]
) -> None:
    local = make_teacher(load(tiny_models["llava"]), load(tiny_models["llava"]))
    with (
        stub_of("vllm", Served(local), faults=Faults(kinds=(fault,))) as stub,
        connect_to(stub, local) as server,
        pytest.raises(ConfigError, match=message) as raised,
    ):
        server.connect()
    assert f"teachers.t.server: {stub.url}" in str(raised.value)


def test_a_server_that_does_not_look_at_pictures_is_refused(tiny_models: dict[str, Path]) -> None:
    local = make_teacher(load(tiny_models["llava"]), load(tiny_models["llava"]))
    served = Served(local)

    def blind(ids: list[int], images: list[Any]) -> list[float]:
        return served.score(ids, [image.point(lambda _: 0) for image in images])

    with (
        StubServer("vllm", blind, expand=served.expand) as stub,
        connect_to(stub, local) as server,
        pytest.raises(ConfigError, match="does not look at it"),
    ):
        server.connect()
