"""Starting ``scripts/train_mm.py`` the way a user does, on tiny random models."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
import yaml
from rooms import build

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "train_mm.py"


def write_rows(folder: Path, n: int = 24) -> Path:
    """Rows with 0, 1 and 2 images in two domains."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for i in range(n):
            names = [f"{i}_{k}.png" for k in range(i % 3)]
            for k, name in enumerate(names):
                tiny.random_image(60 + 7 * i, 80, i + k).save(folder / name)
            content = [{"type": "image"}] * len(names) + [{"type": "text", "text": f"what is shown in {i} ?"}]
            row = {
                "id": f"row{i}",
                "messages": [{"role": "user", "content": content}],
                "images": names,
                "image_text": [f"picture {name}" for name in names],
                "answer": "the",
                "domain": "see" if i % 2 else "read",
            }
            file.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def write_recipe(folder: Path, models: dict[str, Path], family: str = "llava", **changes: Any) -> Path:
    """A small but complete run: a multimodal teacher, a text-only teacher, everything switched on."""
    teacher = build(family, folder / "teacher", seed=5)
    recipe = {
        "out": str(folder / "run"),
        "steps": 3,
        "student": {"model": str(models[family]), "dtype": "float32", "freeze": []},
        "teachers": {
            "seer": {"model": str(teacher), "dtype": "float32", "domains": ["see"]},
            "reader": {"model": str(models["text"]), "dtype": "float32", "domains": ["read"], "view": "text"},
        },
        "data": {"train": str(write_rows(folder / "data")), "eval": str(folder / "data" / "rows.jsonl")},
        "rollout": {"prompts_per_step": 4, "n": 3, "max_new_tokens": 6},
        "verifier": {"default": "exact"},
        "calibration": {"kind": "outcome"},
        "optim": {"lr": 1e-3},
        "distributed": {"zero_stage": 0, "micro_groups": 1, "timeout_s": 120},
        "eval": {"every": 3, "limit": 6, "sampling": {"max_new_tokens": 6}},
        "checkpoint": {"every": 2},
        "report": {"rollouts_every": 1},
    }
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) and key in recipe else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def command(recipe: Path, *arguments: str, ranks: int = 1) -> list[str]:
    """The command line; more than one rank goes through the deepspeed launcher."""
    if ranks == 1:
        return [sys.executable, str(SCRIPT), str(recipe), *arguments]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), str(SCRIPT), str(recipe), *arguments]


def environment() -> dict[str, str]:
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    base = {k: v for k, v in os.environ.items() if k not in hidden}
    return {**base, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def launch(
    recipe: Path, *arguments: str, ranks: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, *arguments, ranks=ranks),
        env=environment(),
        cwd=recipe.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def train(recipe: Path, *arguments: str, ranks: int = 1) -> Path:
    """Run to the end and give the run folder."""
    done = launch(recipe, *arguments, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out = next((a.removeprefix("out=") for a in arguments if a.startswith("out=")), None)
    return Path(out or yaml.safe_load(recipe.read_text())["out"])


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
