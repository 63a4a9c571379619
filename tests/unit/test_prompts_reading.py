"""Slices, weights and limits take the right rows; the order is stateless; images open late, bad ones are replaced."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uniopd_mm.config import SourceConfig
from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.prompts import PromptOrder, PromptReader, PromptSet, load_prompts, open_images, replacement
from uniopd_mm.prompts.load import weighted
from uniopd_mm.prompts.order import MIN_BAD_ROWS
from uniopd_mm.prompts.rows import row_range
from uniopd_mm.rollout import Prompt

REPOSITORY = Path(__file__).resolve().parents[2]


def encoded(color: object = "red", size=(4, 4), format="PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, format)
    return stream.getvalue()


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ask(text: object = "How many?", **row: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], "answer": "4", **row}


def source(path: Path, **options: object) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), **options})


# Settings that fit no data


def test_two_sources_of_one_name_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "toy.jsonl", ask())
    with pytest.raises(ConfigError, match=r"2 data sources are called 'toy'.*name"):
        load_prompts([source(path), source(path)])


@pytest.mark.parametrize("template", ["{q} {answer}", "{q} {gold}"])
def test_a_template_that_shows_the_answer_is_refused(tmp_path, template):
    path = write_jsonl(tmp_path / "toy.jsonl", {"q": "2 + 2?", "gold": "4"})
    with pytest.raises(ConfigError, match="shows the answer"):
        load_prompts([source(path, prompt=template, columns={"answer": "gold"})])


def test_a_misspelt_column_name_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(ConfigError, match=r"columns.anwser is used nowhere. Did you mean 'answer'"):
        load_prompts([source(write_jsonl(tmp_path / "toy.jsonl", ask()), columns={"anwser": "label"})])


def test_an_image_root_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="image_root 'gone' is no folder"):
        load_prompts([source(write_jsonl(tmp_path / "toy.jsonl", ask()), image_root="gone")])


@pytest.mark.parametrize("text", ["10", "a:b", "1:2:3", "5%:x"])
def test_a_malformed_slice_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="start:stop"):
        load_prompts([source(write_jsonl(tmp_path / "toy.jsonl", ask()), slice=text)])


def test_a_slice_that_takes_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds 1 rows, slice 5: takes none"):
        load_prompts([source(write_jsonl(tmp_path / "toy.jsonl", ask()), slice="5:")])


def test_an_empty_list_of_sources_is_refused():
    with pytest.raises(ConfigError, match="no data source"):
        load_prompts([])


@pytest.mark.parametrize(
    ("text", "count", "rows"),
    [
        (None, 5, [0, 1, 2, 3, 4]),
        ("0:2", 5, [0, 1]),
        (":40%", 5, [0, 1]),
        ("40%:", 5, [2, 3, 4]),
        ("-2:", 5, [3, 4]),
        ("3:99", 5, [3, 4]),
        ("-40%:", 5, [3, 4]),
    ],
)
def test_slices_take_rows_or_percents(text, count, rows):
    assert list(row_range(text, count)) == rows


@given(st.integers(0, 500), st.integers(0, 100))
def test_the_two_sides_of_a_percent_slice_make_the_whole(count, percent):
    assert [*row_range(f":{percent}%", count), *row_range(f"{percent}%:", count)] == list(range(count))


# The limit on bad rows


def test_past_the_bad_share_the_error_lists_twenty_rows_and_counts_the_rest(tmp_path):
    path = write_jsonl(tmp_path / "toy.jsonl", *[ask() for _ in range(75)], *["broken"] * 25)
    with pytest.raises(DataError) as caught:
        load_prompts(str(path), max_bad_share=0.24)
    message = str(caught.value)
    assert message.startswith("25 of 100 rows are bad, more than data.max_bad_share=0.24 allows:")
    assert message.count("toy.jsonl:") == 20 and f"{path}:76: the line is not JSON" in message
    assert "... and 5 more" in message
    assert len(load_prompts(str(path), max_bad_share=0.25)) == 75


def test_the_share_counts_rows_not_problems(tmp_path):
    path = write_jsonl(tmp_path / "toy.jsonl", ask(), ask(answer="", image="gone.png"))
    prompts = load_prompts(str(path), max_bad_share=0.5)
    assert len(prompts.bad_rows) == 2 and prompts.n_rows == 2


def test_a_file_of_only_bad_rows_is_refused_at_any_share(tmp_path):
    with pytest.raises(DataError, match="all 2 rows are bad"):
        load_prompts(str(write_jsonl(tmp_path / "toy.jsonl", "broken", "broken")), max_bad_share=1.0)


@given(kinds=st.lists(st.sampled_from(["good", "bad"]), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_every_row_is_either_a_prompt_or_listed_as_bad(tmp_path_factory, kinds):
    rows = [ask(f"row {k}") if kind == "good" else "broken" for k, kind in enumerate(kinds, start=1)]
    path = write_jsonl(tmp_path_factory.mktemp("rows") / "toy.jsonl", ask("row 0"), *rows)
    prompts = load_prompts(str(path), max_bad_share=1.0)
    numbers = [int(p.source.rsplit(":", 1)[1]) for p in prompts]
    numbers += [int(bad.source.rsplit(":", 1)[1]) for bad in prompts.bad_rows]
    assert sorted(numbers) == list(range(1, len(rows) + 2))


# Weights


@given(n=st.integers(1, 60), weight=st.floats(0, 5), seed=st.text(max_size=3))
def test_a_weight_repeats_rows_and_adds_a_random_share(n, weight, seed):
    entries = weighted(range(n), weight, seed)
    assert len(entries) == n * int(weight) + round((weight - int(weight)) * n)
    assert len(set(entries)) == len(entries)
    uses = Counter(row for row, _ in entries)
    assert all(uses[row] - int(weight) in (0, 1) for row in range(n))
    assert entries == weighted(range(n), weight, seed)


def test_weights_give_the_right_counts_per_domain_and_distinct_ids(tmp_path):
    sources = [
        source(
            write_jsonl(tmp_path / f"{name}.jsonl", *[ask(str(k)) for k in range(10)]),
            domain=name,
            weight=weight,
        )
        for name, weight in [("twice", 2), ("half", 0.5), ("more", 1.3), ("off", 0)]
    ]
    prompts = load_prompts(sources)
    assert prompts.domains() == {"half": 5, "more": 13, "twice": 20}
    assert Counter(p.domain for p in prompts) == prompts.domains()
    assert len({p.id for p in prompts}) == len(prompts) == 38
    half = [p.id for p in prompts if p.domain == "half"]
    assert half == [p.id for p in load_prompts(sources) if p.domain == "half"]
    assert half != [p.id for p in load_prompts(sources, seed=1) if p.domain == "half"]


# The order


@given(n=st.integers(1, 40), seed=st.integers(0, 5), per_step=st.integers(1, 50), shuffle=st.booleans())
def test_each_epoch_is_a_permutation(n, seed, per_step, shuffle):
    order = PromptOrder(n, seed, shuffle)
    n_steps = -(-3 * n // per_step)
    stream = [index for step in range(n_steps) for index in order.at(step, per_step)]
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(
    n=st.integers(1, 40), seed=st.integers(0, 5), steps=st.lists(st.integers(0, 30), min_size=1, max_size=8)
)
def test_a_step_does_not_depend_on_the_steps_before_it(n, seed, steps):
    order = PromptOrder(n, seed)
    in_any_order = {step: order.at(step, 7) for step in steps}
    from_the_start = [PromptOrder(n, seed).at(step, 7) for step in range(max(steps) + 1)]
    assert all(from_the_start[step] == indices for step, indices in in_any_order.items())


def test_the_order_is_the_same_in_another_process():
    code = "from uniopd_mm.prompts import PromptOrder as P, replacement as r; print(P(50, 3).at(4, 9), r(1, 2, 3, 4, 99))"
    run = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONHASHSEED": "99", "PYTHONPATH": str(REPOSITORY)}
    printed = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
    assert printed.strip() == f"{PromptOrder(50, 3).at(4, 9)} {replacement(1, 2, 3, 4, 99)}"


def test_epochs_and_seeds_shuffle_differently():
    first, second = PromptOrder(100, 0).at(0, 100), PromptOrder(100, 0).at(1, 100)
    assert first != second != PromptOrder(100, 1).at(1, 100)
    assert PromptOrder(100, 0, shuffle=False).at(1, 100) == list(range(100))


def test_an_order_of_no_prompts_is_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptOrder(0)


@given(step=st.integers(0, 99), slot=st.integers(0, 99), attempt=st.integers(1, 9), n=st.integers(1, 50))
def test_a_replacement_is_a_valid_index_and_depends_only_on_its_slot(step, slot, attempt, n):
    assert replacement(0, step, slot, attempt, n) == replacement(0, step, slot, attempt, n)
    assert 0 <= replacement(0, step, slot, attempt, n) < n


def test_replacements_differ_between_slots_and_attempts():
    assert (
        len({replacement(0, 3, slot, attempt, 10**9) for slot in range(5) for attempt in range(1, 5)}) == 20
    )


# Opening images


def image_prompt(value: object) -> Prompt:
    content = [{"type": "image"}]
    return Prompt(
        id="x/1", messages=({"role": "user", "content": content},), images=(value,), source="x.jsonl:7"
    )


@pytest.mark.parametrize("kind", ["path", "text path", "bytes", "struct", "base64", "data uri", "pil"])
def test_every_kind_of_image_source_opens_as_rgb(tmp_path, kind):
    data = encoded("blue", format="PNG")
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    value = {
        "path": tmp_path / "a.png",
        "text path": str(tmp_path / "a.png"),
        "bytes": data,
        "struct": {"bytes": data, "path": None},
        "base64": text,
        "data uri": f"data:image/png;base64,{text}",
        "pil": Image.open(io.BytesIO(data)),
    }[kind]
    (image,) = open_images(image_prompt(value))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (0, 0, 255)


def test_images_are_turned_upright():
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[274] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif)
    assert open_images(image_prompt(stream.getvalue()))[0].size == (4, 6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white_not_black(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image = image.quantize() if mode == "P" else image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    assert open_images(image_prompt(stream.getvalue()))[0].getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_gray_is_scaled_not_clipped():
    stream = io.BytesIO()
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(stream, "PNG")
    (image,) = open_images(image_prompt(stream.getvalue()))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Path("gone.png"), "does not exist"),
        (b"", "is empty"),
        (b"not an image at all", "cannot be decoded"),
        (encoded(size=(64, 64), format="JPEG")[:300], "cannot be decoded"),
        (encoded(size=(64, 64))[:60], "cannot be decoded"),
        (Image.new("RGB", (0, 3)), "no pixels"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:text/plain,hello", "is not base64"),
        (encoded(format="PCX"), "cannot be decoded"),
        (None, "is null"),
    ],
    ids=[
        *("missing", "empty", "garbage", "truncated-jpeg", "truncated-png", "no-pixels"),
        *("base64", "data-uri", "unlisted-format", "null"),
    ],
)
def test_an_image_that_cannot_be_opened_is_a_data_error_that_names_the_row(value, message):
    with pytest.raises(DataError, match=message) as caught:
        open_images(image_prompt(value))
    assert str(caught.value).startswith("x.jsonl:7: image 1 of 1")


def test_an_empty_image_file_is_a_data_error(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match="cannot be decoded"):
        open_images(image_prompt(tmp_path / "a.png"))


def test_a_decompression_bomb_is_a_data_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="too large"):
        open_images(image_prompt(encoded(size=(32, 32))))


@given(
    format=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
    cut=st.floats(0, 1),
    damage=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=20),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_a_data_error_and_nothing_else(format, cut, damage):
    data = bytearray(encoded("green", (16, 16), format))
    for place, value in damage:
        data[int(place * len(data))] = value
    try:
        (image,) = open_images(image_prompt(bytes(data[: int(cut * len(data))])))
    except DataError:
        return
    assert image.mode == "RGB"


# Reading at run time


def picture_set(tmp_path: Path, n: int, broken: set[int]) -> PromptSet:
    """``n`` rows with one picture each; the broken ones pass the load-time check."""
    for k in range(n):
        (tmp_path / f"{k}.png").write_bytes(b"broken" if k in broken else encoded((k, 0, 0)))
    rows = [ask(image=f"{k}.png", id=k) for k in range(n)]
    return load_prompts(write_jsonl(tmp_path / "toy.jsonl", *rows), max_bad_share=0)


def test_the_reader_opens_the_images_of_its_slots(tmp_path):
    prompts = picture_set(tmp_path, 8, set())
    order = PromptOrder(8, seed=3)
    drawn = PromptReader(prompts, order, prompts_per_step=4).draw(1, [3, 0])
    assert [d.slot for d in drawn] == [3, 0]
    for slot, prompt, images, _ in drawn:
        index = order.at(1, 4)[slot]
        assert prompt.id == f"toy/{index}" and images[0].getpixel((0, 0)) == (index, 0, 0)


def test_a_row_that_cannot_be_opened_is_replaced_and_recorded(tmp_path):
    prompts = picture_set(tmp_path, 8, {2})
    reader = PromptReader(prompts, PromptOrder(8, shuffle=False), prompts_per_step=8, max_bad_share=0.5)
    drawn = reader.draw(0, range(8))
    assert [d.prompt.id for k, d in enumerate(drawn) if k != 2] == [f"toy/{k}" for k in range(8) if k != 2]
    assert drawn[2].prompt.id == f"toy/{replacement(0, 0, 2, 1, 8)}" and drawn[2].images
    (bad,) = reader.bad_rows
    assert bad.source == f"{tmp_path}/toy.jsonl:3" and bad.reason.startswith("image 1 of 1")


def test_ranks_that_read_different_slots_draw_the_same_batch_as_one_rank(tmp_path):
    prompts = picture_set(tmp_path, 10, {1, 4, 7})
    ids = []
    for slots in ([range(6)], [range(3), range(3, 6)], [[5, 3, 1], [4, 2, 0]]):
        drawn = [PromptReader(prompts, PromptOrder(10), 6, 0.5).draw(2, part) for part in slots]
        ids.append(sorted((d.slot, d.prompt.id) for part in drawn for d in part))
    assert ids[0] == ids[1] == ids[2]


def test_a_resumed_reader_draws_the_same_batch(tmp_path):
    prompts = picture_set(tmp_path, 10, {1, 4})
    running, resumed = (PromptReader(prompts, PromptOrder(10), 6, 0.5) for _ in range(2))
    for step in range(3):
        last = running.draw(step, range(6))
    assert [d.prompt.id for d in last] == [d.prompt.id for d in resumed.draw(2, range(6))]


def test_a_row_that_fails_again_and_again_counts_once(tmp_path):
    reader = PromptReader(picture_set(tmp_path, 4, {0}), PromptOrder(4), 4, max_bad_share=0.3)
    for step in range(20):
        reader.draw(step, range(4))
    assert len(reader.bad_rows) == 1


def test_the_reader_stops_past_the_bad_share_with_the_list(tmp_path):
    broken = set(range(MIN_BAD_ROWS + 1))
    reader = PromptReader(
        picture_set(tmp_path, 40, broken), PromptOrder(40, shuffle=False), 40, max_bad_share=0.1
    )
    with pytest.raises(DataError, match=r"at run time, 6 of \d+ rows are bad") as caught:
        reader.draw(0, range(40))
    assert str(caught.value).count("toy.jsonl:") == MIN_BAD_ROWS + 1


def test_a_few_bad_rows_are_survived_before_the_share_means_anything(tmp_path):
    broken = set(range(MIN_BAD_ROWS))
    reader = PromptReader(
        picture_set(tmp_path, 12, broken), PromptOrder(12, shuffle=False), 12, max_bad_share=0.01
    )
    assert len(reader.draw(0, range(12))) == 12


def test_a_share_of_zero_stops_at_the_first_bad_row(tmp_path):
    reader = PromptReader(picture_set(tmp_path, 4, {0}), PromptOrder(4), 4, max_bad_share=0)
    with pytest.raises(DataError, match="max_bad_share=0"):
        reader.draw(0, range(4))


def test_a_slot_for_which_nothing_opens_is_an_error_not_an_endless_search(tmp_path):
    reader = PromptReader(picture_set(tmp_path, 3, {0, 1, 2}), PromptOrder(3), 1, max_bad_share=1.0)
    with pytest.raises(DataError, match="slot 0: none of"):
        reader.draw(0, [0])


def test_importing_the_room_loads_neither_torch_nor_datasets_nor_pillow():
    code = "import sys, uniopd_mm.prompts; print({'torch', 'datasets', 'PIL', 'pyarrow', 'numpy'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.strip() == "set()"


def test_a_prompt_that_cannot_be_encoded_is_replaced_and_listed(tmp_path):
    def encode(prompt, images):
        if prompt.id.endswith("2"):
            raise DataError(f"{prompt.source}: 9000 prompt tokens, at most 4096 fit beside the response")
        return ("encoded", prompt.id)

    reader = PromptReader(picture_set(tmp_path, 4, set()), PromptOrder(4), 4, encode=encode)
    drawn = reader.draw(0, range(4))
    assert [d.encoded for d in drawn] == [("encoded", d.prompt.id) for d in drawn]
    assert len(drawn) == 4 and not any(d.prompt.id.endswith("2") for d in drawn)
    (bad,) = reader.bad_rows
    assert "9000 prompt tokens" in bad.reason
