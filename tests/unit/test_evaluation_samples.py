"""Samples on disk are the state of a run: what is there is never made again, and never mixed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from evaluating import GREEDY, Engine, Processor, prompt, world
from hypothesis import given, settings
from hypothesis import strategies as st

from uniopd_mm.errors import DataError, ResumeError
from uniopd_mm.evaluation import evaluate
from uniopd_mm.evaluation.generate import ROOM_STEP, answer_tokens, generate, prompt_slot, score
from uniopd_mm.evaluation.samples import (
    Sample,
    SampleStore,
    different,
    read_samples,
    settings_hash,
    write_whole,
)
from uniopd_mm.evaluation.tasks import prompt_digest
from uniopd_mm.verifiers import VerifierPool

SETTINGS = {"temperature": 1.0}
PROMPTS = [prompt(f"row{i}", text="x" * (i % 5 + 1)) for i in range(11)]
IDS = [p.id for p in PROMPTS]


def sample(id: str = "row0", index: int = 0, text: str = "7", **more) -> Sample:
    return Sample("bench", id, index, text, more.pop("finish", "stop"), 1, **more)


def run(
    folder: Path, n: int = 1, engine: Engine | None = None, prompts=PROMPTS, rank=(0, 1), batch=4, seed=0
):
    """All samples after one run, by (id, index)."""
    with SampleStore(folder, SETTINGS, rank[0]) as store:
        generate(
            engine or Engine(), Processor(), "bench", prompts, n, GREEDY, seed, store, world(*rank), batch
        )
        return {(s.id, s.index): s.text for s in store.samples("bench", IDS, n)}


def test_a_store_says_what_is_missing_and_gives_samples_in_order(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS) as store:
        store.append([sample("b", 1), sample("a", 0)])
        assert store.missing("bench", ["a", "b"], 2) == {"a": [1], "b": [0]}
        assert store.missing("other", ["a"], 1) == {"a": [0]}
        assert [s.key for s in store.samples("bench", ["a", "b"], 2)] == [
            ("bench", "a", 0),
            ("bench", "b", 1),
        ]
        assert [s.id for s in store.samples("bench", ["b", "a"], 1)] == ["a"]
    with SampleStore(tmp_path, SETTINGS) as store:
        assert store.missing("bench", ["a", "b"], 1) == {"b": [0]}


@given(cut=st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_a_line_cut_by_a_kill_is_made_again_and_harms_no_other(cut: int, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("torn")
    with SampleStore(folder, SETTINGS) as store:
        store.append([sample("a", text="äöü日本"), sample("b")])
        path = store.path
    path.write_bytes(path.read_bytes()[:-cut])
    with SampleStore(folder, SETTINGS) as store:
        assert store.missing("bench", ["a", "b"], 1) == {"b": [0]}
        store.append([sample("b")])
    with SampleStore(folder, SETTINGS) as store:
        assert [s.text for s in store.samples("bench", ["a", "b"], 1)] == ["äöü日本", "7"]


def test_other_settings_have_other_samples_and_the_old_ones_stay(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS) as store:
        store.append([sample()])
        old = store.hash
    with SampleStore(tmp_path, {"temperature": 0.5}) as store:
        assert store.missing("bench", ["row0"], 1) == {"row0": [0]}
        assert store.others() == {old: SETTINGS}
    with SampleStore(tmp_path, SETTINGS) as store:
        assert not store.missing("bench", ["row0"], 1)


def test_an_answer_to_a_prompt_that_has_changed_is_not_used_and_stays(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS, prompts={"a": "old", "b": "same"}) as store:
        store.append([sample("a", text="to the old one"), sample("b")])
    now = {"a": "new", "b": "same"}
    with SampleStore(tmp_path, SETTINGS, prompts=now) as store:
        assert store.missing("bench", ["a", "b"], 1) == {"a": [0]}
        store.append([sample("a", text="to the new one")])
    with SampleStore(tmp_path, SETTINGS, prompts=now) as store:
        assert [s.text for s in store.samples("bench", ["a", "b"], 1)] == ["to the new one", "7"]
    with SampleStore(tmp_path, SETTINGS, prompts={"a": "old"}) as store:
        assert [s.text for s in store.samples("bench", ["a"], 1)] == ["to the old one"]


def test_a_prompt_is_told_by_its_turns_and_pictures_not_by_its_gold_or_id(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one picture")
    made = prompt("a", images=(path,))
    digest = prompt_digest(made)
    assert digest == prompt_digest(prompt("b", answer="8", images=(path,)))
    assert digest != prompt_digest(prompt("a", text="how many ? ", images=(path,)))
    assert prompt_digest(prompt("a", images=(b"xy", b"z"))) != prompt_digest(
        prompt("a", images=(b"x", b"yz"))
    )
    path.write_bytes(b"two pictures")
    assert digest != prompt_digest(made)


def test_saved_answers_count_once_and_an_error_less_than_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"

    def read(*lines: dict) -> list[tuple[str, int, str]]:
        path.write_text("".join(json.dumps({"benchmark": "bench", **line}) + "\n" for line in lines))
        return [(s.id, s.index, s.text) for s in read_samples(path)]

    lost = {"id": "a", "index": 0, "text": "", "error": "the server is down"}
    answer = {"id": "a", "index": 0, "text": "7"}
    assert read(lost, answer) == read(answer, lost) == read(answer, answer) == [("a", 0, "7")]
    assert read({"id": "a", "text": "7"}, {"id": "a", "text": "8"}) == [("a", 0, "7"), ("a", 1, "8")]
    with pytest.raises(DataError, match=r"jsonl:2: another answer 0 to a"):
        read(answer, answer | {"text": "8"})
    with pytest.raises(DataError, match=r"jsonl:1: not a sample"):
        read({"id": "a", "text": None})


def test_a_sample_of_other_settings_in_the_file_is_refused_with_its_line(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS) as store:
        store.append([sample("a"), sample("b")])
        path = store.path
    lines = path.read_text().splitlines()
    foreign = json.dumps(json.loads(lines[1]) | {"settings": "0" * 12})
    path.write_text(lines[0] + "\n" + foreign + "\n")
    with pytest.raises(DataError, match=r"rank_0000\.jsonl:2.*000000000000"):
        SampleStore(tmp_path, SETTINGS)
    path.write_text(lines[0] + "\nnot json\n")
    with pytest.raises(DataError, match=":2: not a sample"):
        SampleStore(tmp_path, SETTINGS)


def test_two_runs_cannot_write_the_same_samples(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS), pytest.raises(ResumeError, match="--out"):
        SampleStore(tmp_path, SETTINGS)
    with SampleStore(tmp_path, SETTINGS):
        pass


def test_a_disk_that_takes_no_more_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS) as store:
        os.close(store._file)
        store._file = os.open("/dev/full", os.O_WRONLY)
        with pytest.raises(DataError, match=r"rank_0000.jsonl: No space left on device.*same command"):
            store.append([sample()])
    with pytest.raises(DataError, match="cannot write"):
        write_whole(tmp_path / "gone" / "results.json", "{}")


def test_an_answer_that_is_no_valid_text_is_kept(tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS) as store:
        store.append([sample(text="half \ud83d pair, a\u2028b")])
    with SampleStore(tmp_path, SETTINGS) as store:
        assert store.samples("bench", ["row0"], 1)[0].text == "half \ud83d pair, a\u2028b"


@given(stop=st.integers(0, 60), batch=st.sampled_from([1, 3, 64]), n=st.sampled_from([1, 3, 8, 19]))
@settings(max_examples=25, deadline=None)
def test_an_interrupted_run_ends_with_the_same_samples(
    stop: int, batch: int, n: int, tmp_path_factory
) -> None:
    whole = run(tmp_path_factory.mktemp("whole"), n)
    folder, engine = tmp_path_factory.mktemp("cut"), Engine(stop_after=stop)
    try:
        run(folder, n, engine, batch=batch)
    except KeyboardInterrupt:
        assert engine.stop_after == 0
    assert run(folder, n) == whole
    assert len(whole) == len(set(whole.values())) == n * len(PROMPTS)


def test_samples_depend_on_neither_n_nor_limit_nor_ranks(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 19)
    few = run(tmp_path / "few", 3, prompts=PROMPTS[:5])
    assert few == {(id, i): whole[id, i] for id in IDS[:5] for i in range(3)}
    first, second = run(tmp_path / "ranks", 9, rank=(0, 2)), run(tmp_path / "ranks", 9, rank=(1, 2))
    assert 0 < len(first) < len(second) and second == {key: whole[key] for key in second}
    assert len(second) == 9 * len(PROMPTS)
    assert run(tmp_path / "other", 1, seed=1)["row0", 0] != whole["row0", 0]


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    run(tmp_path, 5)
    engine = Engine()
    run(tmp_path, 5, engine)
    assert engine.calls == []
    run(tmp_path, 9, engine)  # indices 5 to 7 of the first round, and one of the second
    assert {n for _, n in engine.calls} == {8, 1}
    with SampleStore(tmp_path, SETTINGS) as store:
        assert len(store.path.read_text().splitlines()) == 9 * len(PROMPTS)


def test_prompts_of_like_length_are_answered_together_the_longest_first(tmp_path: Path) -> None:
    engine, prompts = Engine(), [prompt(f"p{i}", text="x" * (400 * (i % 4 + 1))) for i in range(8)]
    run(tmp_path, 1, engine, prompts, batch=2)
    assert [sorted(int(id[1:]) % 4 for id in ids) for ids, _ in engine.calls] == [
        [3, 3],
        [2, 2],
        [1, 1],
        [0, 0],
    ]


def test_what_could_not_be_answered_is_unknown_and_asked_again(tmp_path: Path) -> None:
    prompts = [*PROMPTS[:3], prompt("blind", images=(tmp_path / "gone.png",))]
    run(tmp_path, 2, Engine(lose=lambda group, i: group.prompt.id == "row1" or i == 1), prompts)
    with SampleStore(tmp_path, SETTINGS) as store:
        samples = store.samples("bench", [p.id for p in prompts], 2)
        assert store.missing("bench", [p.id for p in prompts], 2) == {
            "row0": [1],
            "row1": [0, 1],
            "row2": [1],
            "blind": [0, 1],
        }
    with VerifierPool() as verifiers:
        outcomes = score(prompts, samples, verifiers)
    assert [o.correct for o in outcomes] == [False, None, None, None, False, None, None, None]
    assert outcomes[1].reason == "the server is down" and "gone.png" in outcomes[6].reason
    assert len(run(tmp_path, 2, prompts=PROMPTS[:3])) == 6
    with SampleStore(tmp_path, SETTINGS) as store:
        assert store.missing("bench", [p.id for p in prompts], 2) == {"blind": [0, 1]}


@given(lost=st.sets(st.tuples(st.sampled_from(IDS), st.integers(0, 7))), n=st.sampled_from([1, 5, 19]))
@settings(max_examples=25, deadline=None)
def test_an_answer_belongs_to_its_index_whatever_else_of_its_round_was_lost(
    lost: set, n: int, tmp_path_factory
) -> None:
    whole, folder = run(tmp_path_factory.mktemp("whole"), n), tmp_path_factory.mktemp("lossy")
    with_holes = run(folder, n, Engine(lose=lambda group, i: (group.prompt.id, i) in lost))
    expected = {key: "" if (key[0], key[1] % 8) in lost else text for key, text in whole.items()}
    assert with_holes == expected
    assert run(folder, n) == whole


@given(longest=st.integers(1, 60_000), n_prompt=st.integers(1, 60_000), context=st.integers(2, 60_000))
def test_an_answer_has_the_room_that_the_context_leaves(longest: int, n_prompt: int, context: int) -> None:
    n_prompt = min(n_prompt, context - 1)
    room = answer_tokens(longest, n_prompt, context)
    assert 0 < room <= longest and n_prompt + room <= context
    assert room == longest or context - (n_prompt + room) < ROOM_STEP
    assert answer_tokens(longest, n_prompt, None) == longest


def test_what_an_engine_is_asked_for_fits_into_its_context(tmp_path: Path) -> None:
    prompts = [prompt(f"p{length}", text="x" * length) for length in (3, 8, 9, 10, 11)]
    engine = Engine(context=10)
    run(tmp_path, 1, engine, prompts)
    asked = {id: limit for (ids, _), limit in zip(engine.calls, engine.limits, strict=True) for id in ids}
    assert asked == {"p3": 4, "p8": 2, "p9": 1}
    with SampleStore(tmp_path, SETTINGS) as store:
        full = store.samples("bench", ["p10", "p11"], 1)
    assert all("prompt and answer may have 10" in sample.error for sample in full)


def test_evaluation_during_training_gives_the_samples_of_a_run(tmp_path: Path) -> None:
    with VerifierPool() as verifiers:
        scored = evaluate(Engine(), Processor(), PROMPTS, verifiers, GREEDY, world(), n=9, batch=4, seed=3)
    assert {(one.sample.id, one.sample.index): one.sample.text for one in scored} == run(tmp_path, 9, seed=3)
    assert [one.sample.id for one in scored] == [id for id in IDS for _ in range(9)]


def test_random_numbers_belong_to_the_prompt() -> None:
    slots = {prompt_slot(f"row{i}") for i in range(1000)}
    assert len(slots) == 1000 and all(0 <= slot < 2**62 for slot in slots)


def test_the_hash_of_settings_does_not_depend_on_their_order() -> None:
    assert settings_hash({"a": 1, "b": {"c": 2}}) == settings_hash({"b": {"c": 2}, "a": 1})
    assert settings_hash({"a": 1}) != settings_hash({"a": 2})
    assert different({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}}) == ["a: 1 -> null", "b.c: 2 -> 3"]
