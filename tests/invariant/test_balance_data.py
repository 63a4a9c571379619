"""``scripts/balance_data.py`` as a user starts it: resumed, on two ranks, and its manifest as training data."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import ROOT, environment, free_port, launch, write_recipe
from PIL import Image
from transformers import AutoTokenizer

from uniopd_mm.prompts import load_prompts
from uniopd_mm.testing import StubServer
from uniopd_mm.training.run import LAUNCHER_VARIABLES

N_ROWS, SAMPLES = 24, 4
BROKEN = 2
"""Row whose picture is there but cannot be opened."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """Answers of one token; to half of the prompts about every second one is right, to the others none."""
    rollout = {"prompts_per_step": 4, "n": 3, "max_new_tokens": 1, "concurrent_rollouts": 16}
    folder = tmp_path_factory.mktemp("balance")
    recipe = write_recipe(folder, tiny_models, steps=1, rollout=rollout, eval={"every": 0})
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llava"])
    right = [text for i in range(0, len(tokenizer), 2) if (text := tokenizer.decode([i])).strip()]
    path = folder / "data" / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    golds = [right if i % 2 else "never" for i in range(N_ROWS)]
    lines = [json.dumps(row | {"answer": gold}) + "\n" for row, gold in zip(rows, golds, strict=True)]
    path.write_text("".join(lines))
    (folder / "data" / rows[BROKEN]["images"][0]).write_bytes(b"not a picture")
    return recipe


def balance(recipe: Path, out: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
        launcher += ["--master_port", str(free_port())]
    options = ["--samples", str(SAMPLES), "--shape", "u", "--out", str(out)]
    return subprocess.run(
        [*launcher, str(ROOT / "scripts" / "balance_data.py"), str(recipe), *options, *arguments],
        env=environment(),
        cwd=recipe.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def balanced(recipe: Path) -> Path:
    """The folder of one whole run, with what it printed."""
    out = recipe.parent / "balanced"
    done = balance(recipe, out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (out / "printed.txt").write_text(done.stdout)
    return out


def listed(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()[1:]]


def answers(out: Path) -> list[Path]:
    return sorted((out / "samples").glob("*/rank_*.jsonl"))


def test_every_row_is_listed_and_what_is_solved_sometimes_is_repeated(balanced: Path) -> None:
    rows = listed(balanced)
    assert [row["row"] for row in rows] == list(range(1, N_ROWS + 1))
    assert all(1 <= row["repeats"] <= 5 for row in rows)
    assert {row["repeats"] for row in rows if row["n_correct"] in (0, SAMPLES)} <= {1}
    assert any(row["repeats"] > 1 for row in rows)
    assert (rows[BROKEN]["n_known"], rows[BROKEN]["repeats"]) == (0, 1), "unknown, and so not repeated"
    printed = " ".join((balanced / "printed.txt").read_text().split())
    assert "unknown 1 1 1.00" in printed and f"data.train={balanced / 'manifest.jsonl'}" in printed
    assert f"all {N_ROWS} {sum(row['repeats'] for row in rows)} " in printed
    with Image.open(balanced / "histogram.png") as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50, "something is drawn"


def test_two_ranks_go_on_with_the_answers_of_a_killed_run_and_end_at_the_same_manifest(
    recipe: Path, balanced: Path
) -> None:
    out = recipe.parent / "resumed"
    shutil.copytree(balanced, out)
    (out / "manifest.jsonl").unlink()
    (log,) = answers(out)
    lines = log.read_bytes().splitlines(keepends=True)
    half = b"".join(lines[: len(lines) // 2])
    log.write_bytes(half + b'{"settings": "cut')
    done = balance(recipe, out, ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (out / "manifest.jsonl").read_text() == (balanced / "manifest.jsonl").read_text()
    assert log.read_bytes().startswith(half), "what was answered is kept"
    again = [json.loads(line) for path in answers(out) for line in path.read_bytes().splitlines()]
    asked = [(row["id"], row["index"]) for row in again if not row["error"]]
    assert len(asked) == len(set(asked)) == (N_ROWS - 1) * SAMPLES, "nothing is asked twice"


def test_a_run_trains_on_the_manifest_and_refuses_it_once_its_rows_have_changed(
    recipe: Path, balanced: Path
) -> None:
    override = f"data.train={balanced / 'manifest.jsonl'}"
    done = launch(recipe, override, f"out={recipe.parent / 'run'}", "data.max_bad_share=0.5")
    assert done.returncode == 0, done.stderr[-2000:]
    path = recipe.parent / "data" / "rows.jsonl"
    before = path.read_text()
    path.write_text(before.replace("shown in 7", "shown in 8"))
    try:
        done = launch(recipe, override, f"out={recipe.parent / 'refused'}")
    finally:
        path.write_text(before)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no longer fits" in done.stderr and "rows.jsonl:8 (rows/row7)" in done.stderr


def test_prompts_that_are_not_asked_stay_in_once(recipe: Path) -> None:
    out = recipe.parent / "limited"
    done = balance(recipe, out, "--limit", "6")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = listed(out)
    assert len(rows) == N_ROWS and sum(row["n_known"] > 0 for row in rows) <= 6
    assert {row["repeats"] for row in rows if row["n_known"] == 0} == {1}
    assert "not asked 18 18 1.00" in " ".join(done.stdout.split())


def test_servers_may_answer_in_place_of_this_process(recipe: Path, tiny_models: dict[str, Path]) -> None:
    def sample(ids: list[int], images: list, params: dict) -> list[tuple[list[int], list[float]]]:
        return [([40 + (sum(ids) + i) % 50], [-1.0]) for i in range(int(params.get("n") or 1))]

    tokenizer = AutoTokenizer.from_pretrained(tiny_models["text"])
    right = [tokenizer.decode([i]) for i in range(40, 65)]
    rows = [
        {"id": i, "question": f"{'a ' * i}?", "answer": right, "domain": "read", "verifier": "exact"}
        for i in range(10)
    ]
    path, out = recipe.parent / "texts.jsonl", recipe.parent / "served"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with StubServer("vllm_text", lambda ids, images: [-1.0] * (len(ids) - 1), sample=sample) as server:
        place = {"kind": "vllm_text", "urls": [server.url], "model": server.teacher.model}
        changes = [f"data.train={path}", f"student.model={tiny_models['text']}"]
        done = balance(recipe, out, *changes, f"rollout.server={json.dumps(place)}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    listing = listed(out)
    assert len(listing) == 10 and all(row["n_known"] == SAMPLES for row in listing)
    assert len({row["n_correct"] for row in listing}) > 1


def test_a_student_that_is_not_made_yet_is_said_to_be_missing(recipe: Path) -> None:
    done = balance(recipe, recipe.parent / "none", "student.model=nowhere", "prepare=make it")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "make it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "-1"), "--temperature -1.0: Input should be greater"),
        (("--top-p", "2"), "--top-p 2.0"),
        (("--out", str(ROOT / "README.md")), "README.md: File exists. Give a folder"),
    ],
)
def test_a_bad_command_says_what_to_type(recipe: Path, arguments: tuple[str, str], message: str) -> None:
    done = balance(recipe, recipe.parent / "bad", *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_the_quickstart_trains_on_rows_balanced_for_its_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "data" / "quickstart"))
    for name in LAUNCHER_VARIABLES:  # of a process group that another test of this process has formed
        monkeypatch.delenv(name, raising=False)
    prepare = importlib.import_module("prepare")
    chosen = prepare.Settings(
        seed=0, train_rows=12, eval_rows=2, steps_scale=1e-9, samples=2, asked_rows=8
    )  # models of one training step
    workshop, scans = prepare.Workshop(tmp_path, chosen.digest()), prepare.scans_and_labels()
    with workshop.alone():
        prepare.make_data(workshop, chosen)
        for name in ("teacher_text", "student"):
            prepare.make_model(name, workshop, chosen, scans, lambda *_: None, lambda: None)
        prepare.balance_rows(workshop, chosen, threads=1)
    rows = listed(tmp_path / "difficulty")
    assert len(rows) == 12 and sum(row["n_known"] == 2 for row in rows) == 8
    assert len(load_prompts(tmp_path / "difficulty" / "manifest.jsonl")) >= 12
    assert workshop.result("difficulty") is not None, "kept by the next preparation"
    recipe = yaml.safe_load((ROOT / "scripts" / "recipes" / "quickstart.yaml").read_text())
    cache = recipe["prepare"].split("--out ")[1]
    assert recipe["data"]["train"] == f"{cache}/difficulty/manifest.jsonl"
