"""``scripts/check.py`` and the checks at the start of a run, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from launching import ROOT, environment, launch, write_recipe
from safetensors.torch import load_file, save_file

from uniopd_mm.preflight import Topic


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    return write_recipe(tmp_path_factory.mktemp("check"), tiny_models, steps=1, eval={"every": 0})


def check(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "check.py"), str(recipe), *arguments]
    return subprocess.run(
        command,
        env=environment(),
        cwd=recipe.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_everything_is_looked_at_written_down_and_nothing_trained(recipe: Path) -> None:
    out = recipe.parent / "all"
    done = check(recipe, f"out={out}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((out / "check" / "report.json").read_text())
    assert report["ok"] is True
    assert {f["topic"] for f in report["findings"]} == set(get_args(Topic))
    assert {example["teacher"] for example in report["examples"]} == {"seer", "reader"}
    assert {found["teacher"]: found["view"] for found in report["grounding"]} == {
        "seer": "image",
        "reader": "text",
    }
    kinds = {(c["responses"], c["variant"]) for found in report["grounding"] for c in found["comparisons"]}
    assert kinds == {(r, v) for r in ("sampled", "gold") for v in ("grey", "none", "text")}
    shown = " ".join(done.stdout.split())
    for text in ("uses the picture", "scored by teacher seer", "at tokens (count)", "train_mm.py"):
        assert text in shown, text
    assert any((out / "scores").rglob("*")) and not (out / "metrics.jsonl").exists()


def test_a_blind_teacher_fails_the_check(recipe: Path) -> None:
    weights = recipe.parent / "teacher" / "model.safetensors"
    whole = load_file(weights)
    blind = {n: torch.zeros_like(w) if "projector" in n else w for n, w in whole.items()}
    save_file(blind, weights, {"format": "pt"})
    try:
        done = check(recipe, f"out={recipe.parent / 'blind'}", "--only", "grounding", "--prompts", "6")
    finally:
        save_file(whole, weights, {"format": "pt"})
    assert done.returncode == 1, done.stderr[-3000:]
    assert "this teacher does not use the picture" in " ".join(done.stdout.split())
    assert "null test" not in done.stdout


def test_a_run_says_what_it_looked_at_before_it_starts_and_again_when_resumed(recipe: Path) -> None:
    out = recipe.parent / "run"
    for steps in (1, 2):
        done = launch(recipe, f"out={out}", f"steps={steps}", "rollout.top_k=5")
        assert done.returncode == 0, done.stderr[-3000:]
        shown = " ".join(done.stdout.split())
        assert "check ok before training: head, context" in shown and "null test seer" in shown, shown
        assert "check note truncation: top_k=5 cuts" in shown
