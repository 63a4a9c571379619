"""The run folder: metrics, rollouts, skipped rows, and the documented metric names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uniopd_mm.errors import DataError, UniOPDError
from uniopd_mm.report import METRICS, RunFolder, find_metric, read_metrics
from uniopd_mm.report.metrics import markdown_table
from uniopd_mm.report.records import COLUMNS, json_line
from uniopd_mm.rollout import Group, Outcome, Prompt, Rollout


def spell(ids):
    return [f"<{i}>" for i in ids]


def picture(colour=(200, 30, 30), size=(640, 320)) -> Image.Image:
    return Image.new("RGB", size, colour)


def rollout(tokens=3, **changes) -> Rollout:
    values = {
        "response_ids": torch.arange(tokens),
        "sampler_logprobs": torch.full((tokens,), -0.5),
        "finish": "stop",
        "outcome": Outcome(correct=True, extracted="42", reason="equal"),
        "teacher": "math",
        "teacher_logprobs": torch.full((tokens,), -0.25),
        "scored": torch.ones(tokens, dtype=torch.bool),
        "advantages": torch.full((tokens,), 0.25),
    }
    return Rollout(**{**values, **changes})


def group(name="chartqa/812", rollouts=(), images=(), slot=0) -> Group:
    spans = tuple((10 * i, 10 * i + 6) for i in range(len(images)))
    encoded = SimpleNamespace(image_spans=spans, collapsed_ids=torch.tensor([7, 8]))
    prompt = Prompt(id=name, messages=(), answer="42", domain="chart")
    return Group(prompt=prompt, encoded=encoded, rollouts=tuple(rollouts), images=tuple(images), slot=slot)


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# --- the run folder -------------------------------------------------------------------------------


def test_the_header_is_there_before_any_metric(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.write_header("steps: 3\n", device="8 x H100", world_size=8)
    versions = json.loads(folder.versions.read_text())
    assert folder.config.read_text() == "steps: 3\n"
    assert versions["torch"] == torch.__version__
    assert (versions["device"], versions["world_size"], versions["earlier"]) == ("8 x H100", 8, [])
    assert {
        "python",
        "platform",
        "transformers",
        "deepspeed",
        "datasets",
        "peft",
        "uniopd_mm",
    } <= versions.keys()
    assert {"git_revision", "git_dirty", "started"} <= versions.keys()


def test_versions_of_an_earlier_start_stay_where_they_differ(tmp_path):
    folder = RunFolder(tmp_path)
    for world_size in (8, 8, 4):
        folder.write_header("", device="cpu", world_size=world_size)
    versions = json.loads(folder.versions.read_text())
    assert versions["world_size"] == 4
    assert [start["world_size"] for start in versions["earlier"]] == [8]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_package_inside_another_projects_checkout_has_no_git_revision(tmp_path):
    from uniopd_mm.report.records import _git_state

    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    source, tracked = tmp_path / "site-packages.py", tmp_path / "tracked.py"
    source.write_text("")
    tracked.write_text("")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "tracked.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    assert _git_state(source) == {"git_revision": None, "git_dirty": None}
    clean = _git_state(tracked)
    assert re.fullmatch("[0-9a-f]{40}", clean["git_revision"]) and clean["git_dirty"] is False
    tracked.write_text("changed")
    assert _git_state(tracked)["git_dirty"] is True


def test_metrics_are_readable_while_the_run_goes_on(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "train/gap": -0.5})
    assert read_metrics(folder.metrics) == [{"step": 1, "train/gap": -0.5}]


def test_an_event_without_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step"):
        RunFolder(tmp_path).append_metrics({"train/gap": -0.5})


def test_non_finite_numbers_are_written_as_null(tmp_path):
    folder = RunFolder(tmp_path)
    metrics = {
        "step": 1,
        "a": float("nan"),
        "b": torch.tensor(float("inf")),
        "c": [1.0, -float("inf")],
        "d": True,
    }
    folder.append_metrics(metrics)
    assert folder.read_metrics() == [{"step": 1, "a": None, "b": None, "c": [1.0, None], "d": True}]


@given(
    st.dictionaries(st.text(), st.floats() | st.text(st.characters()) | st.none() | st.integers(), max_size=4)
)
def test_every_event_is_exactly_one_line_of_valid_json(event):
    line = json_line(event)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    json.loads(line, parse_constant=pytest.fail)


def test_text_that_utf8_cannot_hold_survives(tmp_path):
    text = "half of an emoji \ud83d, a line separator \u2028, 图"
    assert json.loads(json_line({"text": text})) == {"text": text}
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "note": text})
    assert folder.read_metrics() == [{"step": 1, "note": text}]


def test_a_torn_last_line_is_dropped_when_reading(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1})
    folder.close()
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 2, "train/g')
    assert folder.read_metrics() == [{"step": 1}]


@pytest.mark.parametrize("end", range(1, len('{"step": 2, "a": 12}')))
def test_no_event_is_lost_or_glued_after_a_kill_at_any_byte(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b'{"step": 2, "a": 12}'[:end])
    with RunFolder(tmp_path) as folder:
        folder.append_metrics({"step": 3})
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    with RunFolder(tmp_path) as folder:
        folder.append_metrics({"step": 3})
    assert [row["step"] for row in folder.read_metrics()] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_a_resumed_run_has_no_step_twice(tmp_path):
    with RunFolder(tmp_path) as folder:
        for step in (0, 1, 2, 3, 4):
            folder.append_metrics({"step": step, "try": 1})
    with RunFolder(tmp_path) as folder:
        folder.truncate_metrics(2)
        for step in (3, 4):
            folder.append_metrics({"step": step, "try": 2})
    assert [(row["step"], row["try"]) for row in folder.read_metrics()] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
    ]


def test_truncating_in_the_middle_of_writing_keeps_later_events(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1})
    folder.append_metrics({"step": 2})
    folder.truncate_metrics(1)
    folder.append_metrics({"step": 2, "again": True})
    assert folder.read_metrics() == [{"step": 1}, {"step": 2, "again": True}]


def test_a_skipped_row_is_listed_once_however_often_it_is_reported(tmp_path):
    bad = {"source": "train.jsonl:17", "reason": "image not found: a.png"}
    assert RunFolder(tmp_path).append_skipped([bad, bad, Outcome(correct=None, reason="a dataclass")]) == 2
    folder = RunFolder(tmp_path)
    assert folder.append_skipped([bad]) == 0
    assert [row["reason"] for row in written(folder.skipped)] == ["image not found: a.png", "a dataclass"]


# --- rollouts -------------------------------------------------------------------------------------


def test_a_rollout_row_holds_the_whole_contract(tmp_path):
    scored = torch.tensor([True, True, False])
    sample = rollout(scored=scored, student_logprobs=torch.tensor([-0.5, float("-inf"), -0.123456789]))
    path = RunFolder(tmp_path).write_rollouts(
        120, [group(rollouts=[sample], images=[picture()])], spell, limit=4
    )
    assert path == tmp_path / "rollouts" / "step_000120.jsonl"
    (row,) = written(path)
    thumb = row["images"][0].pop("thumb")
    assert re.fullmatch(r"thumbs/[0-9a-f]{16}\.jpg", thumb) and (tmp_path / "rollouts" / thumb).exists()
    assert row == {
        "schema_version": 1,
        "step": 120,
        "sample_id": "chartqa/812",
        "dataset": "chartqa",
        "domain": "chart",
        "probe": False,
        "images": [{"size": [640, 320], "student_tokens": 6, "teacher_tokens": None}],
        "prompt": "<7><8>",
        "answer": "42",
        "sample": 0,
        "tokens": ["<0>", "<1>", "<2>"],
        "token_ids": [0, 1, 2],
        "mask": [1, 1, 0],
        "student_lp": [-0.5, None, -0.12346],
        "sampler_lp": [-0.5, -0.5, -0.5],
        "teacher_lp": [-0.25, -0.25, None],
        "blind_teacher_lp": None,
        "advantage": [0.25, 0.25, 0.25],
        "weight": [1.0, 1.0, 0.0],
        "student_top": None,
        "teacher_top": None,
        "teacher": "math",
        "unscored_reason": "",
        "outcome": {"correct": True, "extracted": "42", "reason": "equal"},
        "score": 1.0,
        "kept": True,
        "finish": "stop",
    }


def test_an_unknown_outcome_has_no_score_and_a_dropped_rollout_no_weight(tmp_path):
    unknown = rollout(outcome=Outcome(correct=None, reason="timeout"), kept=False)
    bare = Rollout(response_ids=torch.arange(2), sampler_logprobs=torch.zeros(2), finish="length")
    path = RunFolder(tmp_path).write_rollouts(1, [group(rollouts=[unknown, bare])], spell, limit=4)
    first, second = written(path)
    assert (first["score"], first["outcome"]["correct"], first["weight"]) == (None, None, [0.0, 0.0, 0.0])
    assert (second["outcome"], second["teacher_lp"], second["advantage"], second["mask"]) == (
        None,
        None,
        None,
        [0, 0],
    )


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"sampler_logprobs": torch.zeros(2)}, "sampler_lp"),
        ({"student_logprobs": torch.zeros(4)}, "student_lp"),
        ({"teacher_logprobs": torch.zeros(4)}, "teacher_lp"),
        ({"advantages": torch.zeros(1)}, "advantage"),
        ({"scored": torch.ones(4, dtype=torch.bool)}, "mask"),
    ],
)
def test_columns_of_unequal_length_are_refused_by_name_and_leave_no_file(tmp_path, changes, column):
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=f"chartqa/812.*'{column}'") as caught:
        folder.write_rollouts(1, [group(rollouts=[rollout(), rollout(**changes)])], spell, limit=4)
    assert isinstance(caught.value, UniOPDError)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_token_strings_that_do_not_match_the_ids_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'tokens' has 1 values for 3"):
        RunFolder(tmp_path).write_rollouts(
            1, [group(rollouts=[rollout()])], lambda ids: ["all in one"], limit=1
        )


def test_a_missing_image_span_is_refused(tmp_path):
    broken = group(rollouts=[rollout()], images=[picture()])
    broken.encoded.image_spans = ()
    with pytest.raises(ValueError, match="'images'"):
        RunFolder(tmp_path).write_rollouts(1, [broken], spell, limit=1)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_all_columns_have_the_length_of_the_response(tmp_path_factory, lengths):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    path = folder.write_rollouts(1, [group(rollouts=map(rollout, lengths))], spell, limit=9)
    rows = written(path)
    assert [len(row["token_ids"]) for row in rows] == lengths
    assert all(
        row[name] is None or len(row[name]) == len(row["token_ids"]) for row in rows for name in COLUMNS
    )


def test_probe_prompts_come_first_and_the_limit_holds(tmp_path):
    groups = [group(f"set/{i}", [rollout(), rollout()], slot=i) for i in (2, 0, 1)]
    path = RunFolder(tmp_path).write_rollouts(1, groups, spell, limit=5, probes={"set/2"})
    rows = written(path)
    assert [(row["sample_id"], row["sample"]) for row in rows] == [
        ("set/2", 0),
        ("set/2", 1),
        ("set/0", 0),
        ("set/0", 1),
        ("set/1", 0),
    ]
    assert [row["probe"] for row in rows] == [True, True, False, False, False]


def test_the_same_image_has_one_thumbnail_written_once(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_rollouts(1, [group(rollouts=[rollout()], images=[picture()])], spell, limit=1)
    (thumb,) = (tmp_path / "rollouts" / "thumbs").iterdir()
    with Image.open(thumb) as image:
        assert image.format == "JPEG" and image.size == (256, 128)
    thumb.write_bytes(b"untouched")
    pair = group(rollouts=[rollout()], images=[picture(), picture((0, 0, 9))])
    row = written(folder.write_rollouts(2, [pair], spell, limit=1))[0]
    assert thumb.read_bytes() == b"untouched"
    assert len({image["thumb"] for image in row["images"]}) == 2
    assert len(list((tmp_path / "rollouts" / "thumbs").iterdir())) == 2


def test_images_of_every_mode_have_a_thumbnail(tmp_path):
    images = [Image.new(mode, (8, 8)) for mode in ("L", "RGBA", "P", "1", "CMYK", "I;16")]
    path = RunFolder(tmp_path).write_rollouts(1, [group(rollouts=[rollout()], images=images)], spell, limit=1)
    assert all((path.parent / image["thumb"]).exists() for image in written(path)[0]["images"])


def test_rewriting_a_step_replaces_its_file(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_rollouts(1, [group(rollouts=[rollout(), rollout()])], spell, limit=9)
    path = folder.write_rollouts(1, [group(rollouts=[rollout()])], spell, limit=9)
    assert len(written(path)) == 1
    assert [item.name for item in path.parent.iterdir()] == ["step_000001.jsonl"]


# --- metric names ---------------------------------------------------------------------------------


def test_the_readme_lists_exactly_the_documented_metrics():
    readme = (Path(sys.modules["uniopd_mm.report"].__file__).parent / "README.md").read_text(encoding="utf-8")
    assert markdown_table() in readme
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_names_of_domains_and_phases_find_their_documentation():
    assert find_metric("domain/math/geometry/gap").name == "domain/NAME/gap"
    assert find_metric("time/sample_s").unit == "s"
    assert find_metric("eval/accuracy").name == "eval/accuracy"
    assert find_metric("train/no_such_thing") is None


def test_reports_load_no_heavy_library():
    code = "import sys, uniopd_mm.report; print({'torch', 'matplotlib', 'rich', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
