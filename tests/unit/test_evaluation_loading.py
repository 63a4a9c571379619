"""Rows from files in the public layouts; what is wrong with them is said with what is there."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluating import GREEDY, prompt
from PIL import Image

from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Source
from uniopd_mm.evaluation.loading import IN_MEMORY, load_rows
from uniopd_mm.evaluation.tasks import RowImage, load_task
from uniopd_mm.prompts import open_images


def png(light: int = 9) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (light, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def benchmark(*sources: Source, columns: tuple[str, ...] = ("id",), **more: Any) -> Benchmark:
    def read(row: Any, preset: Preset, profile: str):
        if row.get("broken"):
            raise DataError(f"{row['id']} is broken")
        return prompt(str(row["id"]))

    return Benchmark(
        "bench", "Bench", "text_math", sources or (Source("org/bench"),), columns, {}, read, **more
    )


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ids(rows: Any) -> list[Any]:
    return [row["id"] for row in rows]


ROWS = [{"id": i} for i in range(5)]


@pytest.mark.parametrize(
    "name",
    [
        "data/test-00000-of-00001.parquet",
        "test.jsonl",
        "test/part.json",
        "test-00000-of-00001-ab12.parquet",
        "test.parquet",
    ],
)
def test_a_split_is_found_in_every_public_layout(name: str, tmp_path: Path) -> None:
    write(tmp_path / "bench" / name, ROWS)
    write(tmp_path / "bench" / "data" / "train-00000-of-00001.parquet", [{"id": "no"}])
    assert ids(load_rows(benchmark(), tmp_path)) == [0, 1, 2, 3, 4]
    assert ids(load_rows(benchmark(), tmp_path, limit=2)) == [0, 1]
    assert ids(load_rows(benchmark(), tmp_path, split="train")) == ["no"]


def test_parts_of_a_split_are_read_in_order_and_a_subset_is_a_folder(tmp_path: Path) -> None:
    for k in range(3):
        write(
            tmp_path / "bench" / "Sub" / f"test-{k:05d}-of-00003.parquet",
            [{"id": 10 * k}, {"id": 10 * k + 1}],
        )
    write(tmp_path / "bench" / "Other" / "test-00000-of-00001.parquet", [{"id": "no"}])
    made = benchmark(Source("org/bench", "Sub"))
    assert ids(load_rows(made, tmp_path)) == [0, 1, 10, 11, 20, 21]
    assert ids(load_rows(made, tmp_path, limit=3)) == [0, 1, 10]


def test_images_stay_encoded_and_open_late(tmp_path: Path) -> None:
    write(tmp_path / "bench" / "test.parquet", [{"id": 1, "image": {"bytes": png(), "path": None}}])
    (row,) = load_rows(benchmark(columns=("id", "image")), tmp_path)
    assert row["image"]["bytes"] == png()
    assert open_images(prompt("a", images=(row["image"],)))[0].size == (4, 3)


def test_pictures_of_a_zip_and_beside_a_table_take_the_place_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    write(
        folder / "data.jsonl",
        [{"id": 1, "image_path": "images/0.png"}, {"id": 2, "image_path": "images/gone.png"}],
    )
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("packed/images/0.png", png(1))
    made = benchmark(Source("org/bench", files=("data.jsonl", "images.zip")))
    found = [row["image_path"] for row in load_rows(made, tmp_path)]
    assert found == [{"bytes": png(1), "path": "images/0.png"}, "images/gone.png"]
    (folder / "images").mkdir()
    (folder / "images" / "gone.png").write_bytes(png(2))
    alone = load_rows(benchmark(Source("org/bench", files=("data.jsonl",))), tmp_path)
    assert open_images(prompt("a", images=(alone[1]["image_path"],)))[0].getpixel((0, 0)) == (2, 0, 0)


def with_pictures(*sources: Source) -> Benchmark:
    def read(row: Any, preset: Preset, profile: str):
        return prompt(str(row["id"]), images=(row["image"],))

    return replace(benchmark(*sources, columns=("id", "image")), read=read)


def lightness(task: Any) -> list[int]:
    return [open_images(one)[0].getpixel((0, 0))[0] for one in task.prompts]


def test_the_pictures_of_many_rows_stay_on_disk_until_they_are_opened(tmp_path: Path) -> None:
    rows = [{"id": i, "image": {"bytes": png(i % 200), "path": f"{i}.png"}} for i in range(IN_MEMORY + 4)]
    for k, some in enumerate((rows[:7], rows[7:])):
        write(tmp_path / "bench" / f"test-{k:05d}-of-00002.parquet", some)
    task = load_task(with_pictures(), Preset(GREEDY), "strict", tmp_path)
    assert list(task.rows) == [row | {"image": {"bytes": None, "path": f"{row['id']}.png"}} for row in rows]
    assert all(isinstance(one.images[0], RowImage) for one in task.prompts)
    assert lightness(task) == [i % 200 for i in range(len(rows))]
    few = load_task(with_pictures(), Preset(GREEDY, limit=9), "strict", tmp_path)
    assert lightness(few) == list(range(9))


def test_the_pictures_of_a_zip_stay_in_it_until_they_are_opened(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    write(folder / "data.jsonl", [{"id": i, "image": f"{i}.png"} for i in range(3)])
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", png(i))
    made = with_pictures(Source("org/bench", files=("data.jsonl", "images.zip")))
    task = load_task(made, Preset(GREEDY), "strict", tmp_path)
    assert task.rows[1] == {"id": 1, "image": {"bytes": None, "path": "1.png"}}
    assert lightness(task) == [0, 1, 2]


def test_a_damaged_file_in_a_zip_costs_its_row_alone(tmp_path: Path) -> None:
    folder, n = tmp_path / "bench", 200
    write(folder / "data.jsonl", [{"id": i, "image": f"{i}.png"} for i in range(n)])
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(n):
            archive.writestr(f"{i}.png", png(i))
        start = archive.getinfo("7.png").header_offset
    content = bytearray((folder / "images.zip").read_bytes())
    content[start + 60] ^= 255
    (folder / "images.zip").write_bytes(content)
    made = with_pictures(Source("org/bench", files=("data.jsonl", "images.zip")))
    task = load_task(made, Preset(GREEDY), "strict", tmp_path)
    assert lightness(task) == [i for i in range(n) if i != 7]
    (left_out,) = task.left_out
    assert "row 8: 7.png in" in left_out and "is damaged" in left_out


def test_a_zip_that_no_row_names_a_file_of_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "bench" / "data.jsonl", [{"id": 1, "image": "elsewhere.png"}])
    with zipfile.ZipFile(tmp_path / "bench" / "images.zip", "w") as archive:
        archive.writestr("0.png", png())
    with pytest.raises(DataError, match=r"no row names a file of images\.zip"):
        load_rows(with_pictures(Source("org/bench", files=("data.jsonl", "images.zip"))), tmp_path)


def test_sources_are_tried_in_order_and_every_failure_is_told(tmp_path: Path) -> None:
    write(tmp_path / "bench" / "test.jsonl", [{"id": 1, "question": "q"}])
    made = benchmark(Source("org/a", files=("first.jsonl",)), Source("org/b"), columns=("id", "question"))
    assert len(load_rows(made, tmp_path)) == 1
    made = benchmark(
        Source("org/a", files=("first.jsonl",)),
        Source("org/b", split="validation"),
        Source("org/c"),
        columns=("id", "gold"),
    )
    with pytest.raises(DataError) as error:
        load_rows(made, tmp_path)
    for part in ("holds no first.jsonl, but test.jsonl", "split 'validation', but test.jsonl"):
        assert part in str(error.value), str(error.value)
    assert "row 1 has no column gold; it has id, question" in str(error.value)


def test_the_number_of_rows_is_checked_unless_a_part_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "bench" / "test.jsonl", ROWS)
    made = benchmark(n_rows=30)
    with pytest.raises(DataError, match=r"has 30 rows, 5 were found(.|\n)*--limit"):
        load_rows(made, tmp_path)
    assert len(load_rows(made, tmp_path, check_count=False)) == 5
    assert len(load_rows(made, tmp_path, limit=40)) == 5


@pytest.mark.parametrize("name", ["test.jsonl.gz", "data/test-00000-of-00001.json.gz"])
def test_gzipped_tables_are_read(name: str, tmp_path: Path) -> None:
    write(tmp_path / "plain" / Path(name).stem, ROWS)
    (tmp_path / "bench" / name).parent.mkdir(parents=True)
    (tmp_path / "bench" / name).write_bytes(
        gzip.compress((tmp_path / "plain" / Path(name).stem).read_bytes())
    )
    assert ids(load_rows(benchmark(), tmp_path)) == [0, 1, 2, 3, 4]
    named = benchmark(Source("org/bench", files=(name.removesuffix(".gz"),)))
    assert ids(load_rows(named, tmp_path, limit=2)) == [0, 1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no gzip at all", "test.jsonl.gz is not a gzip file"),
        (gzip.compress(b'{"id": 1}\n' * 9999)[:-20], "test.jsonl.gz is damaged"),
        (gzip.compress(b'{"id": 1}\n{"id"'), r"test.jsonl.gz:2: the line is not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer(.|\n)*git lfs pull"),
    ],
)
def test_what_is_wrong_with_a_gzipped_file_is_said(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "test.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_rows(benchmark(), tmp_path)


def test_a_bad_line_is_named_once_with_its_file_and_number(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "test.jsonl").write_text('{"id": 1}\n{"id": ')
    with pytest.raises(DataError) as error:
        load_rows(benchmark(Source("org/a"), Source("org/b")), tmp_path)
    assert str(error.value).count("test.jsonl:2: the line is not JSON") == 1
    assert "damaged" not in str(error.value)


def test_late_columns_stay_in_their_file(tmp_path: Path) -> None:
    """Also behind a byte order mark, empty lines and letters of several bytes."""
    rows = [{"id": "é", "big": "x" * 100}, {"id": "b", "big": "y"}, {"id": "c"}]
    path = tmp_path / "bench" / "test.jsonl"
    path.parent.mkdir()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    made = benchmark(Source("org/bench", files=("test.jsonl",), late=("big",)))
    found = load_rows(made, tmp_path)
    assert ids(found) == ["é", "b", "c"] and "big" not in found[2]
    for row, wanted in zip(found[:2], rows, strict=False):
        with open(row["big"]["file"], "rb") as file:
            file.seek(row["big"]["offset"])
            assert json.loads(file.readline()) == wanted
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    with pytest.raises(DataError, match=r"Type: gunzip .*test\.jsonl\.gz"):
        load_rows(made, tmp_path)


def test_a_split_that_is_not_there_is_not_taken_for_the_one_that_is(tmp_path: Path) -> None:
    write(tmp_path / "bench" / "rows.jsonl", ROWS)
    made = benchmark(Source("org/bench", files=("rows.jsonl",)), n_rows=5)
    assert len(load_rows(made, tmp_path, split="test")) == 5
    with pytest.raises(DataError, match="no split 'validation', only 'test'"):
        load_rows(made, tmp_path, split="validation")


def test_a_folder_that_is_not_there_is_told_with_what_is_and_how_to_fetch_it(tmp_path: Path) -> None:
    (tmp_path / "bnech").mkdir()
    with pytest.raises(DataError) as error:
        load_rows(benchmark(Source("org/bench", files=("data/*.parquet",))), tmp_path)
    assert "with bnech" in str(error.value)
    command = (
        f"hf download org/bench --repo-type dataset --include 'data/*.parquet' --local-dir {tmp_path}/bench"
    )
    assert command in str(error.value)
    with pytest.raises(DataError, match=f"and no {tmp_path}/none"):
        load_rows(benchmark(), tmp_path / "none")


@pytest.mark.parametrize("name", ["test.parquet", "test.json", "test.jsonl"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / name).write_text('{"id": 1')
    with pytest.raises(DataError, match=name):
        load_rows(benchmark(), tmp_path)


def test_a_hub_that_cannot_be_reached_says_so_and_offers_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError,
        match=r"org/bench(.|\n)*no route to the hub(.|\n)*--source FOLDER:\n  hf download org/bench",
    ):
        load_rows(benchmark())


def test_a_hub_data_set_is_read_without_decoding_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The public loader, on a local copy: the arguments it gets are those of the source."""
    import datasets

    asked: dict[str, Any] = {}
    features = datasets.Features({"id": datasets.Value("int64"), "image": datasets.Image()})
    made = datasets.Dataset.from_dict({"id": [1, 2], "image": [{"bytes": png(), "path": None}] * 2}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: asked.update(kw, path=args[0]) or made)
    rows = load_rows(benchmark(Source("org/bench", "sub", "validation", revision="abc")), limit=1)
    assert rows == [{"id": 1, "image": {"bytes": png(), "path": None}}]
    assert asked == {"path": "org/bench", "name": "sub", "split": "validation", "revision": "abc"}


def test_files_of_a_hub_repository_are_fetched_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    write(tmp_path / "test6.jsonl", ROWS)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **kw: asked.update(kw, id=a[0]) or str(tmp_path)
    )
    rows = load_rows(benchmark(Source("org/bench", files=("test*.jsonl",))))
    assert ids(rows) == [0, 1, 2, 3, 4]
    assert asked["id"] == "org/bench" and asked["allow_patterns"] == ["test*.jsonl"]
    assert asked["repo_type"] == "dataset"


def test_a_few_unusable_rows_are_left_out_and_many_are_an_error(tmp_path: Path) -> None:
    rows = [{"id": i, "broken": i == 7} for i in range(100)]
    write(tmp_path / "bench" / "test.jsonl", rows)
    task = load_task(benchmark(), Preset(GREEDY), "strict", tmp_path)
    assert len(task.rows) == len(task.prompts) == 99 and task.left_out == ("row 8: 7 is broken",)
    write(tmp_path / "bench" / "test.jsonl", rows[:20])
    with pytest.raises(DataError, match="1 of 20 rows of Bench cannot be used"):
        load_task(benchmark(), Preset(GREEDY), "strict", tmp_path)


def test_rows_that_share_an_id_are_numbered(tmp_path: Path) -> None:
    write(tmp_path / "bench" / "test.jsonl", [{"id": 1}, {"id": 2}, {"id": 1}])
    first, second, again = load_task(benchmark(), Preset(GREEDY), "strict", tmp_path).prompts
    assert again.id == f"{first.id}#2" and len({first.id, second.id, again.id}) == 3
