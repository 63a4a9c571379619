"""Teachers that fail in every way we know: training goes on, and is the training without what they failed on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import environment, metrics, train, write_recipe
from rooms import build, load
from safetensors.torch import load_file

from uniopd_mm.models import MultimodalLM
from uniopd_mm.testing import Faults, StubServer, names

STEPS = 3
KINDS = {"seer": "vllm", "reader": "vllm_text"}
HAVING = {"seer": ("images",), "reader": ()}


def every_third(kind: str, having: tuple[str, ...], first: int, n: int) -> Faults:
    """From call ``first`` on every third one fails, each time in the next of all ways that there are."""
    kinds = [name for effect in ("retry", "error", "refuse") for name in names(effect, kind, *having)]
    return Faults(schedule={first + 3 * i: kinds[i % len(kinds)] for i in range(n)}, hang_s=6)


def scorer(model: MultimodalLM) -> Any:
    """A stub server's model: the real one, on expanded ids and pictures."""

    @torch.no_grad()
    def score(ids: list[int], images: list[Any]) -> list[float]:
        row = torch.tensor([ids])
        pixels = model.processor.process_images(images)[0] if images else {}
        logits = model.transformer(input_ids=row, attention_mask=torch.ones_like(row), **pixels).logits
        return logits[0, :-1].log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0].tolist()

    return score


@contextmanager
def serve(models: dict[str, Path], **faults: Faults) -> Iterator[dict[str, StubServer]]:
    seer, reader = load(models["seer"]), load(models["reader"])
    marker = seer.processor.image_token_id
    per_image = seer.processor.expected_image_tokens(80, 60)

    def expand(ids: list[int], n_images: int) -> list[int]:
        return [token for one in ids for token in [one] * (per_image if one == marker else 1)]

    with (
        StubServer("vllm", scorer(seer), expand=expand, marker=marker, faults=faults.get("seer")) as one,
        StubServer("vllm_text", scorer(reader), faults=faults.get("reader")) as two,
    ):
        yield {"seer": one, "reader": two}


def servers(stubs: dict[str, StubServer]) -> list[str]:
    settings = "{{kind: {}, urls: [{}], timeout_s: 2, retries: 2}}"
    return [
        *(f"teachers.{name}.server={settings.format(KINDS[name], stub.url)}" for name, stub in stubs.items()),
        *(f"teachers.{name}.max_unscored_share=1" for name in stubs),
    ]


def rollouts(run: Path) -> dict[int, list[dict[str, Any]]]:
    return {
        step: [
            json.loads(line)
            for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        ]
        for step in range(1, STEPS + 1)
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    return write_recipe(
        tmp_path_factory.mktemp("faults"),
        tiny_models,
        steps=STEPS,
        rollout={"prompts_per_step": 8, "n": 6},
        eval={"every": 0},
        balance={"ratio": 1.0},
        calibration={"kind": "shift", "delta": 0.1},
        report={"rollouts_every": 1, "rollouts_per_step": 1000},
    )


def test_a_run_whose_teachers_fail_is_the_run_without_what_they_failed_on(
    recipe: Path, tiny_models: dict[str, Path]
) -> None:
    models = {"seer": build("llava", recipe.parent / "teacher", seed=5), "reader": tiny_models["text"]}
    with serve(models) as stubs:
        clean = train(recipe, f"out={recipe.parent / 'clean'}", *servers(stubs))
        n_asked = {
            name: sum(r["teacher"] == name for rows in rollouts(clean).values() for r in rows)
            for name in stubs
        }
        n_before = {name: len(stub.requests) - n_asked[name] for name, stub in stubs.items()}
    assert not any(key.startswith("unscored/") for row in metrics(clean) for key in row)

    faults = {
        name: every_third(kind, HAVING[name], n_before[name], n_asked[name]) for name, kind in KINDS.items()
    }
    with serve(models, **faults) as stubs:
        disturbed = train(recipe, f"out={recipe.parent / 'disturbed'}", *servers(stubs))
        applied = [fault for stub in stubs.values() for _, fault in stub.applied]
    assert len(set(applied)) >= 20  # ways to fail
    failed = {
        step: [(row["sample_id"], row["sample"]) for row in rows if row["unscored_reason"]]
        for step, rows in rollouts(disturbed).items()
    }
    n_failed = sum(map(len, failed.values()))
    assert 3 <= n_failed < sum(n_asked.values()) / 2
    for step, row in enumerate(metrics(disturbed), start=1):
        shares = [value for key, value in row.items() if key.startswith("unscored/")]
        assert sum(shares) == pytest.approx(len(failed[step]) / 48), row

    listed = recipe.parent / "left_out.json"
    listed.write_text(json.dumps(failed))
    with serve(models) as stubs:
        out = recipe.parent / "left_out"
        script = [sys.executable, str(Path(__file__).parent / "left_out.py"), str(recipe), str(listed)]
        done = subprocess.run(
            [*script, f"out={out}", *servers(stubs)],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for ours, wanted in zip(metrics(disturbed), metrics(out), strict=True):
        for key in ("train/loss", "train/grad_norm", "train/margin", "train/gap", "train/mixed_groups"):
            assert ours[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-7), key
    ours, wanted = (load_file(run / "model" / "model.safetensors") for run in (disturbed, out))
    untouched = load_file(clean / "model" / "model.safetensors")
    assert all(torch.allclose(ours[name], wanted[name], atol=1e-6, rtol=0) for name in wanted)
    assert any(not torch.allclose(ours[name], untouched[name], atol=1e-5, rtol=0) for name in wanted)
