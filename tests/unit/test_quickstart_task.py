"""The quickstart task: what its rows, pictures and chains promise, and that its parts load like any hub model."""

from __future__ import annotations

import importlib
import json
import math
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

QUICKSTART = Path(__file__).resolve().parents[2] / "data" / "quickstart"


@pytest.fixture(scope="module", autouse=True)
def quickstart_on_path():
    """``data/`` is no package: its files import each other by bare name, as they do when prepare.py is run."""
    sys.path.insert(0, str(QUICKSTART))
    yield
    sys.path.remove(str(QUICKSTART))


def part(name):
    sys.path.insert(0, str(QUICKSTART))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(QUICKSTART))


task = part("task")
LABELS = np.random.default_rng(0).integers(0, 10, size=task.N_SCANS)

digits_st = st.lists(st.integers(0, 9), min_size=2, max_size=3).map(tuple)


@st.composite
def questions(draw):
    digits = draw(digits_st)
    kind = draw(st.sampled_from(task.kinds_for(len(digits))))
    return task.Question(kind, digits, draw(st.integers(0, len(task.PHRASES[kind]) - 1)))


@given(seed=st.integers(0, 2**31), n_rows=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_training_and_held_out_pictures_never_share_a_scan(seed, n_rows):
    shown = {
        split: {i for strip in task.draw_strips(LABELS, split, n_rows, seed) for i in strip.scans}
        for split in task.SPLITS
    }
    assert max(shown["train"]) < task.N_TRAIN_SCANS <= min(shown["eval"])


@given(question=questions())
def test_the_gold_answer_is_what_the_digits_say(question):
    d = question.digits
    expected = {
        "left": d[0],
        "middle": d[1],
        "right": d[-1],
        "sum": sum(d),
        "difference": d[0] - d[-1],
    }[question.kind]
    assert task.answer(question) == str(expected)


@given(question=questions())
def test_a_chain_ends_in_the_gold_answer_and_every_step_of_it_is_true(question):
    text = task.chain(question)
    assert task.boxed_answer(text) == task.answer(question)
    read, _, steps = text.partition(": ")
    assert tuple(int(d) for d in read.split()) == question.digits
    for step in steps.split(" \\boxed")[0].split():
        left, right = step.split("=")
        if question.domain == "arithmetic":
            a, sign, b = left.partition("+") if "+" in left else left.partition("-")
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(right)
        else:
            assert left == question.kind


def test_two_digits_have_no_middle():
    assert "middle" not in task.kinds_for(2)
    assert "middle" in task.kinds_for(3)


@pytest.mark.parametrize(
    ("response", "found"),
    [("3 5: \\boxed{8}", "8"), ("\\boxed{1} no, \\boxed{ -2 }", "-2"), ("8", None), ("\\boxed{8", None)],
)
def test_the_last_closed_box_is_the_answer(response, found):
    assert task.boxed_answer(response) == found


@given(n_rows=st.integers(1, 40), seed=st.integers(0, 1000), split=st.sampled_from(["train", "eval"]))
@settings(max_examples=30, deadline=None)
def test_rows_are_as_many_as_asked_with_one_picture_per_placeholder_and_distinct_ids(n_rows, seed, split):
    strips = task.draw_strips(LABELS, split, n_rows, seed)
    rows = task.rows(strips)
    assert len(rows) == n_rows == len({row["id"] for row in rows})
    for row in rows:
        parts = row["messages"][0]["content"]
        assert sum(p["type"] == "image" for p in parts) == len(row["images"]) == len(row["image_text"]) == 1
        assert row["verifier"] == "math"
    by_picture = {strip.name: strip for strip in strips}
    for row in rows:
        shown = by_picture[row["images"][0]].scans
        assert row["image_text"] == ["digits: " + " ".join(str(LABELS[i]) for i in shown)]


def test_the_same_seed_draws_the_same_rows_and_another_seed_others():
    first, again, other = (task.rows(task.draw_strips(LABELS, "train", 50, seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_both_domains_are_asked_equally_often():
    rows = task.rows(task.draw_strips(LABELS, "train", 100, 0))
    assert [sum(row["domain"] == d for row in rows) for d in task.DOMAINS] == [50, 50]


@pytest.mark.parametrize("n_digits", [2, 3])
def test_a_picture_shows_each_scan_in_its_own_cell_of_the_middle_row(n_digits):
    scans = [np.full((8, 8), 4.0 * (k + 1)) for k in range(n_digits)]
    picture = task.picture(scans)
    assert picture.shape == (96, 96) and picture.dtype == np.uint8
    cells = picture.reshape(3, 32, 3, 32).transpose(0, 2, 1, 3)
    for row, column in product(range(3), range(3)):
        expected = 255
        if row == 1 and column in task.cells(n_digits):
            expected = round(255 * (1 - 4 * (task.cells(n_digits).index(column) + 1) / 16))
        assert (cells[row, column] == expected).all()


@pytest.fixture(scope="module")
def tokenizer():
    return part("tiny_models").build_tokenizer()


def test_every_digit_is_a_token_of_its_own(tokenizer):
    ids = tokenizer("0123456789").input_ids
    assert len(ids) == 10 == len(set(ids))
    assert tokenizer.tokenize("13+5=18")[0] == "1"


@given(text=st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    if not any(special in text for special in tokenizer.all_special_tokens):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_chain_fits_the_sampling_limit(tokenizer):
    longest = max(
        len(tokenizer(task.chain(task.Question(kind, digits))).input_ids) + 1
        for digits in [(9, 9), (9, 9, 9), (0, 5, 9)]
        for kind in task.kinds_for(len(digits))
    )
    assert longest <= part("supervised").MAX_NEW_TOKENS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quickstart folder whose models had one training step a stage, made in this process."""
    prepare = part("prepare")
    folder = tmp_path_factory.mktemp("quickstart")
    chosen = prepare.Settings(seed=0, train_rows=12, eval_rows=8, steps_scale=1e-9)
    workshop = prepare.Workshop(folder, chosen.digest())
    scans_and_digits = prepare.scans_and_labels()
    with workshop.alone():
        prepare.make_data(workshop, chosen)
        for name in prepare.RECIPES:
            prepare.make_model(name, workshop, chosen, scans_and_digits, lambda *_: None, lambda: None)
    return folder, workshop, chosen


def test_models_and_processors_load_through_from_pretrained_alone(made):
    import torch

    folder, _, _ = made
    supervised = part("supervised")
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    vocabularies = []
    for name in part("prepare").RECIPES:
        model, processor = supervised.load(folder / name)
        inputs = supervised.prompt_inputs(processor, rows, folder)
        assert ("pixel_values" in inputs) == (name != "teacher_text")
        with torch.no_grad():
            logits = model(**inputs).logits
        tokenizer = getattr(processor, "tokenizer", processor)
        assert logits.shape[-1] == len(tokenizer) == model.config.get_text_config().vocab_size
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        vocabularies.append(tokenizer.get_vocab())
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_the_processor_gives_the_pixels_that_training_showed(made):
    import torch
    from PIL import Image
    from sklearn.datasets import load_digits

    folder, _, chosen = made
    _, processor = part("supervised").load(folder / "student")
    bundle = load_digits()
    strip = task.draw_strips(bundle.target, "eval", chosen.eval_rows, chosen.seed)[0]
    shown = processor.image_processor(Image.open(folder / strip.name), return_tensors="pt")["pixel_values"][0]
    ink = torch.tensor(task.canvas(bundle.images[list(strip.scans)]))
    full_ink = part("tiny_models").FULL_INK_VALUE
    one_grey_level = abs(full_ink) / 255
    assert (shown - ink / task.FULL_INK * full_ink).abs().max() < one_grey_level


def test_training_strips_show_whole_training_scans_when_nothing_is_warped():
    supervised, tiny_models = part("supervised"), part("tiny_models")
    scans = np.random.default_rng(1).integers(0, 17, size=(task.N_SCANS, 8, 8)).astype(float)
    schedule = supervised.Schedule(steps=1, batch=6, warp=0.0, n_scans=10)
    strips = supervised.Lessons(scans, LABELS, schedule, seed=0).strips()
    patches = strips.pixel_values[:, 0].reshape(-1, 3, 8, 3, 8).transpose(2, 3).reshape(-1, 8, 8)
    shown = patches[strips.patches].numpy() / tiny_models.FULL_INK_VALUE * task.FULL_INK
    labels = [digit for strip in strips.digits for digit in strip]
    for scan, label in zip(shown, labels, strict=True):
        matches = np.flatnonzero(np.isclose(scans[:10], scan, atol=1e-3).all(axis=(1, 2)))
        assert len(matches) == 1 and LABELS[matches[0]] == label


def test_only_response_tokens_and_the_turn_end_are_trained_on(tokenizer):
    supervised = part("supervised")
    question = task.Question("sum", (3, 5))
    encoder = supervised.Encoder(tokenizer, n_image_tokens=9)
    input_ids, labels = encoder.batch([question, task.Question("sum", (3, 1, 9))])
    trained = labels[0][labels[0] != supervised.IGNORED]
    assert tokenizer.decode(trained) == task.chain(question) + "<|im_end|>"
    assert (input_ids[0] == tokenizer.convert_tokens_to_ids("<image>")).sum() == 9


def test_the_student_has_seen_every_digit_equally_often_and_few_scans():
    prepare = part("prepare")
    n_scans = prepare.RECIPES["student"].questions.n_scans
    _, labels = prepare.scans_and_labels()
    assert n_scans < 0.05 * task.N_TRAIN_SCANS
    assert (np.bincount(labels[:n_scans], minlength=10) == n_scans / 10).all()


@pytest.mark.parametrize("name", ["student", "teacher_text"])
def test_a_run_shows_each_model_the_very_prompts_it_was_trained_on(made, name):
    from PIL import Image

    from uniopd_mm.processors import get_processor

    folder, _, chosen = made
    supervised, prepare = part("supervised"), part("prepare")
    processor = get_processor(str(folder / name))
    n_image_tokens = part("tiny_models").VISION_TOKENS if prepare.RECIPES[name].sees else 0
    encoder = supervised.Encoder(processor.tokenizer, n_image_tokens)
    _, labels = prepare.scans_and_labels()
    strips = task.draw_strips(labels, "eval", chosen.eval_rows, chosen.seed)
    questions = [question for strip in strips for question in strip.questions]
    for question, row in zip(questions, task.rows(strips), strict=True):
        ids, n_prompt = encoder(question)
        if n_image_tokens:
            images = [Image.open(folder / image).convert("RGB") for image in row["images"]]
            encoded = processor.encode(row["messages"], images)
        else:
            encoded = processor.encode(processor.text_view(row["messages"], row["image_text"]))
        assert encoded.input_ids.tolist() == ids[:n_prompt]


def test_a_finished_part_is_kept_and_another_setting_makes_it_anew(made):
    folder, workshop, _chosen = made
    prepare = part("prepare")
    assert all(workshop.result(name) for name in ("data", *prepare.RECIPES))
    other = prepare.Workshop(
        folder, prepare.Settings(seed=1, train_rows=12, eval_rows=8, steps_scale=1e-9).digest()
    )
    assert all(other.result(name) is None for name in ("data", *prepare.RECIPES))


def test_a_part_that_was_not_finished_leaves_no_stamp_and_is_swept(tmp_path):
    prepare = part("prepare")
    workshop = prepare.Workshop(tmp_path, "x")
    with workshop.alone():
        (workshop.begin("student") / "half.bin").write_bytes(b"0")
        assert workshop.result("student") is None
    assert not (tmp_path / "student").exists() and not workshop.aside.exists()


def test_a_second_preparation_in_the_same_folder_is_refused(tmp_path):
    prepare = part("prepare")
    workshop = prepare.Workshop(tmp_path, "x")
    with workshop.alone(), pytest.raises(prepare.PrepareError, match="another --out"), workshop.alone():
        pass


@pytest.mark.parametrize("jobs", [1, 2, 3, 5])
def test_every_model_is_made_by_one_process_and_never_before_one_that_it_needs(jobs):
    prepare = part("prepare")
    names = list(prepare.RECIPES)
    shares = prepare.share_out(names, jobs)
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert all(share == sorted(share, key=names.index) for share in shares)
    assert names[0] == "teacher_text", "the others start from its weights"
    assert prepare.share_out([], jobs) == []


@given(step=st.integers(0, 299))
def test_the_learning_rate_rises_then_falls_to_zero(step):
    supervised = part("supervised")
    schedule = supervised.Schedule(steps=300, warmup=50, peak_lr=1.0)
    here, after = (supervised.learning_rate(s, schedule) for s in (step, step + 1))
    assert 0 <= after <= 1
    assert (here < after or math.isclose(after, 1.0)) if step < 49 else here >= after
