"""Teachers behind servers: settings, the model they serve, and what happens when they cannot score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rooms import make_prompt

from uniopd_mm.config import TeacherConfig, TrainConfig
from uniopd_mm.distributed import World
from uniopd_mm.errors import AlignmentError, ConfigError, ResumeError
from uniopd_mm.processors import get_processor
from uniopd_mm.rollout import Group, Rollout
from uniopd_mm.settings import load_config
from uniopd_mm.teachers import RemoteTeacher, TeacherError, TeacherPool, TeacherServer
from uniopd_mm.testing import Faults, StubServer
from uniopd_mm.training.metrics import rollout_metrics
from uniopd_mm.training.run import Run

WORLD = World(0, 1, 0, torch.device("cpu"))


def score(ids: list[int], images: list[Any]) -> list[float]:
    return [-4.0 - 0.1 * (token % 7) for token in ids[1:]]


@pytest.fixture(scope="module")
def processor(tiny_models: Mapping[str, Path]):
    return get_processor(tiny_models["text"])


@pytest.fixture
def make(processor):
    """A teacher of the given stub servers, with whose tokenizer the student's is the same."""
    servers = []

    def make(*stubs: StubServer, **settings: Any) -> RemoteTeacher:
        limits = {k: settings.pop(k) for k in ("max_unscored_share",) if k in settings}
        server = {"kind": stubs[0].kind, "urls": [s.url for s in stubs], "timeout_s": 20, **settings}
        config = TeacherConfig.model_validate({"model": "unused", "server": server, **limits})
        servers.append(TeacherServer("far", config, processor))
        return RemoteTeacher("far", config, servers[-1], processor)

    yield make
    for server in servers:
        server.close()


def groups_of(processor: Any, n_groups: int = 2, n: int = 4) -> list[Group]:
    groups = []
    for i in range(n_groups):
        prompt = make_prompt(0, seed=i)
        rollouts = []
        for k in range(n):
            ids = torch.tensor([40 + i, 50 + k, 60, processor.stop_token_ids()[0]])
            rollouts.append(
                Rollout(ids, torch.zeros(4), "stop", student_logprobs=torch.full((4,), -1.0 - k - i))
            )
        groups.append(Group(prompt, processor.encode(list(prompt.messages)), tuple(rollouts)))
    return groups


def test_every_rollout_is_its_own_request_and_answers_come_back_in_order(processor, make: Callable) -> None:
    groups = groups_of(processor, n_groups=3)
    done = []
    with StubServer("vllm", score) as one, StubServer("vllm", score, delay_s=0.02) as two:
        teacher = make(one, two, model="teacher")
        scored = teacher.score(groups, progress=done.append)
        assert len(one.requests) + len(two.requests) == 12 and one.requests and two.requests
    assert done == [1, 2, 3]
    for group in scored:
        prompt = group.encoded.input_ids.tolist()
        for rollout in group.rollouts:
            expected = score([*prompt, *rollout.response_ids.tolist()], [])[-4:]
            assert rollout.scored.all() and rollout.teacher == "far"
            assert torch.allclose(rollout.teacher_logprobs, torch.tensor(expected))


def test_few_unscored_rollouts_are_counted_and_many_stop_the_run(processor, make: Callable) -> None:
    groups = groups_of(processor)
    faults = Faults(schedule={0: "null_scores", 1: "http_400", 2: "one_id_changed"})
    for limit, stops in ((0.375, False), (0.37, True)):
        with StubServer("vllm", score, faults=faults) as stub:
            teacher = make(stub, model="teacher", max_unscored_share=limit, concurrency=1)
            pool = TeacherPool({"far": teacher.settings}, {"far": teacher}, WORLD)
            if stops:
                with pytest.raises(TeacherError) as raised:
                    pool.score(groups)
                continue
            scored = pool.score(groups)
    assert all(
        text in str(raised.value)
        for text in (
            "teacher 'far' left 3 of 8 rollouts (38%)",
            "max_unscored_share=0.37",
            "1 x reply: ",
            "HTTP 400",
        )
    )
    shares = rollout_metrics(scored, WORLD)
    assert shares["unscored/reply"] == 2 / 8 and shares["unscored/server"] == 1 / 8
    assert shares["rollout/scored_share"] == 5 / 8


def test_reasons_that_differ_in_numbers_alone_are_counted_together(processor, make: Callable) -> None:
    with StubServer("vllm", score, faults=Faults(kinds=("one_id_changed",))) as stub:
        teacher = make(stub, model="teacher")
        with pytest.raises(TeacherError, match=r"8 of 8 rollouts.*\n  8 x reply: response ids differ"):
            TeacherPool({"far": teacher.settings}, {"far": teacher}).score(groups_of(processor))


def test_the_limit_is_on_the_rollouts_of_all_ranks(processor, make: Callable) -> None:
    with StubServer("vllm", score, faults=Faults(kinds=("nan",))) as stub:
        teacher = make(stub, model="teacher")
        gather = lambda items: [*items, {("far", ""): 40}]  # noqa: E731  another rank, where all is well
        pool = TeacherPool(
            {"far": teacher.settings}, {"far": teacher}, SimpleNamespace(size=2, gather=gather)
        )
        assert not any(r.scored.any() for g in pool.score(groups_of(processor)) for r in g.rollouts)


def test_a_dead_server_leaves_rollouts_unscored_with_its_address(processor, make: Callable) -> None:
    with StubServer("vllm", score) as stub:
        teacher = make(stub, model="teacher", retries=0)
    rollout = teacher.score(groups_of(processor, 1, 1))[0].rollouts[0]
    assert not rollout.scored.any() and torch.equal(rollout.teacher_logprobs, torch.zeros(4))
    assert rollout.unscored_reason.startswith("server: ") and stub.url in rollout.unscored_reason


def test_a_text_only_server_is_never_given_images(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    with StubServer("vllm_text", score) as stub:
        teacher = make(stub)
        monkeypatch.setattr(teacher, "sees_images", True)
        assert teacher.messages(make_prompt(0))[1] is False
        with pytest.raises(AlignmentError, match=r"teachers.far.server.kind=vllm .*teachers.far.view=text"):
            teacher.messages(make_prompt(1))


def test_the_served_name_is_found_or_asked_for(make: Callable) -> None:
    with StubServer("vllm", score, model="a") as a, StubServer("vllm", score, model="b") as b:
        teacher = make(a)
        teacher.server.connect()
        assert teacher.server.model == "a" and "serves a; " in teacher.server.report
        with pytest.raises(ConfigError, match=r"serves a, not 'c'. Type teachers.far.server.model=a"):
            make(a, model="c").server.connect()
        with pytest.raises(ConfigError, match=r"several models.*Type teachers.far.server.model="):
            make(a, b).server.connect()
        with pytest.raises(ConfigError, match=f"{b.url} serves b, not 'a'"):
            make(a, b, model="a").server.connect()
    with pytest.raises(ConfigError, match=r"teachers.far.server: GET http.*cannot connect"):
        make(a, model="a").server.connect()


def test_vllm_scores_the_response_alone_where_all_servers_can(processor, make: Callable) -> None:
    """Asked for with prompt_logprob_token_ids; a server without the V2 model runner answers 400 to that."""
    old = Faults(kinds=("v2_runner_off",))
    for faults, n_sparse in ((None, 4), (old, 0)):
        with StubServer("vllm", score) as new, StubServer("vllm", score, faults=faults) as other:
            teacher = make(new, other)
            teacher.server.connect()
            n_before = len(new.requests), len(other.requests)
            scored = teacher.score(groups_of(processor, 1))
            asked = [*new.requests[n_before[0] :], *other.requests[n_before[1] :]]
        assert sum("prompt_logprob_token_ids" in r.payload["sampling_params"] for r in asked) == n_sparse
        assert len(asked) == 4 and all(r.scored.all() for r in scored[0].rollouts)
        assert ("scores the response alone" in teacher.server.report) == bool(n_sparse)


def test_the_model_that_sglang_serves_is_checked_too(make: Callable) -> None:
    with StubServer("sglang", score, model="/models/seven") as stub:
        make(stub).server.connect()
        with pytest.raises(ConfigError, match="serves /models/seven, not 'six'"):
            make(stub, model="six").server.connect()


def test_the_key_comes_from_the_environment(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    with StubServer("vllm", score, api_key="secret") as stub:
        monkeypatch.setenv("TEACHER_KEY", "secret")
        make(stub, api_key_env="TEACHER_KEY").server.connect()
        monkeypatch.delenv("TEACHER_KEY")
        with pytest.raises(ConfigError, match="Type export TEACHER_KEY=KEY"):
            make(stub, api_key_env="TEACHER_KEY")


def test_servers_score_at_temperature_one_only(processor, make: Callable) -> None:
    settings = {"out": "o", "steps": 1, "student": {"model": "s"}, "data": {"train": "d"}}
    server = {"teachers": {"far": {"model": "m", "server": {"urls": ["http://x"]}}}}
    assert TrainConfig.model_validate({**settings, **server}).teachers["far"].server.kind == "vllm"
    overrides = [
        "out=o",
        "steps=1",
        "student.model=s",
        "data.train=d",
        "teachers.far.model=m",
        "teachers.far.server.urls=[http://x]",
        "loss.score_temperature=0.7",
    ]
    with pytest.raises(ConfigError, match=r"\(teachers with `server`: far\). Set loss.score_temperature=1"):
        load_config(TrainConfig, None, overrides)
    with StubServer("vllm", score) as stub, pytest.raises(ConfigError, match=r"at temperature 0.7"):
        make(stub).score(groups_of(processor, 1, 1), temperature=0.7)


def test_a_resumed_run_may_have_its_servers_elsewhere_but_not_another_model() -> None:
    settings = {"out": "o", "steps": 1, "student": {"model": "s"}, "data": {"train": "d"}}

    def config(**server: Any) -> TrainConfig:
        teacher = {"model": "m", "server": {"urls": ["http://x"], **server}}
        return TrainConfig.model_validate({**settings, "teachers": {"far": teacher}})

    before = config().model_dump(mode="json")
    Run(
        config(urls=["http://y", "http://z"], timeout_s=5, concurrency=3), SimpleNamespace(reason="")
    )._refuse_changes(before)
    with pytest.raises(ResumeError, match=r"teachers.far.server.model: None -> other"):
        Run(config(model="other"), SimpleNamespace(reason=""))._refuse_changes(before)
