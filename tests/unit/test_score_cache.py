"""Scores on disk: the same question is asked once, another one always."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import rooms
import tiny
import torch
from PIL import Image

from uniopd_mm.config import TeacherConfig, TrainConfig
from uniopd_mm.distributed import World
from uniopd_mm.errors import ConfigError
from uniopd_mm.models import MultimodalLM
from uniopd_mm.rollout import Group
from uniopd_mm.teachers import LocalTeacher
from uniopd_mm.teachers.cache import ScoreCache, describe_teacher, question_keys
from uniopd_mm.teachers.loading import open_teachers
from uniopd_mm.testing import Faults, StubServer

WORLD = World(0, 1, 0, torch.device("cpu"))


class CountingTeacher(LocalTeacher):
    """Notes how many responses its weights score."""

    n_scored = 0

    def _answer(self, works: list, temperature: float) -> None:
        self.n_scored += sum(len(work.missing()) for work in works)
        super()._answer(works, temperature)


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> MultimodalLM:
    return rooms.load(tiny_models["llava"])


@pytest.fixture(scope="module")
def groups(model: MultimodalLM) -> list[Group]:
    return rooms.sample(model, rooms.make_groups(model, (1, 0, 2)), n=2)


@pytest.fixture
def make(model: MultimodalLM, tmp_path: Path) -> Iterator[Callable[..., CountingTeacher]]:
    """A teacher whose scores are kept under ``identity``."""
    with ExitStack() as stack:

        def make(identity: str = "a" * 64, rank: int = 0, **settings: object) -> CountingTeacher:
            cache = stack.enter_context(ScoreCache(tmp_path / "scores", identity, rank))
            config = TeacherConfig.model_validate({"model": "unused", **settings})
            return CountingTeacher("t", config, model, model.processor, cache=cache)

        yield make


def values(groups: list[Group]) -> list[torch.Tensor]:
    return [r.teacher_logprobs for g in groups for r in g.rollouts]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_nothing_is_scored_twice_and_the_values_are_the_same_bits(groups, make: Callable) -> None:
    first, again, elsewhere = make(), make(), make(rank=3)
    expected = values(first.score(groups))
    assert first.n_scored == 6
    assert equal(values(again.score(groups)), expected) and again.n_scored == 0
    assert equal(values(elsewhere.score(groups)), expected) and elsewhere.n_scored == 0
    assert equal(values(make().score(groups[::-1])), values(again.score(groups)[::-1]))


def test_what_is_new_among_known_questions_is_scored(groups, make: Callable) -> None:
    make().score(groups[:2])
    second = make()
    fresh = rooms.make_teacher(second.model, second.model)
    for ours, theirs in zip(values(second.score(groups)), values(fresh.score(groups)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert second.n_scored == 2


def test_another_picture_temperature_or_teacher_is_another_question(groups, make: Callable) -> None:
    make().score(groups)
    blank = [replace(g, images=tuple(Image.new("RGB", i.size) for i in g.images)) for g in groups]
    other = make()
    other.score(blank)
    assert other.n_scored == 4  # the prompt without a picture is the same
    other.score(groups, temperature=0.5)
    assert other.n_scored == 10
    stranger = make(identity="b" * 64)
    stranger.score(groups)
    assert stranger.n_scored == 6


def test_a_blind_view_does_not_ask_for_the_picture(groups, make: Callable) -> None:
    make(view="text").score(groups)
    blank = [replace(g, images=tuple(Image.new("RGB", i.size) for i in g.images)) for g in groups]
    again = make(view="text")
    again.score(blank)
    assert again.n_scored == 0


def test_the_key_keeps_prompt_and_response_apart(model: MultimodalLM) -> None:
    (group,) = rooms.make_groups(model, (0,))
    ids = group.encoded.input_ids
    shorter = replace(group.encoded, input_ids=ids[:-1])
    response, turned = torch.tensor([5, 6]), torch.tensor([6, 5])
    one, other = question_keys(group.encoded, (), [response, turned], 1.0)
    (moved,) = question_keys(shorter, (), [torch.cat([ids[-1:], response])], 1.0)
    assert len({one, other, moved}) == 3


def test_a_teacher_is_known_by_the_content_of_its_files(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    def describe(folder: Path, known: dict | None = None, **settings: object) -> dict:
        config = TeacherConfig.model_validate({"model": str(folder), **settings})
        return describe_teacher(config, None, known or {})

    copy = tmp_path / "copy"
    shutil.copytree(tiny_models["text"], copy)
    original = describe(tiny_models["text"])
    assert describe(copy)["identity"] == original["identity"]  # wherever it lies
    assert describe(copy, dtype="float32")["identity"] != original["identity"]
    assert describe(copy, template={"enable_thinking": False})["identity"] != original["identity"]
    tiny.build_text(copy, seed=9)
    changed = describe(copy, original["file_digests"])
    assert changed["identity"] != original["identity"]
    remembered = {k: {**v, "sha256": "not read again"} for k, v in changed["file_digests"].items()}
    assert set(describe(copy, remembered)["files"].values()) == {"not read again"}


def test_a_damaged_file_says_which(tmp_path: Path) -> None:
    (tmp_path / f"{'a' * 16}-rank0.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match=r"aaaa-rank0.sqlite of the score cache.*Remove this file"):
        ScoreCache(tmp_path, "a" * 64)


@pytest.fixture
def recipe(tiny_models: dict[str, Path], tmp_path: Path) -> Callable[..., TrainConfig]:
    def recipe(url: str) -> TrainConfig:
        model = str(tiny_models["text"])
        return TrainConfig.model_validate(
            {
                "out": "unused",
                "steps": 1,
                "student": {"model": model},
                "teachers": {"far": {"model": model, "server": {"kind": "vllm_text", "urls": [url]}}},
                "data": {"train": "unused"},
                "score_cache": str(tmp_path / "scores"),
            }
        )

    return recipe


def test_a_server_is_asked_for_nothing_twice_but_again_for_what_it_failed(
    recipe: Callable[..., TrainConfig], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    student = rooms.load(tiny_models["text"])
    groups = rooms.sample(student, rooms.make_groups(student, (0, 0)), n=4)

    def score(stub: StubServer) -> tuple[list[Group], int]:
        with ExitStack() as stack:
            pool = open_teachers(recipe(stub.url), WORLD, stack)
            before = len(stub.requests)
            return pool.score(groups), len(stub.requests) - before

    def uneven(ids: list[int], images: list) -> list[float]:
        return [-3.0 - 0.1 * (token % 11) for token in ids[1:]]

    probe = 40  # requests of the probe, at most, come before
    with StubServer("vllm_text", uneven, max_model_len=100_000) as stub:
        first, n_first = score(stub)
        again, n_again = score(stub)
        assert (n_first, n_again) == (8, 0) and equal(values(first), values(again))
    assert len(stub.requests) < probe
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    (described,) = manifest["teachers"].values()
    assert described["name"] == "far" and described["server"] == {"kind": "vllm_text", "model": "teacher"}

    shutil.rmtree(tmp_path / "scores")
    with StubServer("vllm_text", uneven) as stub:
        with ExitStack() as stack:
            pool = open_teachers(recipe(stub.url), WORLD, stack)
            stub.faults = Faults(schedule={len(stub.requests): "one_id_changed"})
            failed = [r for g in pool.score(groups) for r in g.rollouts if r.unscored_reason]
        assert len(failed) == 1
        healed, n_asked = score(stub)
        assert n_asked == 1 and equal(values(healed), values(first))


def test_other_weights_under_the_same_name_are_noticed(recipe: Callable[..., TrainConfig]) -> None:
    def teacher(slope: float) -> StubServer:
        return StubServer("vllm_text", lambda ids, images: [-3.0 - slope * (token % 11) for token in ids[1:]])

    def open_with(slope: float) -> None:
        with teacher(slope) as stub, ExitStack() as stack:
            open_teachers(recipe(stub.url), WORLD, stack)

    open_with(0.1)
    open_with(0.1)
    with pytest.raises(
        ConfigError, match=r"differently .* other weights under the name 'teacher'.*score_cache="
    ):
        open_with(0.2)
