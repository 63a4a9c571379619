"""Pass counts, the shape of their histogram and repeats, on hand-worked examples; the manifest that carries them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniopd_mm.difficulty import (
    CAP,
    PassCount,
    bin_total,
    bins,
    histogram,
    pass_counts,
    repeats,
    shape_of,
    trend,
    upsampled,
)
from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.prompts import PromptSet, load_prompts
from uniopd_mm.prompts.manifest import read_manifest, row_digests, write_manifest

U = [500, 60, 40, 30, 30, 30, 40, 60, 600]
MIRRORED_J = [500, 120, 80, 60, 40, 30, 20, 10, 5]
KINDS = ("u", "mirrored_j", "neither")

sizes_st = st.lists(st.integers(0, 60), min_size=3, max_size=9)


def prompts_of(sizes: list[int]) -> list[int | None]:
    """Bins of as many prompts as a histogram has, easiest and hardest mixed."""
    return [count for k in range(max(sizes)) for count, size in enumerate(sizes) if k < size]


# Pass counts


def test_an_unknown_outcome_is_neither_correct_nor_incorrect():
    (count,) = pass_counts([[True, None, False, True]])
    assert count == PassCount(n_correct=2, n_known=3, n_asked=4)


def test_a_prompt_with_an_unknown_outcome_is_in_no_bin():
    counts = pass_counts([[True, True], [True, None], [False, False], []])
    assert bins(counts, 2) == [2, None, 0, None]
    assert histogram(bins(counts, 2), 2) == [1, 0, 1]


# Shapes


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        (U, "u"),
        ([300, 20, 20, 20, 250], "u"),
        (MIRRORED_J, "mirrored_j"),
        ([100, 0, 0, 0, 0], "mirrored_j"),
        ([400, 50, 50, 50, 50, 50, 50, 50, 50], "mirrored_j"),  # at the end nothing stands out
        ([50] * 9, "neither"),
        (MIRRORED_J[::-1], "neither"),  # a J: the student is past these prompts
        ([10, 40, 90, 120, 130, 120, 90, 40, 10], "neither"),
        ([200, 50, 60, 70, 80, 90, 95, 100, 105], "neither"),  # mass at 0, but rising from there
        ([0] * 9, "neither"),
    ],
)
def test_shapes_are_recognised(sizes: list[int], kind: str):
    assert shape_of(sizes).kind == kind


def test_a_handful_of_prompts_has_no_shape():
    assert shape_of([3, 1, 1, 1, 3]).kind == "neither"
    assert shape_of([300, 100, 100, 100, 300]).kind == "u", "the same shares of many prompts"


def test_the_numbers_behind_a_shape_are_the_documented_ones():
    shape = shape_of([60, 10, 20, 30, 40])  # mean between: 20
    assert (shape.low, shape.high) == (3.0, 2.0)
    # pairs: -50 -40 -30 -20, +10 +20 +30, +10 +20, +10 = -40 of 240
    assert shape.trend == pytest.approx(-40 / 240)
    assert shape_of([5, 0, 0]).low == math.inf


@given(sizes_st)
def test_the_trend_is_between_falling_and_rising_and_turns_with_the_histogram(sizes: list[int]):
    assert -1 <= trend(sizes) <= 1
    assert trend(sizes[::-1]) == pytest.approx(-trend(sizes))
    if len(set(sizes)) > 1:
        assert trend(sorted(sizes)) == 1


def test_one_answer_per_prompt_shows_no_shape():
    with pytest.raises(ValueError, match="--samples"):
        shape_of([5, 5])


# Repeats


def test_a_u_repeats_what_is_solved_sometimes():
    # largest 100: a bin of 19 reaches 95 at 5 times, one of 10 stops at the cap, one of 50 reaches 95 in part
    binned = prompts_of([100, 19, 10, 50, 80])
    times = repeats(binned, "u", 4)
    assert histogram(binned, 4, times) == [100, 95, 50, 95, 80]
    assert {t for b, t in zip(binned, times, strict=True) if b in (0, 4)} == {1}
    assert sorted(t for b, t in zip(binned, times, strict=True) if b == 3) == [1] * 5 + [2] * 45


def test_a_mirrored_j_repeats_everything_that_is_ever_solved():
    binned = prompts_of([100, 50, 30, 20, 10])
    assert histogram(binned, 4, repeats(binned, "mirrored_j", 4)) == [100, 95, 95, 95, 50]


def test_without_a_shape_and_without_an_outcome_a_prompt_stays_in_once():
    binned = [*prompts_of([90, 1, 1, 1, 90]), None, None]
    assert set(repeats(binned, "neither", 4)) == {1}
    assert repeats(binned, "u", 4)[-2:] == [1, 1]


@given(sizes_st, st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 5))
def test_nothing_is_dropped_the_cap_holds_and_totals_are_as_predicted(sizes, kind, seed, n_apart):
    n = len(sizes) - 1
    binned = [*prompts_of(sizes), *[None] * n_apart]
    times = repeats(binned, kind, n, seed)
    assert len(times) == len(binned) and all(1 <= t <= CAP for t in times)
    after = histogram(binned, n, times)
    for count, (before, now) in enumerate(zip(sizes, after, strict=True)):
        repeated = count in upsampled(kind, n)
        assert now == (bin_total(before, max(sizes)) if repeated else before)
        own = [t for b, t in zip(binned, times, strict=True) if b == count]
        assert not own or max(own) - min(own) <= 1
    assert sum(times) == sum(after) + n_apart


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 400))
def test_a_rarer_difficulty_is_repeated_at_least_as_often_and_order_is_kept(a, b, largest):
    small, big = sorted((a, b))
    largest = max(largest, big)
    assert bin_total(small, largest) <= bin_total(big, largest) <= max(big, largest)
    if small:
        # one prompt more or less is rounding
        assert bin_total(small, largest) / small >= (bin_total(big, largest) - 1) / big


def test_who_gets_the_one_more_depends_on_the_seed_alone():
    binned = prompts_of([100, 40, 40, 40, 100])
    first = repeats(binned, "u", 4, seed=1)
    assert first == repeats(binned, "u", 4, seed=1) != repeats(binned, "u", 4, seed=2)
    assert sorted(first) == sorted(repeats(binned, "u", 4, seed=2))


# The manifest


def write_rows(path: Path, n: int = 6, **changes: dict) -> Path:
    rows = [{"id": f"r{i}", "question": f"what is {i}?", "answer": str(i)} for i in range(n)]
    for row in rows:
        row |= changes.get(row["id"], {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def list_rows(path: Path, prompts: PromptSet, times: list[int]) -> Path:
    write_manifest(path, prompts, times, [(1, 4)] * len(prompts), row_digests(prompts), {})
    return path


def test_a_manifest_gives_each_prompt_as_often_as_it_says(tmp_path: Path):
    prompts = load_prompts(write_rows(tmp_path / "rows.jsonl"))
    balanced = load_prompts(list_rows(tmp_path / "out" / "manifest.jsonl", prompts, [1, 2, 1, 5, 1, 3]))
    assert len(balanced) == 13 and balanced.domains() == {"default": 13}
    texts = [prompt.messages for prompt in balanced]
    assert [texts.count(prompt.messages) for prompt in prompts] == [1, 2, 1, 5, 1, 3]
    ids = [prompt.id for prompt in balanced]
    assert len(set(ids)) == 13 and {"rows/r3", "rows/r3#2", "rows/r3#5"} <= set(ids)


def test_a_manifest_may_be_moved_with_its_rows_and_opened_from_anywhere(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = load_prompts(str(write_rows(Path("here") / "rows.jsonl")))
    list_rows(Path("here") / "out" / "manifest.jsonl", prompts, [1] * 6)
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir("/")
    assert len(load_prompts(tmp_path / "there" / "out" / "manifest.jsonl")) == 6


def test_weights_of_a_mixture_are_part_of_the_repeats(tmp_path: Path):
    write_rows(tmp_path / "a.jsonl"), write_rows(tmp_path / "b.jsonl")
    (tmp_path / "mix.yaml").write_text("sources: [{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 0.5}]")
    prompts = load_prompts(tmp_path / "mix.yaml")
    path = list_rows(tmp_path / "manifest.jsonl", prompts, [2] * len(prompts))
    assert sorted(row.repeats for row in read_manifest(path).rows["a"].values()) == [4] * 6
    assert len(read_manifest(path).rows["b"]) == 3, "those that the mixture drew"
    assert len(load_prompts(path, seed=99)) == 2 * len(prompts) == 30
    before = load_prompts(path, balanced=False)
    assert [prompt.id for prompt in before] == [prompt.id for prompt in prompts]


@pytest.mark.parametrize(
    ("n", "changes", "what"),
    [
        (6, {"r2": {"answer": "9"}}, "rows.jsonl:3 (rows/r2) is not what it was"),
        (7, {}, "had 6 rows and now has 7"),
        (5, {}, "had 6 rows and now has 5"),
        (6, {"r0": {"id": "new"}}, "rows.jsonl:1 (rows/r0) is not what it was"),
    ],
)
def test_a_manifest_that_no_longer_fits_its_rows_is_refused(tmp_path: Path, n: int, changes: dict, what: str):
    path = write_rows(tmp_path / "rows.jsonl")
    manifest = list_rows(tmp_path / "manifest.jsonl", load_prompts(path), [1] * 6)
    write_rows(path, n, **changes)
    with pytest.raises(DataError, match="no longer fits") as error:
        load_prompts(manifest)
    assert what in str(error.value) and "balance_data.py" in str(error.value)


@pytest.mark.parametrize("size", [60, 200_000])
@pytest.mark.parametrize("kind", ["file", "table"])
def test_a_picture_that_was_replaced_is_noticed(tmp_path: Path, kind: str, size: int):
    """Its row is the same, and so is the time of its file; bytes in a table are told by their number."""
    picture, table = tmp_path / "picture.png", tmp_path / "rows.parquet"

    def put(content: bytes) -> Path:
        row = {"id": "r", "question": "what?", "answer": "1"}
        if kind == "file":
            picture.write_bytes(content)
            os.utime(picture, (1, 1))
            return write_rows(tmp_path / "rows.jsonl", 2, r1={"image": "picture.png"})
        image = {"bytes": content, "path": None}
        pq.write_table(
            pa.Table.from_pylist([row | {"id": "r0", "image": None}, row | {"id": "r1", "image": image}]),
            table,
        )
        return table

    rows = put(b"x" * size)
    manifest = list_rows(tmp_path / "manifest.jsonl", load_prompts(rows), [1, 1])
    assert len(load_prompts(manifest)) == 2
    put(b"x" * (size - 2) + b"yx" if kind == "file" else b"x" * (size - 1))
    with pytest.raises(DataError, match=r"rows\.\w+:2 \(rows/r1\) is not what it was"):
        load_prompts(manifest)


def test_a_row_that_can_be_used_again_is_not_silently_left_out(tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", 6, r4={"image": "late.png"})
    manifest = list_rows(tmp_path / "manifest.jsonl", load_prompts(path, max_bad_share=1), [1] * 5)
    assert len(load_prompts(manifest, max_bad_share=1)) == 5
    (tmp_path / "late.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"rows\.jsonl:5 could not be used"):
        load_prompts(manifest, max_bad_share=1)


def test_a_cut_or_foreign_manifest_is_refused_with_its_place(tmp_path: Path):
    path = list_rows(tmp_path / "manifest.jsonl", load_prompts(write_rows(tmp_path / "rows.jsonl")), [1] * 6)
    lines = path.read_text().splitlines(keepends=True)
    for spoilt, place in (
        ("".join(lines[:-1]), "6 rows announced, 5 found"),
        ("".join(lines)[:-20], "manifest.jsonl:7"),
        (lines[0].replace(': 2, "sources"', ': 7, "sources"'), "format 7, expected 2"),
        (lines[0] + '{"source": "other", "row": 1}\n', "manifest.jsonl:2"),
    ):
        path.write_text(spoilt)
        with pytest.raises(DataError, match="not a balanced mixture") as error:
            load_prompts(path)
        assert place in str(error.value)


def test_a_manifest_is_no_source_of_a_mixture(tmp_path: Path):
    path = list_rows(tmp_path / "manifest.jsonl", load_prompts(write_rows(tmp_path / "rows.jsonl")), [1] * 6)
    (tmp_path / "mix.yaml").write_text("sources: [{path: manifest.jsonl}]")
    with pytest.raises(ConfigError, match=f"data.train={path}"):
        load_prompts(tmp_path / "mix.yaml")


@settings(max_examples=20, deadline=None)
@given(times=st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_reading_gives_what_was_written(tmp_path_factory: pytest.TempPathFactory, times: list[int]):
    folder = tmp_path_factory.mktemp("round")
    prompts = load_prompts(write_rows(folder / "rows.jsonl", len(times)))
    manifest = read_manifest(list_rows(folder / "manifest.jsonl", prompts, times))
    assert [row.repeats for row in manifest.rows["rows"].values()] == times
    assert [row.id for row in manifest.rows["rows"].values()] == [prompt.id for prompt in prompts]
