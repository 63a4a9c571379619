"""Rows of every form become prompts; every kind of bad row is found, named and counted; nothing is lost."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uniopd_mm.config import SourceConfig
from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.prompts import MixtureConfig, load_prompts, open_images
from uniopd_mm.prompts.parse import FIELDS, check_source, parse_row
from uniopd_mm.prompts.rows import ArrowRows, RowError
from uniopd_mm.rollout import Prompt
from uniopd_mm.settings import load_config

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Converted Parquet goes to a temporary folder instead of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def encoded(color="red", size=(4, 4), format="PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, format, **options)
    return stream.getvalue()


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ask(text: object = "How many?", **row: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], "answer": "4", **row}


def source(path: Path, **options: object) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), **options})


def load_row(tmp_path: Path, row: object, **options: object) -> Prompt:
    return load_prompts([source(write_jsonl(tmp_path / "train.jsonl", row), **options)])[0]


def reasons(tmp_path: Path, *rows: object, known: dict | None = None, **options: object) -> list[str]:
    """Reasons why rows are bad, next to one good row."""
    path = write_jsonl(
        tmp_path / "train.jsonl", *rows, ask("good?", id="good", domain=options.get("domain") or "ok")
    )
    prompts = load_prompts([source(path, **options)], max_bad_share=1.0, **(known or {}))
    assert len(prompts) == 1, "the bad row must be left out"
    return [row.reason for row in prompts.bad_rows]


def reason(tmp_path: Path, row: object, known: dict | None = None, **options: object) -> str:
    (only,) = reasons(tmp_path, row, known=known, **options)
    return only


# Row forms


def test_a_text_row_keeps_its_text_and_all_its_fields(tmp_path):
    prompt = load_row(tmp_path, ask("2 + 2?", id=7, domain="math", verifier="math"))
    assert prompt.messages == ({"role": "user", "content": "2 + 2?"},)
    assert (prompt.id, prompt.answer, prompt.domain, prompt.verifier) == ("train/7", "4", "math", "math")
    assert prompt.images == () and prompt.image_text is None


def test_rows_without_an_id_are_numbered_like_their_place_in_the_file(tmp_path):
    prompts = load_prompts(str(write_jsonl(tmp_path / "toy.jsonl", ask(), "", ask())))
    assert [p.id for p in prompts] == ["toy/1", "toy/3"]
    assert prompts[1].source == f"{tmp_path}/toy.jsonl:3"


def test_typed_image_parts_take_the_images_in_order(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(encoded())
    content = [
        {"type": "text", "text": "Compare "},
        {"type": "image"},
        {"type": "text", "text": " and "},
        {"type": "image"},
    ]
    prompt = load_row(tmp_path, ask(content, images=["a.png", "b.png"]))
    assert prompt.messages[0]["content"] == content
    assert prompt.images == (tmp_path / "a.png", tmp_path / "b.png")


def test_inline_images_of_every_spelling_are_moved_to_the_images(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    uri = "data:image/png;base64," + base64.b64encode(encoded()).decode()
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image", "path": "a.png"},
        {"type": "image"},
    ]
    prompt = load_row(tmp_path, ask(content, image="a.png"))
    assert prompt.messages[0]["content"] == [{"type": "image"}] * 4
    assert prompt.images == (tmp_path / "a.png", uri, tmp_path / "a.png", tmp_path / "a.png")


def test_markers_in_text_become_image_parts_and_take_their_line_break_along(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    prompt = load_row(tmp_path, ask("<image>\nLeft? <image>Right?\n<image>", images=["a.png"] * 3))
    assert prompt.messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "Left? "},
        {"type": "image"},
        {"type": "text", "text": "Right?"},
        {"type": "image"},
    ]


def test_images_without_a_placeholder_go_to_the_start_of_the_first_user_turn(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    prompt = load_row(tmp_path, {"messages": turns, "images": ["a.png", "a.png"], "answer": "4"})
    assert prompt.messages[0] == turns[0]
    assert prompt.messages[1]["content"] == [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "What?"},
    ]


def test_a_marker_in_a_typed_text_part_is_literal_text(tmp_path):
    prompt = load_row(tmp_path, ask([{"type": "text", "text": "What does <image> do in SVG?"}]))
    assert prompt.messages[0]["content"] == "What does <image> do in SVG?"


def test_a_closing_assistant_turn_is_not_part_of_the_prompt(tmp_path):
    turns = [("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two")]
    prompt = load_row(tmp_path, {"messages": [{"role": r, "content": c} for r, c in turns], "answer": "2"})
    assert [(m["role"], m["content"]) for m in prompt.messages] == turns[:3]
    assert prompt.answer == "2"


def test_llava_conversations_give_markers_images_and_the_last_reply_as_answer(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "Colour?"), ("gpt", "Black")]
    row = {"image": "a.png", "conversations": [{"from": f, "value": v} for f, v in turns]}
    prompt = load_row(tmp_path, row)
    assert prompt.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert [m["role"] for m in prompt.messages] == ["user", "assistant", "user"]
    assert prompt.answer == "Black"
    assert load_row(tmp_path, {**row, "answer": "black cat"}).answer == "black cat"


def test_turns_stored_by_column_are_read_as_turns(tmp_path):
    row = {"conversations": {"from": ["human", "gpt"], "value": ["2 + 2?", "4"]}}
    assert load_row(tmp_path, row).messages == ({"role": "user", "content": "2 + 2?"},)


def test_plain_columns_go_through_the_template(tmp_path):
    (tmp_path / "c.png").write_bytes(encoded())
    row = {"query": "Highest bar?", "choices": ["red", "blue"], "label": ["blue"], "img": "c.png"}
    prompt = load_row(
        tmp_path,
        row,
        prompt="<image>\n{query}\n{choices}\nAnswer in \\boxed{} like {{letter}}.",
        columns={"answer": "label", "image": "img"},
    )
    text = "Highest bar?\nA. red\nB. blue\nAnswer in \\boxed{} like {letter}."
    assert prompt.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": text}]
    assert prompt.answer == ["blue"] and prompt.images == (tmp_path / "c.png",)


def test_a_question_column_needs_no_template(tmp_path):
    assert load_row(tmp_path, {"question": "2 + 2?", "answer": 4}).messages[0]["content"] == "2 + 2?"
    prompt = load_row(tmp_path, {"query": "2 + 2?", "answer": 4}, columns={"question": "query"})
    assert prompt.messages[0]["content"] == "2 + 2?"


def test_columns_reach_into_nested_rows(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "reward_model": {"ground_truth": "4"},
        "ability": "math",
    }
    columns = {"messages": "prompt", "answer": "reward_model.ground_truth", "domain": "ability"}
    prompt = load_row(tmp_path, row, columns=columns)
    assert (prompt.messages[0]["content"], prompt.answer, prompt.domain) == ("2 + 2?", "4", "math")


@pytest.mark.parametrize(
    ("given_answer", "kept"),
    [
        (204, "204"),
        (0, "0"),
        (0.5, "0.5"),
        (["a", None, "b"], ["a", "b"]),
        ({"inputs": ["1"]}, '{"inputs": ["1"]}'),
    ],
)
def test_answers_become_text(tmp_path, given_answer, kept):
    assert load_row(tmp_path, ask(answer=given_answer)).answer == kept


def test_image_text_is_one_description_per_image(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    assert load_row(tmp_path, ask(image="a.png", image_text="a red square")).image_text == ("a red square",)
    two = ask(images=["a.png", "a.png"], image_text=["left", "right"])
    assert load_row(tmp_path, two).image_text == ("left", "right")
    assert load_row(tmp_path, ask(image="a.png", image_text="")).image_text is None


def test_relative_images_start_from_the_data_file_or_from_image_root(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded())
    assert load_row(tmp_path, ask(image="pictures/a.png")).images == (tmp_path / "pictures/a.png",)
    prompt = load_row(tmp_path, ask(image="a.png"), image_root=str(tmp_path / "pictures"))
    assert prompt.images == (tmp_path / "pictures/a.png",)


# Files


def arrow_rows() -> dict[str, list]:
    return {
        "query": ["Left?", "Right?", "No picture?"],
        "label": [["3"], ["5"], ["7"]],
        "image": [{"bytes": encoded("red"), "path": None}, {"bytes": encoded("blue"), "path": "b.png"}, None],
        "kind": [0, 1, 0],
    }


def arrow_dataset():
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        query=Value("string"),
        label=List(Value("string")),
        image=ImageFeature(),
        kind=ClassLabel(names=["read", "sum"]),
    )
    return Dataset.from_dict(arrow_rows(), features=features)


@pytest.mark.parametrize("form", ["parquet", "saved", "saved_dict", "repository"])
def test_parquet_and_datasets_folders_give_the_same_prompts(tmp_path, form):
    from datasets import DatasetDict

    data = arrow_dataset()
    path = tmp_path / ("toy.parquet" if form == "parquet" else "toy")
    if form == "parquet":
        data.to_parquet(path)
    elif form == "saved":
        data.save_to_disk(path)
    elif form == "saved_dict":
        DatasetDict(train=data, val=data.select([0])).save_to_disk(path)
    else:
        (path / "data").mkdir(parents=True)
        data.to_parquet(path / "data" / "train-00000-of-00001.parquet")
    columns = {"answer": "label", "domain": "kind"}
    prompts = load_prompts([source(path, columns=columns, prompt="{query}")])
    assert [p.answer for p in prompts] == [["3"], ["5"], ["7"]]
    assert [p.domain for p in prompts] == ["read", "sum", "read"], "class labels are read by name"
    assert prompts[2].images == () and prompts[2].messages[0]["content"] == "No picture?"
    assert prompts[0].images == (encoded("red"),), "images stay encoded until they are opened"
    assert open_images(prompts[1])[0].getpixel((0, 0)) == (0, 0, 255)
    assert prompts[1].source.endswith(":2")


def test_lists_of_images_in_arrow_are_read_and_checked_row_by_row(tmp_path):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    red, blue = ({"bytes": encoded(color), "path": None} for color in ("red", "blue"))
    images = [[red, blue], [], None, [{"bytes": b"", "path": "gone.png"}]]
    features = Features(images=List(ImageFeature()), question=Value("string"), answer=Value("string"))
    rows = {"images": images, "question": ["q"] * 4, "answer": ["a"] * 4}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "toy")
    prompts = load_prompts([source(tmp_path / "toy", prompt="{question}")], max_bad_share=0.5)
    assert [len(p.images) for p in prompts] == [2, 0, 0]
    assert open_images(prompts[0])[1].getpixel((0, 0)) == (0, 0, 255)
    assert [str(row) for row in prompts.bad_rows] == [
        f"{tmp_path}/toy[train]:4: image 1 of 1 is empty (0 bytes)"
    ]


def test_checking_an_arrow_source_reads_no_image_bytes(tmp_path, monkeypatch):
    arrow_dataset().save_to_disk(tmp_path / "toy")
    monkeypatch.setattr(ArrowRows, "read", lambda *_: pytest.fail("a whole row was read while checking"))
    prompts = load_prompts([source(tmp_path / "toy", columns={"answer": "label"}, prompt="{query}")])
    scanned = [row["image"] for row in prompts.sources[0].rows.scan(0, 3)]
    sizes = [image and image["bytes"] for image in scanned]
    assert scanned == [{"bytes": sizes[0], "path": None}, {"bytes": sizes[1], "path": "b.png"}, None]
    assert all(size.isdigit() for size in sizes[:2])


@pytest.mark.parametrize("text", ["list", "lines"])
def test_json_files_may_hold_a_list_or_lines(tmp_path, text):
    rows = [ask("1?"), ask("2?")]
    path = tmp_path / "toy.json"
    path.write_text(
        "\ufeff" + json.dumps(rows, indent=1) if text == "list" else "\n".join(map(json.dumps, rows))
    )
    assert [p.messages[0]["content"] for p in load_prompts(str(path))] == ["1?", "2?"]


def test_a_mixture_finds_files_beside_itself_and_names_ids_after_its_sources(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ask(id=1))
    write_jsonl(tmp_path / "b.jsonl", ask(id=1, domain="own"))
    (tmp_path / "mix.yaml").write_text(
        "sources:\n- path: a.jsonl\n  domain: chart\n- {path: b.jsonl, name: other, domain: doc}\n"
    )
    prompts = load_prompts(str(tmp_path / "mix.yaml"))
    assert [p.id for p in prompts] == ["a/1", "other/1"]
    assert prompts.domains() == {"chart": 1, "own": 1}


def test_mixture_mistakes_are_reported_together_with_line_and_suggestion(tmp_path):
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        "sources:\n- path: a.jsonl\n  colums: {a: b}\n  weight: -1\n- nmae: b\nshuffel: true\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_prompts(str(mixture))
    message = str(caught.value)
    assert "mix.yaml:3: Unknown setting 'sources.0.colums'. Did you mean 'sources.0.columns'?" in message
    assert "mix.yaml:4: sources.0.weight" in message
    assert "sources.1.path: Field required" in message
    assert "Did you mean 'sources.1.name'?" in message
    assert "mix.yaml:6: Unknown setting 'shuffel'" in message


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "data" / "mixtures").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_mixtures_are_valid_and_give_every_source_a_domain(path):
    mixture = load_config(MixtureConfig, path)
    names = [s.name for s in mixture.sources]
    assert None not in names and len(set(names)) == len(names)
    for each in mixture.sources:
        check_source(each)
        assert each.domain or "domain" in each.columns


def test_a_missing_mixture_says_where_mixtures_are():
    with pytest.raises(DataError, match="data/mixtures"):
        load_prompts("nowhere.yaml")


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    (tmp_path / "mix.yaml").write_text("sources: [{path: gone.jsonl}]")
    with pytest.raises(
        DataError, match=rf"no data at 'gone.jsonl' \(looked for {tmp_path}/gone.jsonl, gone.jsonl\)"
    ):
        load_prompts(str(tmp_path / "mix.yaml"))


def test_an_unreachable_hub_id_is_named(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"cannot load 'some-org/some-set'.*split: train.*network"):
        load_prompts("some-org/some-set")


def test_a_missing_split_lists_the_splits(tmp_path):
    from datasets import DatasetDict

    DatasetDict(train=arrow_dataset()).save_to_disk(tmp_path / "toy")
    with pytest.raises(DataError, match=r"no split 'val'.*train"):
        load_prompts([source(tmp_path / "toy", split="val")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("toy.csv", b"a,b\n", "'.csv' file. Expected .jsonl"),
        ("toy.jsonl", b"\n\n", "holds 0 rows"),
        ("toy.json", b'[{"a": 1},\n', "toy.json:2: the file is not valid JSON"),
        ("toy.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("toy.json", b'{\n "data": []\n}', "expected a JSON list of rows, or one row a line"),
        ("toy.parquet", b"not parquet", "cannot load"),
    ],
)
def test_an_unreadable_file_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_prompts(str(tmp_path / name))
    assert message in str(caught.value) and name in str(caught.value)


def test_a_file_that_changes_during_a_run_is_noticed(tmp_path):
    path = write_jsonl(tmp_path / "toy.jsonl", ask(), ask())
    prompts = load_prompts(str(path))
    write_jsonl(path, ask("another question"), ask())
    with pytest.raises(DataError, match="changed while in use"):
        prompts[0]


# Bad rows, one by one


def test_a_line_that_is_not_json_is_bad(tmp_path):
    assert "not JSON" in reason(tmp_path, '{"messages": [')


def test_a_line_that_is_not_an_object_is_bad(tmp_path):
    assert "expected an object" in reason(tmp_path, "[1, 2]")


def test_a_line_that_is_not_utf8_is_bad(tmp_path):
    path = tmp_path / "toy.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n' + json.dumps(ask()).encode())
    (bad,) = load_prompts(str(path), max_bad_share=0.5).bad_rows
    assert bad.source == f"{path}:1" and "UTF-8" in bad.reason


def test_half_of_a_surrogate_pair_is_bad(tmp_path):
    assert "surrogate" in reason(tmp_path, ask("How many \ud83d?"))
    assert "surrogate" in reason(tmp_path, ask() | {"answer": "\ude00"})


def test_missing_messages_are_bad(tmp_path):
    text = reason(tmp_path, {"query": "2 + 2?", "answer": "4"})
    assert "no messages, conversations or question" in text and "its columns: query, answer" in text


def test_empty_messages_are_bad(tmp_path):
    assert "holds no turns" in reason(tmp_path, ask() | {"messages": []})


def test_messages_that_are_mere_text_are_bad(tmp_path):
    assert "`messages` is text" in reason(tmp_path, ask() | {"messages": "2 + 2?"})


def test_an_unknown_role_is_bad(tmp_path):
    assert "the role 'tool'" in reason(tmp_path, ask() | {"messages": [{"role": "tool", "content": "x"}]})


def test_a_turn_without_content_is_bad(tmp_path):
    assert "turn 1 (user) has no content" in reason(tmp_path, ask(None))


def test_an_empty_user_turn_is_bad(tmp_path):
    assert "empty" in reason(tmp_path, ask(""))


def test_a_row_of_only_assistant_turns_is_bad(tmp_path):
    row = {"messages": [{"role": "assistant", "content": "4"}], "answer": "4"}
    assert "no user turn" in reason(tmp_path, row)


def test_a_video_part_is_bad(tmp_path):
    assert "type 'video' are not supported" in reason(tmp_path, ask([{"type": "video", "video": "a.mp4"}]))


def test_a_missing_image_file_is_bad(tmp_path):
    assert f"no such file: {tmp_path}/gone.png" in reason(tmp_path, ask(image="gone.png"))


def test_text_that_is_neither_a_path_nor_an_image_is_bad(tmp_path):
    assert "no such file" in reason(tmp_path, ask(image="Qk0" * 10_000))


def test_an_image_url_is_bad(tmp_path):
    assert "is a URL" in reason(tmp_path, ask(image="https://example.org/a.png"))


def test_a_null_image_among_images_is_bad(tmp_path):
    assert "image 1 of 1 is null" in reason(tmp_path, ask("<image>?", images=[None]))


def test_an_image_of_an_unknown_kind_is_bad(tmp_path):
    assert "image 1 of 1 is int" in reason(tmp_path, ask(image=3))
    assert "neither bytes nor path" in reason(tmp_path, ask(image={"uri": "a.png"}))


def test_more_or_fewer_placeholders_than_images_are_bad(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    assert "2 image placeholders but 1 image" in reason(tmp_path, ask("<image><image>?", image="a.png"))
    assert "1 image placeholder but 2 images" in reason(tmp_path, ask("<image>?", images=["a.png"] * 2))


def test_a_marker_without_any_image_is_bad_and_says_how_to_write_it_literally(tmp_path):
    assert "typed text part" in reason(tmp_path, ask("<image>\nWhat is this?"))


def test_too_few_image_texts_are_bad(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    assert "1 image_text but 2 images" in reason(tmp_path, ask(images=["a.png"] * 2, image_text=["left"]))


def test_an_image_text_without_an_image_is_bad(tmp_path):
    assert "1 image_text but 0 images" in reason(tmp_path, ask(image_text="a chart"))


def test_one_blank_image_text_among_several_is_bad(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    row = ask(images=["a.png"] * 2, image_text=["left", " "])
    assert "image_text 2 of 2 is empty" in reason(tmp_path, row)


def test_an_unknown_domain_is_bad_and_lists_the_known_ones(tmp_path):
    text = reason(tmp_path, ask(domain="poetry"), known={"domains": {"math", "ok"}})
    assert "unknown domain 'poetry'" in text and "math, ok" in text


def test_an_unknown_verifier_is_bad(tmp_path):
    assert "unknown verifier 'mth'" in reason(tmp_path, ask(verifier="mth"), known={"verifiers": {"math"}})


@pytest.mark.parametrize("blank", [None, "", "  ", [], [""], {}])
def test_an_empty_answer_is_bad_where_answers_are_required(tmp_path, blank):
    assert reason(tmp_path, ask(answer=blank)) == "the answer is empty"
    prompts = load_prompts(str(write_jsonl(tmp_path / "toy.jsonl", ask(answer=blank))), require_answer=False)
    assert prompts[0].answer is None


def test_a_duplicate_id_is_bad_and_names_the_first(tmp_path):
    path = write_jsonl(tmp_path / "toy.jsonl", ask(id="x"), ask(id="x"))
    (bad,) = load_prompts(str(path), max_bad_share=0.5).bad_rows
    assert bad.source == f"{path}:2" and f"already used by {path}:1" in bad.reason


def test_repeating_ids_can_be_replaced_by_row_numbers(tmp_path):
    path = write_jsonl(tmp_path / "toy.jsonl", ask(id="x"), ask(id="x"))
    prompts = load_prompts([source(path, columns={"id": "#"})], max_bad_share=0)
    assert [p.id for p in prompts] == ["toy/1", "toy/2"]


def test_a_missing_column_is_bad_and_lists_the_columns(tmp_path):
    text = reasons(tmp_path, {"query": "?"}, ask(label="4"), columns={"answer": "label"})[0]
    assert "no column 'label' (its columns: query)" in text


def test_a_null_template_column_is_bad(tmp_path):
    assert "column 'q' of the prompt template" in reason(tmp_path, {"q": None, "answer": "4"}, prompt="{q}")


def test_all_problems_of_a_row_are_listed(tmp_path):
    row = ask(domain="poetry", verifier="mth", answer="", image="gone.png")
    found = reasons(tmp_path, row, known={"domains": {"ok"}, "verifiers": {"math"}})
    assert len(found) == 4


def test_the_rows_shown_in_the_readme_load(tmp_path):
    readme = (REPOSITORY / "data" / "README.md").read_text()
    rows = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", readme, re.DOTALL)]
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.png").write_bytes(encoded())
    prompts = load_prompts(str(write_jsonl(tmp_path / "toy.jsonl", *rows)), max_bad_share=0)
    assert [p.id for p in prompts] == [f"toy/{row['id']}" for row in rows]
    assert [len(p.images) for p in prompts] == [1, 2, 1, 1]
    assert [p.answer for p in prompts] == ["blue", ["the first", "first"], "2", "4"]


def test_the_mixture_shown_in_the_readme_names_every_setting(tmp_path):
    readme = (REPOSITORY / "data" / "README.md").read_text()
    (tmp_path / "mix.yaml").write_text(re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)[1])
    shown = load_config(MixtureConfig, tmp_path / "mix.yaml").sources[1]
    assert shown.model_fields_set == set(SourceConfig.model_fields)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from(["", "user", "gpt", "text", "image", "<image>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "image", "text"]), inner
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from([*FIELDS, "query"]), JSON),
    st.sampled_from([None, "{query}", "<image>{query}"]),
)
@settings(max_examples=60, deadline=None)
def test_any_row_at_all_is_a_prompt_or_a_row_error(row, template):
    try:
        prompt = parse_row(row, source(Path("x.jsonl"), prompt=template), "x", "x.jsonl:1", 1, "")
    except RowError as error:
        assert error.reasons and all(error.reasons)
        return
    parts = [p for m in prompt.messages if not isinstance(m["content"], str) for p in m["content"]]
    assert sum(part == {"type": "image"} for part in parts) == len(prompt.images)
    assert prompt.messages[-1]["role"] == "user" and prompt.messages[-1]["content"]
