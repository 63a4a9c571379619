"""The ChartQA converter reads every published layout, and what it writes loads as prompts."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from uniopd_mm.prompts import load_prompts, open_images

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "convert" / "chartqa.py"


@pytest.fixture(scope="module")
def chartqa():
    spec = importlib.util.spec_from_file_location("convert_chartqa", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Converted Parquet goes to a temporary folder instead of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def chart(color: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(stream, "PNG")
    return stream.getvalue()


def hub_parquet(path: Path, rows: list[tuple[bytes | None, str, list[str], int]]) -> Path:
    """A Parquet file with the columns and features of the hub's copy."""
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        image=ImageFeature(),
        query=Value("string"),
        label=List(Value("string")),
        human_or_machine=ClassLabel(names=["human", "machine"]),
    )
    images = [data and {"bytes": data, "path": None} for data, *_ in rows]
    columns = zip(*((query, label, kind) for _, query, label, kind in rows), strict=True)
    names = ("query", "label", "human_or_machine")
    data = {"image": images, **{name: list(column) for name, column in zip(names, columns, strict=True)}}
    Dataset.from_dict(data, features=features).to_parquet(path)
    return path


ROWS = [
    (chart("red"), "Highest bar?", ["14"], 0),
    (chart("red"), "Lowest bar?", ["3"], 1),
    (chart("blue"), "Which years?", ["2001", "2002"], 0),
]


def authors_folder(root: Path) -> Path:
    """The layout of the authors' own release."""
    train = root / "ChartQA Dataset" / "train"
    for name in ("png", "tables"):
        (train / name).mkdir(parents=True)
    (train / "png" / "c1.png").write_bytes(chart("red"))
    (train / "png" / "c2.png").write_bytes(chart("blue"))
    (train / "tables" / "c1.csv").write_text("Year,Value\n2001,14\n")
    human = [{"imgname": "c1.png", "query": "Highest bar?", "label": "14"}]
    augmented = [{"imgname": "c2.png", "query": "Lowest bar?", "label": "3"}]
    (train / "train_human.json").write_text(json.dumps(human))
    (train / "train_augmented.json").write_text(json.dumps(augmented))
    return train.parent


def lines(out: Path, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]


def test_the_hub_layout_becomes_rows_that_load_as_prompts(chartqa, tmp_path):
    source = hub_parquet(tmp_path / "train.parquet", ROWS)
    assert chartqa.main([str(source), "--out", str(tmp_path / "out")]) == 0
    prompts = load_prompts(
        str(tmp_path / "out" / "train.jsonl"), domains={"chart"}, verifiers={"chart"}, max_bad_share=0
    )
    assert [p.id for p in prompts] == ["train/human-1", "train/augmented-2", "train/human-3"]
    assert [p.answer for p in prompts] == ["14", "3", ["2001", "2002"]]
    image, text = prompts[2].messages[0]["content"]
    assert image == {"type": "image"} and text["text"].startswith("Which years?\n")
    assert open_images(prompts[2])[0].getpixel((0, 0)) == (0, 0, 255)


def test_questions_about_one_chart_share_one_file(chartqa, tmp_path):
    chartqa.main([str(hub_parquet(tmp_path / "train.parquet", ROWS)), "--out", str(tmp_path / "out")])
    rows = lines(tmp_path / "out")
    assert rows[0]["images"] == rows[1]["images"] != rows[2]["images"]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


def test_the_authors_layout_carries_the_data_table_for_text_only_teachers(chartqa, tmp_path):
    source = authors_folder(tmp_path)
    assert chartqa.main([str(source), "--out", str(tmp_path / "out"), "--suffix", ""]) == 0
    prompts = load_prompts(str(tmp_path / "out" / "train.jsonl"), max_bad_share=0)
    assert [p.id for p in prompts] == ["train/human-1", "train/augmented-1"]
    assert "Year,Value\n2001,14" in prompts[0].image_text[0]
    assert prompts[1].image_text is None
    assert prompts[0].messages[0]["content"][1]["text"] == "Highest bar?"


@pytest.mark.parametrize("layout", ["hub", "authors"])
def test_part_and_limit_choose_questions(chartqa, tmp_path, layout):
    source = hub_parquet(tmp_path / "t.parquet", ROWS) if layout == "hub" else authors_folder(tmp_path)
    chartqa.main([str(source), "--out", str(tmp_path / "out"), "--part", "augmented"])
    assert [row["messages"][0]["content"].split("\n")[1] for row in lines(tmp_path / "out")] == [
        "Lowest bar?"
    ]
    chartqa.main([str(source), "--out", str(tmp_path / "out"), "--limit", "1"])
    assert len(lines(tmp_path / "out")) == 1


def test_an_interrupted_conversion_leaves_no_half_file_and_keeps_its_images(chartqa, tmp_path, monkeypatch):
    command = [str(hub_parquet(tmp_path / "train.parquet", ROWS)), "--out", str(tmp_path / "out")]
    real, calls = chartqa.to_row, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(chartqa, "to_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chartqa.main(command)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["images"]
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    assert len(before) == 2 and not any(path.name.endswith(".part") for path in before)
    assert chartqa.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "images must not be written again"
    assert len(lines(tmp_path / "out")) == 3


def test_a_failing_image_write_is_not_taken_for_a_bad_question(chartqa, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chartqa.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        chartqa.main([str(hub_parquet(tmp_path / "train.parquet", ROWS)), "--out", str(tmp_path / "out")])


def test_a_few_unusable_questions_are_reported_and_left_out(chartqa, tmp_path, capsys):
    rows = [
        *ROWS,
        (None, "No chart?", ["1"], 0),
        (chart("red"), "No label?", [], 1),
        (b"broken", "Broken?", ["1"], 0),
    ]
    source = hub_parquet(tmp_path / "train.parquet", rows)
    assert chartqa.main([str(source), "--out", str(tmp_path / "out"), "--max-bad-share", "0.5"]) == 0
    assert len(lines(tmp_path / "out")) == 3
    printed = capsys.readouterr().err
    assert "3 of 6 questions cannot be used" in printed
    for text in ("human-4 has no image", "augmented-5 has no label", "human-6 its image cannot be decoded"):
        assert text in printed


def test_too_many_unusable_questions_write_nothing(chartqa, tmp_path, capsys):
    source = hub_parquet(tmp_path / "train.parquet", [*ROWS, (None, "No chart?", ["1"], 0)])
    assert chartqa.main([str(source), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert "1 of 4 questions" in capsys.readouterr().err


def test_a_missing_chart_in_the_authors_layout_is_reported(chartqa, tmp_path, capsys):
    source = authors_folder(tmp_path)
    (source / "train" / "png" / "c2.png").unlink()
    assert chartqa.main([str(source), "--out", str(tmp_path / "out"), "--max-bad-share", "0.5"]) == 0
    assert "c2.png is missing" in capsys.readouterr().err


def test_a_split_that_is_not_there_lists_those_that_are(chartqa, tmp_path, capsys):
    source = authors_folder(tmp_path)
    assert chartqa.main([str(source), "--out", str(tmp_path / "out"), "--split", "val"]) == 1
    assert "has no split 'val'. Use --split train." in capsys.readouterr().err


def test_a_source_without_the_columns_says_which_are_missing(chartqa, tmp_path, capsys):
    from datasets import Dataset

    Dataset.from_dict({"image": ["x"], "text": ["y"]}).to_parquet(tmp_path / "x.parquet")
    assert chartqa.main([str(tmp_path / "x.parquet"), "--out", str(tmp_path / "out")]) == 1
    assert "has no column query, label" in capsys.readouterr().err


def test_a_source_that_cannot_be_loaded_is_one_clear_line(chartqa, tmp_path, capsys):
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    assert chartqa.main([str(tmp_path / "x.parquet"), "--out", str(tmp_path / "out")]) == 1
    assert "error: cannot load split 'train'" in capsys.readouterr().err


def test_the_script_runs_on_its_own_and_explains_itself():
    run = [sys.executable, "-I", str(SCRIPT), "--help"]
    assert "--limit" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
