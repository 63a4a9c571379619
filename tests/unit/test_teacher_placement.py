"""Where a teacher's weights live, and when a teacher behind servers begins."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import rooms
import torch

from uniopd_mm.config import TeacherConfig, TrainConfig
from uniopd_mm.distributed import World
from uniopd_mm.teachers import LocalTeacher, RemoteTeacher, TeacherServer
from uniopd_mm.teachers.loading import open_teachers
from uniopd_mm.teachers.local import moved
from uniopd_mm.testing import StubServer

WORLD = World(0, 1, 0, torch.device("cpu"))


def recipe(model: Path, **teachers: dict) -> TrainConfig:
    settings = {"out": "unused", "steps": 1, "student": {"model": str(model)}, "data": {"train": "unused"}}
    teachers = {name: {"model": str(model), "dtype": "float32", **t} for name, t in teachers.items()}
    return TrainConfig.model_validate({**settings, "teachers": teachers})


def test_teachers_of_one_checkpoint_share_their_weights(tiny_models: dict[str, Path]) -> None:
    config = recipe(tiny_models["text"], a={"domains": ["a"]}, b={"domains": ["b"]}, c={"dtype": "bfloat16"})
    with ExitStack() as stack:
        teachers = open_teachers(config, WORLD, stack).teachers
    assert teachers["a"].model is teachers["b"].model and teachers["c"].model is not teachers["a"].model


def test_on_a_machine_without_a_gpu_all_places_are_the_same(tiny_models: dict[str, Path]) -> None:
    config = recipe(
        tiny_models["text"], a={"domains": ["a"], "device": "swap"}, b={"domains": ["b"], "device": "cpu"}
    )
    student = rooms.load(tiny_models["text"])
    groups = rooms.sample(student, rooms.make_groups(student, (0,)), n=2)
    with ExitStack() as stack:
        teachers = open_teachers(config, WORLD, stack).teachers
        scored = [t.score(groups)[0].rollouts for t in teachers.values()]
    for swapped, resting in zip(*scored, strict=True):
        assert swapped.scored.all() and torch.equal(swapped.teacher_logprobs, resting.teacher_logprobs)


@pytest.mark.gpu
def test_weights_are_on_the_gpu_only_while_they_are_needed_there(tiny_models: dict[str, Path]) -> None:
    model = rooms.load(tiny_models["llava"])
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(RuntimeError, match="on the way"), moved(model, torch.device("cuda")):
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
        raise RuntimeError("on the way")
    assert {name: t.data_ptr() for name, t in model.state_dict(keep_vars=True).items()} == before


@pytest.mark.gpu
def test_a_swapped_teacher_scores_as_one_that_stays(tiny_models: dict[str, Path]) -> None:
    model = rooms.load(tiny_models["llava"])
    groups = rooms.sample(model, rooms.make_groups(model, (1, 0)), n=2)
    expected = rooms.make_teacher(model, model).score(groups)
    settings = TeacherConfig(model="unused", device="swap")
    teacher = LocalTeacher("t", settings, model, model.processor, device=torch.device("cuda"))
    found = teacher.score(groups)
    assert model.device.type == "cpu"
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours.rollouts, theirs.rollouts, strict=True):
            torch.testing.assert_close(a.teacher_logprobs, b.teacher_logprobs, atol=1e-4, rtol=0)


def test_a_server_scores_groups_while_others_are_still_sampled(tiny_models: dict[str, Path]) -> None:
    student = rooms.load(tiny_models["text"])
    groups = rooms.sample(student, rooms.make_groups(student, (0, 0)), n=2)
    arrived = threading.Event()

    def score(ids: list[int], images: list) -> list[float]:
        arrived.set()
        return [-2.0 - 0.1 * (token % 5) for token in ids[1:]]

    with StubServer("vllm_text", score) as stub:
        settings = TeacherConfig.model_validate(
            {"model": "unused", "server": {"kind": "vllm_text", "urls": [stub.url], "model": "teacher"}}
        )
        with TeacherServer("far", settings, student.processor) as server:
            teacher = RemoteTeacher("far", settings, server, student.processor)
            teacher.start(groups[:1])
            assert arrived.wait(20)  # nobody has asked for a result yet
            # What becomes known of the rollouts in between is kept.
            known = [rooms.fill([g], "text", ["a", "b"])[0] for g in groups]
            scored = teacher.score(known)
            assert len(stub.requests) == 4  # each rollout once
            expected = RemoteTeacher("far", settings, server, student.processor).score(groups)
    for ours, theirs in zip(scored, expected, strict=True):
        assert [r.text for r in ours.rollouts] == ["a", "b"]
        for a, b in zip(ours.rollouts, theirs.rollouts, strict=True):
            assert torch.equal(a.teacher_logprobs, b.teacher_logprobs) and a.scored.all()
